"""What a release checks, builds and tries; .github/workflows/release.yml calls it, and so can a person.

    python tools/release.py check VERSION      # of pyproject.toml and CITATION.cff, with a section of CHANGELOG.md
    python tools/release.py notes VERSION      # that section
    python tools/release.py build FOLDER       # the sdist and, from it, the wheel; both as PyPI wants them
    python tools/release.py install WHEEL VENV # into a new environment, where it trains for a moment

The exit code is 1 where a check fails, with a line for each.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
VERSION = re.compile(r"\d+\.\d+\.\d+")
TINY = ("net.width=32", "net.depth=1", "train.batch=16", "train.steps=20", "evaluate.protocol.samples=500")


def notes(version: str, root: Path = ROOT) -> str:
    """The text below the heading `## [VERSION] - YYYY-MM-DD` of CHANGELOG.md; empty if it has none."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)"
    found = re.search(heading, text, re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else ""


def faults(version: str, root: Path = ROOT) -> Iterator[str]:
    """What keeps this tree from being released as a version."""
    if not VERSION.fullmatch(version):
        yield f"{version!r} is no version: write it as 1.2.3"
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    for file, there in {"pyproject.toml": project, "CITATION.cff": citation and citation[1]}.items():
        if there != version:
            yield f"{file} has version {there}, not {version}"
    if not notes(version, root):
        yield f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD', or an empty one"


def run(*words: object, cwd: Path | None = None) -> None:
    """A command, which must end well; it finds dumo where it is installed, not in a clone."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*map(str, words)], cwd=cwd, env=env, check=True)


def build(folder: Path) -> Path:
    """Build both into an empty folder and let twine check them; the wheel's path."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    run(sys.executable, "-P", "-m", "twine", "check", "--strict", *folder.iterdir())
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, venv: Path, here: Path) -> None:
    """Install a wheel into an environment, a new one unless it is there, and train, sample and evaluate in a folder."""
    programs = venv.absolute() / "bin"
    if not programs.exists():
        run(sys.executable, "-P", "-m", "venv", venv)
    run(programs / "python", "-P", "-m", "pip", "install", "--quiet", wheel)
    tiny = [word for field in TINY for word in ("--set", field)]
    for words in (["--version"], ["train", "digits", *tiny], ["sample", "runs/digits"], ["evaluate", "runs/digits"]):
        run(programs / "dumo", *words, cwd=here)


def main(*words: str) -> int:
    """The exit code."""
    match words:
        case "check", version:
            found = list(faults(version))
            print("\n".join(found) or f"{version} can be released")
            return int(bool(found))
        case "notes", version:
            print(notes(version))
        case "build", folder:
            print(build(Path(folder)))
        case "install", wheel, venv:
            with TemporaryDirectory() as here:
                install(Path(wheel), Path(venv), Path(here))
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
