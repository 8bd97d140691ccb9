"""What is installed with dumo: known vulnerabilities, by pip-audit, licences, and the versions in constraints.txt.

    python tools/audit.py [options of pip-audit]
    python tools/audit.py --write

Exit code 1 where a version has a known vulnerability; 0 where none has, and where nobody could be asked, which it says.
`--write` writes constraints.txt anew: every package that dumo and its extras bring here, at
its version.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
FILE = PROJECT.with_name("constraints.txt")
AWAY = re.compile(r"ConnectionError|ConnectTimeout|ReadTimeout|Could not connect|NameResolutionError|ServiceError")
LINE = re.compile(r"^([\w.-]+)==(\S+)(.*)$")
OWN = ("pip", "setuptools")  # of an environment: constraints would exchange the one that reads them
LONGEST = 60  # characters of a licence: some packages give its whole text


def packages(project: Path = PROJECT) -> dict[str, metadata.Distribution]:
    """What is installed here of all that a project and its extras bring, by name."""
    needs = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    lines = [*needs["dependencies"], *(line for extra in needs["optional-dependencies"].values() for line in extra)]
    todo = [(need, "") for need in map(Requirement, lines) if need.name != needs["name"]]
    found, seen = dict[str, metadata.Distribution](), set[tuple[str, str]]()
    while todo:
        need, extra = todo.pop()
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        for name in {(canonicalize_name(need.name), more) for more in ("", *need.extras)} - seen:
            seen.add(name)
            with suppress(metadata.PackageNotFoundError):  # of another platform
                one = found[name[0]] = metadata.distribution(name[0])
                todo += [(Requirement(line), name[1]) for line in one.requires or ()]
    return {name: one for name, one in sorted(found.items()) if name not in OWN}


def pinned(text: str) -> dict[str, str]:
    """The lines of a file of constraints, by package."""
    return {canonicalize_name(found[1]): line for line in text.splitlines() if (found := LINE.match(line))}


def written(text: str, here: dict[str, str]) -> str:
    """A file of constraints with the versions that are here; its remarks, and what is not here, stay."""
    head = [line for line in text.splitlines() if line.startswith("#")]
    lines = pinned(text) | {
        name: f"{name}=={version}{found[3] if (found := LINE.match(pinned(text).get(name, ''))) else ''}"
        for name, version in here.items()
    }
    return "\n".join([*head, *(lines[name] for name in sorted(lines))]) + "\n"


def licence(of: metadata.Distribution) -> str:
    """Its name, as the package gives it."""
    said = [
        line.rpartition(" :: ")[2] for line in of.metadata.get_all("Classifier", []) if line.startswith("License ::")
    ]
    text = of.metadata.get("License-Expression") or ", ".join(said) or of.metadata.get("License") or "not said"
    return text.strip().splitlines()[0][:LONGEST]


def licences(found: dict[str, metadata.Distribution]) -> Iterator[str]:
    """A line for each licence, with the packages under it."""
    under = defaultdict[str, list[str]](list)
    for name, one in found.items():
        under[licence(one)].append(name)
    for name in sorted(under, key=str.lower):
        yield f"{name}: {', '.join(under[name])}"


def verdict(code: int, out: str, err: str) -> tuple[int, str]:
    """The exit code and the words for what pip-audit said."""
    try:
        every = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if AWAY.search(err):
            return 0, f"not audited, nobody could be asked: {err.strip().splitlines()[-1][:200]}"
        return code or 1, f"pip-audit failed: {err.strip()[-2000:]}"
    asked = [one for one in every if "skip_reason" not in one]
    bad = [
        f"{one['name']} {one['version']}: {bug['id']}, mended in {', '.join(bug['fix_versions']) or 'no version'}"
        for one in asked
        for bug in one["vulns"]
    ]
    if not asked:
        return 0, f"not audited, the service knows none of {len(every)} packages: {every[0]['skip_reason']}"
    skipped = f"; the service does not know {len(every) - len(asked)} others" * (len(asked) < len(every))
    return (1 if bad else 0), "\n".join([*bad, f"{len(bad)} known vulnerabilities in {len(asked)} packages{skipped}"])


def main(options: Sequence[str], file: Path = FILE) -> int:
    """The exit code."""
    found = packages()
    if "--write" in options:
        here = {name: one.version.partition("+")[0] for name, one in found.items()}  # a build's name is not its version
        file.write_text(written(file.read_text(encoding="utf-8"), here), encoding="utf-8")
        return 0
    print(*licences(found), sep="\n")
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip_audit",
        "--requirement",
        str(file),
        "--no-deps",
        "--disable-pip",
        "-f",
        "json",
    ]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", *options], capture_output=True, text=True, check=False
    )
    code, said = verdict(done.returncode, done.stdout, done.stderr)
    print(f"\n{said}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
