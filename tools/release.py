"""What a release checks, builds and tries; .github/workflows/release.yml calls it, and so can a person.

    python tools/release.py check VERSION      # of pyproject.toml and CITATION.cff, with a section of CHANGELOG.md
    python tools/release.py notes VERSION      # that section
    python tools/release.py stamp VERSION REPOSITORY # today's date and the address, for PyPI; REPOSITORY is OWNER/NAME
    python tools/release.py build FOLDER       # the sdist and, from it, the wheel; both as PyPI wants them
    python tools/release.py install WHEEL VENV # into a new environment, where it trains for a moment

The exit code is 1 where a check fails, with a line for each. `stamp` changes files of this tree, which the workflow
throws away: what is released has a date and links that work on PyPI, and git keeps neither.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
VERSION = re.compile(r"\d+\.\d+\.\d+")
UNRELEASED = "unreleased"  # a section's date until its version is out
RELATIVE_LINK = re.compile(r"(?P<words>(?P<picture>!?)\[[^\]]*\]\()(?!\w+:|#)(?P<path>[^)]+)\)")
TINY = ("net.width=32", "net.depth=1", "train.batch=16", "train.steps=20", "evaluate.protocol.samples=500")


def notes(version: str, root: Path = ROOT) -> str:
    """The text below the heading of a version in CHANGELOG.md, with a date or `unreleased`; empty if it has none."""
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = rf"^## \[{re.escape(version)}\] - (?:\d{{4}}-\d\d-\d\d|{UNRELEASED})\n(.*?)(?=^## |\Z)"
    match = re.search(section, changelog, re.DOTALL | re.MULTILINE)
    return match[1].strip() if match else ""


def faults(version: str, root: Path = ROOT) -> Iterator[str]:
    """What keeps this tree from being released as a version."""
    if not VERSION.fullmatch(version):
        yield f"{version!r} is no version: write it as 1.2.3"
    project_version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    citation_version = citation[1] if citation else None
    for file, file_version in (("pyproject.toml", project_version), ("CITATION.cff", citation_version)):
        if file_version != version:
            yield f"{file} has version {file_version}, not {version}"
    if not notes(version, root):
        yield f"CHANGELOG.md has no section '## [{version}] - {UNRELEASED}', or an empty one"


def stamp(version: str, repository: str, root: Path = ROOT) -> None:
    """Write what only a release knows: its date, and the address that the pages of PyPI and of the release lead to.

    `repository` is OWNER/NAME on GitHub. CHANGELOG.md gets today's date, it and README.md addresses instead of paths,
    and pyproject.toml the repository's. pip installs by name what README.md installs from a clone.
    """
    address = f"https://github.com/{repository}"
    raw_address = f"https://raw.githubusercontent.com/{repository}"

    def with_address(link: re.Match[str]) -> str:
        place = f"{raw_address}/v{version}" if link["picture"] else f"{address}/blob/v{version}"
        return f"{link['words']}{place}/{link['path']})"

    changelog = root / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    today = datetime.now(UTC).date().isoformat()
    text = text.replace(f"## [{version}] - {UNRELEASED}\n", f"## [{version}] - {today}\n")
    changelog.write_text(RELATIVE_LINK.sub(with_address, text), encoding="utf-8")

    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8").replace(" REPOSITORY is this page's address.", "")
    text = RELATIVE_LINK.sub(with_address, text).replace("REPOSITORY", address)
    text = text.replace("pip install .\n", "pip install dumo\n").replace("pip install '.[", "pip install 'dumo[")
    readme.write_text(text, encoding="utf-8")

    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    text = text.replace("[project.scripts]\n", f'[project.urls]\nRepository = "{address}"\n\n[project.scripts]\n')
    project.write_text(text, encoding="utf-8")


def run(*words: object, cwd: Path | None = None) -> None:
    """Run a command, which must end well. It finds dumo where it is installed, not in a clone."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*map(str, words)], cwd=cwd, env=env, check=True)


def build(folder: Path) -> Path:
    """Build sdist and wheel into an empty folder and let twine check them; return the wheel's path."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    run(sys.executable, "-P", "-m", "twine", "check", "--strict", *folder.iterdir())
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, venv: Path, folder: Path) -> None:
    """Install a wheel into an environment, and train, sample and evaluate by it in a folder.

    The environment is made where it does not exist.
    """
    programs = venv.absolute() / "bin"
    if not programs.exists():
        run(sys.executable, "-P", "-m", "venv", venv)
    run(programs / "python", "-P", "-m", "pip", "install", "--quiet", wheel)
    tiny = [word for field in TINY for word in ("--set", field)]
    for words in (["--version"], ["train", "digits", *tiny], ["sample", "runs/digits"], ["evaluate", "runs/digits"]):
        run(programs / "dumo", *words, cwd=folder)


def main(*words: str) -> int:
    """Do what the words say, as the head of this file has them; return the exit code."""
    match words:
        case "check", version:
            lines = list(faults(version))
            print("\n".join(lines) or f"{version} can be released")
            return int(bool(lines))
        case "notes", version:
            print(notes(version))
        case "stamp", version, repository:
            stamp(version, repository)
        case "build", folder:
            print(build(Path(folder)))
        case "install", wheel, venv:
            with TemporaryDirectory() as folder:
                install(Path(wheel), Path(venv), Path(folder))
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
