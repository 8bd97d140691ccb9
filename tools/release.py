"""Check and prepare a release; .github/workflows/release.yml then builds, tries and publishes it.

    python tools/release.py check VERSION             # that files agree, and CHANGELOG.md has a section of it
    python tools/release.py stamp VERSION OWNER/NAME  # write today's date, and links that work on PyPI
    python tools/release.py notes VERSION             # print the section of CHANGELOG.md

`stamp` changes files of this tree, which the workflow throws away afterwards.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A section's date until its version is out.
UNRELEASED = "unreleased"
RELATIVE_LINK = re.compile(r"(?P<words>(?P<picture>!?)\[[^\]]*\]\()(?!\w+:|#)(?P<path>[^)]+)\)")


def notes(version: str, root: Path = ROOT) -> str:
    """The text below the heading of a version in CHANGELOG.md, with a date or `unreleased`; empty if it has none."""
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = rf"^## \[{re.escape(version)}\] - (?:\d{{4}}-\d\d-\d\d|{UNRELEASED})\n(.*?)(?=^## |\Z)"
    match = re.search(section, changelog, re.DOTALL | re.MULTILINE)
    return match[1].strip() if match else ""


def faults(version: str, root: Path = ROOT) -> Iterator[str]:
    """What keeps this tree from being released as a version."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if project["version"] != version:
        yield f"pyproject.toml has version {project['version']}, not {version}"
    if f"\nversion: {version}\n" not in "\n" + (root / "CITATION.cff").read_text(encoding="utf-8"):
        yield f"CITATION.cff does not have version {version}"
    if not notes(version, root):
        yield f"CHANGELOG.md has no section '## [{version}] - {UNRELEASED}', or an empty one"


def stamp(version: str, repository: str, root: Path = ROOT) -> None:
    """Write what only a release knows: its date, and addresses in place of paths, since PyPI shows README.md alone.

    `repository` is OWNER/NAME on GitHub.
    """
    address = f"https://github.com/{repository}"
    raw_address = f"https://raw.githubusercontent.com/{repository}"

    def with_address(link: re.Match[str]) -> str:
        place = f"{raw_address}/v{version}" if link["picture"] else f"{address}/blob/v{version}"
        return f"{link['words']}{place}/{link['path']})"

    today = datetime.now(UTC).date().isoformat()
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    text = text.replace(f"## [{version}] - {UNRELEASED}\n", f"## [{version}] - {today}\n")
    changelog.write_text(RELATIVE_LINK.sub(with_address, text), encoding="utf-8")

    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8").replace(" Replace REPOSITORY with the URL of this repository.", "")
    text = RELATIVE_LINK.sub(with_address, text).replace("REPOSITORY", address)
    text = text.replace("pip install .\n", "pip install dumo\n").replace("pip install '.[", "pip install 'dumo[")
    readme.write_text(text, encoding="utf-8")

    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    text = text.replace("[project.scripts]\n", f'[project.urls]\nRepository = "{address}"\n\n[project.scripts]\n')
    project.write_text(text, encoding="utf-8")


def main(*words: str) -> str | None:
    """Do what the words say, as the head of this file has them; return what is wrong."""
    match words:
        case "check", version:
            return "\n".join(faults(version)) or None
        case "stamp", version, repository:
            stamp(version, repository)
        case "notes", version:
            print(notes(version))
        case _:
            return __doc__
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
