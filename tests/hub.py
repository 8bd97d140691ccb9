"""The Hugging Face Hub on this machine, as far as an upload calls it: what arrives is kept in memory.

Its interface is what huggingface_hub 2.4 calls without hf_xet: whoami, repos/create, preupload, LFS batch
and PUT, commit.
"""

import base64
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """What it has been given, and what it refuses."""

    address: str = ""
    refuses: str = ""  # the end of the path of a request
    files: dict[str, bytes] = field(default_factory=dict)  # by path, as committed
    blobs: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    made: list[dict[str, Any]] = field(default_factory=list)  # repositories, as they were to be made
    tokens: set[str | None] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        """That of a process that uploads here."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": "hf_mine", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """To a POST."""
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

        def say(self, status: int, answer: dict[str, Any]) -> None:
            bits = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(bits)))
            self.end_headers()
            self.wfile.write(bits)

        def do_POST(self) -> None:
            path, body = self.path.partition("?")[0], self.body()
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuses and path.endswith(hub.refuses):
                return self.say(403, {"error": f"you may not write to {path}"})
            return self.say(200, hub.answer(path, body))

        def do_GET(self) -> None:
            if self.path != "/api/whoami-v2":
                return self.say(404, {"error": "there is nothing yet"})
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuses and self.path.endswith(hub.refuses):
                return self.say(403, {"error": f"you may not read {self.path}"})
            return self.say(200, {"type": "user", "name": "owner"})

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
