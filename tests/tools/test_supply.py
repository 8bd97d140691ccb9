"""`make audit`: what has a known vulnerability fails, by name; where nobody can be asked it says so; all is pinned."""

import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from audit import (
    CONSTRAINTS,
    PROJECT,
    constraint_lines,
    installed_packages,
    licence_lines,
    main,
    update_constraints,
    verdict,
)

KNOWN = {"id": "X-1", "aliases": ["CVE-0-1"], "summary": "bad", "affected": []}


class Service(BaseHTTPRequestHandler):
    """Knows one vulnerability, of pillow 1.0."""

    def do_POST(self) -> None:
        """As OSV's query."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        bad = (asked["package"]["name"], asked["version"]) == ("pillow", "1.0")
        affected = {"package": {"name": "pillow", "ecosystem": "PyPI"}, "versions": ["1.0"], "ranges": []}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"vulns": [KNOWN | {"affected": [affected]}]} if bad else {}).encode())

    def log_message(self, *words: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def url() -> Generator[str, None, None]:
    """Where it answers."""
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (
            "pillow==1.0\nnumpy==2.0\n",
            1,
            ["pillow 1.0: CVE-0-1, mended in no version", "1 known vulnerabilities in 2 packages"],
        ),
        ("pillow==12.3.0\n", 0, ["0 known vulnerabilities in 1 packages"]),
    ],
)
def test_what_is_known(
    text: str, code: int, said: list[str], url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "constraints.txt").write_text(text)
    assert main(["-s", "osv", "--osv-url", url], tmp_path / "constraints.txt") == code
    assert capsys.readouterr().out.splitlines()[-len(said) :] == said


@pytest.mark.nightly
def test_nobody_can_be_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "constraints.txt").write_text("pillow==1.0\n")
    assert main(["-s", "osv", "--osv-url", "http://127.0.0.1:9"], tmp_path / "constraints.txt") == 0
    assert "not audited, nobody could be asked: " in capsys.readouterr().out.splitlines()[-1]


def test_a_service_that_knows_no_package_has_not_audited_any() -> None:
    """As an index without that service answers, with exit code 0; and what is no answer is a failure."""
    skipped = {"name": "torch", "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)"}
    code, said = verdict(0, json.dumps({"dependencies": [skipped], "fixes": []}), "No known vulnerabilities found")
    assert code == 0
    assert said.startswith("not audited, the service knows none of 1 packages: Dependency not found")
    code, said = verdict(0, json.dumps({"dependencies": [skipped, {"name": "a", "version": "1", "vulns": []}]}), "")
    assert (code, said) == (0, "0 known vulnerabilities in 1 packages; the service does not know 1 others")
    assert verdict(2, "", "usage: pip-audit ...")[0] == 2
    assert verdict(0, "nonsense", "")[0] == 1


@pytest.mark.slow
def test_all_that_is_installed_is_pinned_and_has_a_licence() -> None:
    found = installed_packages()
    assert {"torch", "gradio", "pip-audit", "uvicorn"} <= found.keys()
    text = CONSTRAINTS.read_text(encoding="utf-8")
    assert found.keys() <= constraint_lines(text).keys()
    assert sum(line.count(", ") + 1 for line in licence_lines(found)) >= len(found)


def test_what_is_written_keeps_remarks_and_what_is_not_here() -> None:
    text = "# why\nb==1 # a build\na_x==2\n"
    assert update_constraints(text, {"b": "3", "c": "4"}) == "# why\na_x==2\nb==3 # a build\nc==4\n"


def test_what_parses_the_files_of_others_and_serves_has_an_upper_bound() -> None:
    lines = PROJECT.read_text(encoding="utf-8")
    parsers = "gradio transformers diffusers accelerate peft pillow pyarrow pyyaml safetensors jinja2"
    for name in parsers.split():
        asked = [line for line in lines.split('"') if line.startswith(f"{name}>=")]
        assert asked, name
        assert all(",<" in line for line in asked), name
