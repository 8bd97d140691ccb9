"""The Hugging Face Hub on this machine, as far as uploads and downloads call it.

Its interface is what huggingface_hub 1.0 to 2.4 and datasets 4.0 to 5.2 call without hf_xet. Uploads: whoami,
repos/create, preupload, LFS batch and PUT, commit; what arrives is kept in memory. Downloads: a repository's info,
tree, paths-info and files.
"""

import base64
import hashlib
import json
import re
import urllib.parse
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """What can be downloaded. A gated one lists its files, and gives them to who has a token."""

    files: dict[str, bytes]  # by path
    commit: str = COMMIT
    is_gated: bool = False

    @classmethod
    def of(cls, folder: Path, *, is_gated: bool = False) -> "Repository":
        """The files of a folder."""
        return cls(
            {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()},
            is_gated=is_gated,
        )

    def tree(self, folder: str) -> list[dict[str, Any]]:
        """The folders and files below a folder, at any depth."""
        below = [path for path in self.files if not folder or path.startswith(f"{folder}/")]
        folders = {str(parent) for path in below for parent in Path(path).parents} - {".", folder}
        return [{"type": "directory", "path": path, "oid": "0"} for path in sorted(folders)] + [*map(self.entry, below)]

    def entry(self, path: str) -> dict[str, Any]:
        """A file, as the tree lists it."""
        return {
            "type": "file",
            "path": path,
            "size": len(self.files[path]),
            "oid": hashlib.sha1(self.files[path]).hexdigest(),
        }


@dataclass
class Hub:
    """What it has been given, and what it refuses."""

    address: str = ""
    refuses: str = ""  # the end of the path of a request
    files: dict[str, bytes] = field(default_factory=dict)  # by path, as committed
    blobs: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    made: list[dict[str, Any]] = field(default_factory=list)  # repositories, as they were to be made
    tokens: set[str | None] = field(default_factory=set)
    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)  # paths of files that were downloaded

    @property
    def environment(self) -> dict[str, str]:
        """That of a process that uploads here."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": "hf_mine", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def find(self, path: str) -> tuple[Repository | None, str]:
        """The repository that a path of an API or a file names, and what follows its name."""
        match = re.fullmatch(r"/(?:api/)?(models/|datasets/)?([^/]+/[^/]+)/?(.*)", path)
        if match is None:
            return None, ""
        there = self.datasets if match[1] == "datasets/" else self.models
        return there.get(match[2]), urllib.parse.unquote(match[3])

    def describe(self, repository: Repository, what: str, body: bytes = b"") -> Any:  # noqa: ANN401
        """The answer of the API on a repository."""
        if what.startswith("tree/"):
            return repository.tree(what.partition("/")[2].partition("/")[2])
        if what.startswith("paths-info/"):
            paths = urllib.parse.parse_qs(body.decode()).get("paths", [])
            known = {entry["path"]: entry for entry in repository.tree("")}
            return [known[path] for path in paths if path in known]
        siblings = [{"rfilename": path, "size": len(content)} for path, content in repository.files.items()]
        return {"_id": "0", "id": "owner/name", "sha": repository.commit, "siblings": siblings, "private": False}

    def answer(self, path: str, body: bytes) -> Any:  # noqa: ANN401
        """To a POST."""
        repository, what = self.find(path)
        if repository is not None:
            return self.describe(repository, what, body)
        if path.endswith("/commit/main"):
            return self.commit([json.loads(line) for line in body.splitlines()])
        given = json.loads(body)
        if path == "/api/repos/create":
            self.made.append(given)
            return {"url": f"{self.address}/{given['organization']}/{given['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            modes = ("lfs" if file["path"].endswith(".safetensors") else "regular" for file in given["files"])
            both = zip(given["files"], modes, strict=True)
            return {"files": [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f, mode in both]}
        assert path.endswith(".git/info/lfs/objects/batch"), path
        actions = [{**x, "actions": {"upload": {"href": f"{self.address}/lfs/{x['oid']}"}}} for x in given["objects"]]
        return {"transfer": "basic", "objects": actions}

    def commit(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Keep the files of a commit."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        return {"success": True, "commitUrl": f"{self.address}/owner/name/commit/0", "commitOid": "0"}


@contextmanager
def serving() -> Generator[Hub]:
    """A hub that answers while this lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def body(self) -> bytes:
            if length := self.headers.get("Content-Length"):
                return self.rfile.read(int(length))
            parts = list[bytes]()
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def say(self, status: int, answer: Any, **headers: str) -> None:  # noqa: ANN401
            bits = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(bits)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(bits)

        def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
            self.say(status, {"error": message}, X_Error_Code=code, X_Error_Message=message, **headers)

        def do_POST(self) -> None:
            path, body = self.path.partition("?")[0], self.body()
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuses and path.endswith(hub.refuses):
                return self.say(403, {"error": f"you may not write to {path}"})
            return self.say(200, hub.answer(path, body))

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path != "/api/whoami-v2":
                return self.download(path)
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuses and self.path.endswith(hub.refuses):
                return self.say(403, {"error": f"you may not read {self.path}"})
            return self.say(200, {"type": "user", "name": "owner"})

        def download(self, path: str) -> None:
            repository, what = hub.find(path)
            if repository is None:
                return self.refuse(401, "RepoNotFound", "Repository not found")
            revision = what.split("/")[1] if "/" in what else "main"
            if revision not in ("main", repository.commit):
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            if path.startswith("/api/"):
                return self.say(200, hub.describe(repository, what))
            if repository.is_gated and not self.headers.get("Authorization"):
                return self.refuse(401, "GatedRepo", "Access to this repository is restricted. Please log in.")
            file = what.split("/", 2)[2]
            if file not in repository.files:
                return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=repository.commit)
            if self.command == "GET":
                hub.sent.append(file)
            content = repository.files[file]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.say(200, content, ETag=etag, X_Repo_Commit=repository.commit)

        def do_PUT(self) -> None:
            hub.blobs[self.path.removeprefix("/lfs/")] = self.body()
            self.say(200, {})

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
