"""What README types works in a clone and in new environments, without a network; trainings are made small."""

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

from docs.test_tutorial import photos
from e2e.shell import TINY
from fresh import ENVIRONMENT, finished, link, made

ROOT = Path(__file__).parents[2]
SMALL = shlex.join(TINY)
PHOTOS = ["net.width=8", "train.batch=8", "train.steps=5", "data.side=16", "evaluate.protocol.samples=100"]
# What a command gets more, by how it begins, the longest beginning first; one that begins otherwise fails the test.
MORE = {
    "git clone REPOSITORY dumo": "",
    "python -c": "",
    "python -m venv .venv": "",
    "python -m pytest": "--version",
    "touch .venv/bin/": "",
    "echo ": "",
    "pip install": "",
    "dumo train dumo-best": f"{SMALL} train.batch=32",  # its coupling takes 32 rows
    "dumo train digits-meanflow": SMALL,
    "dumo train digits steps=500": SMALL,
    "dumo train photos": f"--yes {shlex.join(PHOTOS)}",  # there is no terminal to ask on
    "dumo sample runs/": "",
    "dumo sample cifar10-trained": "",
    "dumo evaluate digits-trained": "--nfe 1",
    "dumo evaluate runs/": "",
    "dumo report runs/": "",
    "dumo compare digits-trained runs/digits-meanflow": "--anyway",  # the small one is judged by fewer samples
    "dumo recipes": "",
    "dumo show digits": "",
    "dumo reproduce fig3": "--scale smoke",
    "dumo demo digits-trained": "--port 7869",
}
FETCH = "import urllib.request as r; r.urlopen('http://x.org')"
WHERE = "import dumo; print(dumo.__file__)"

pytestmark = pytest.mark.nightly


def blocks(language: str) -> str:
    """README's fenced blocks in one language, one after another."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return "".join(re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


class Person:
    """Someone who types: where they are, and the environment that is active."""

    def __init__(self, folder: Path) -> None:
        self.here, self.yours = folder, made(folder / "yours")
        self.tree = folder / "repository.git"
        git = f"git --git-dir={self.tree} --work-tree={ROOT} -c user.name=x -c user.email=x"
        for words in ("init -q", "add -A", "commit -qm x"):  # what is not ignored, as a commit would have it
            finished(*git.split(), *words.split(), cwd=folder)

    def env(self) -> dict[str, str]:
        """`yours` is active."""
        return {"PATH": f"{self.yours / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable}

    def type(self, line: str) -> None:
        """A line of README."""
        for command in re.sub(r"\s+#.*", "", line).split(" && "):
            if command.startswith("cd "):
                self.here /= command[3:]
            elif command.startswith("make "):
                for wanted in finished("make", "-n", command[5:], cwd=self.here, **self.env()).splitlines():
                    self.run(wanted)
            else:
                self.run(command)

    def run(self, command: str) -> None:
        """A command, made small."""
        plain = command.replace(sys.executable, "python").removeprefix(".venv/bin/")
        more = next((more for begin, more in MORE.items() if plain.startswith(begin)), None)
        assert more is not None, f"README has a new command, {command!r}: say in MORE how it is made small"
        typed = f"{command.replace('REPOSITORY', str(self.tree))} {more}"
        if plain.startswith("dumo demo"):
            self.look(typed)
        else:
            finished("bash", "-c", typed, cwd=self.here, **self.env())
        if plain.endswith("-m venv .venv"):
            link(self.here / ".venv")

    def look(self, typed: str) -> None:
        """Open the page that a command serves, then press Ctrl-C."""
        words, env = shlex.split(typed), ENVIRONMENT | self.env()
        with subprocess.Popen(words, cwd=self.here, env=env, stdout=subprocess.PIPE, text=True) as served:
            try:
                said = iter(served.stdout or ())
                address = next((found[0] for line in said if (found := re.search(r"http://[\d.]+:\d+", line))), "")
                assert urllib.request.urlopen(address).status == 200
            finally:
                served.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Person:
    """With an empty folder."""
    return Person(tmp_path_factory.mktemp("readme"))


def test_a_line_that_cannot_be_typed_fails(person: Person) -> None:
    for line, said in {"dumo trian digits": "new command", "dumo show digits-none": "digits-none"}.items():
        with pytest.raises(AssertionError, match=said):
            person.type(line)
    with pytest.raises(AssertionError, match=r"socket\.getaddrinfo"):
        finished(
            "python", "-c", "import urllib.request as r; r.urlopen('http://x.org')", cwd=person.here, **person.env()
        )


@pytest.mark.usefixtures("default_signals")
def test_every_line_can_be_typed(person: Person) -> None:
    folder = person.here
    for line in blocks("sh").splitlines():
        if line.startswith("dumo train photos"):
            photos(person.here / "photos")
        person.type(line)
    finished("python", "-c", blocks("python"), cwd=person.here, **person.env())
    pages = {"runs/dumo-best/report.html", "runs/photos/report.html", "runs/reproduce/fig3-smoke/fig3.png", "three.png"}
    assert {name for name in pages if (person.here / name).is_file()} == pages
    for venv, code in ((person.here / ".venv", person.here / "src"), (person.yours, person.yours)):
        assert Path(finished(venv / "bin/python", "-c", WHERE, cwd=folder).strip()).is_relative_to(code)


def test_lines_of_the_pages_that_install(person: Person) -> None:
    """Each is typed in the clone; pip only warns of an extra that is not there."""
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md" and path.parent.name != "adr"]
    texts = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    lines = {line.strip() for line in re.findall(r"(?<!uv )pip install [^`#|&\n]+", texts)}
    assert len(lines) > 5
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for line in lines:
        assert {*re.findall(r"\[(\w+)\]", line)} <= extras.keys(), line
        finished("bash", "-c", f"{line} --dry-run", cwd=ROOT, **person.env())
