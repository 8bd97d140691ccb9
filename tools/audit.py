"""What is installed with dumo: licences, known vulnerabilities by pip-audit, and the versions in constraints.txt.

    python tools/audit.py [options of pip-audit]
    python tools/audit.py --write

The first prints a line for each licence, and then what pip-audit finds of constraints.txt. The exit code is 1 where a
version has a known vulnerability; 0 where none has, and where nobody could be asked, which it says. `--write` writes
constraints.txt anew: every package that dumo and its extras bring here, at its version.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
CONSTRAINTS = PROJECT.with_name("constraints.txt")
# what pip-audit prints where it has no network
UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|Could not connect|NameResolutionError|ServiceError"
)
CONSTRAINT = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?P<remark>.*)$")  # a line of constraints.txt
UNPINNED = ("pip", "setuptools")  # constraints would exchange the pip that reads them
MAX_LICENCE_CHARACTERS = 60  # some packages give the whole text

Packages = dict[str, metadata.Distribution]  # by name


def installed_packages(project: Path = PROJECT) -> Packages:
    """All that a project and its extras bring, as far as it is installed here, in the order of their names."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    lines = list(table["dependencies"])
    for extra_lines in table["optional-dependencies"].values():
        lines += extra_lines
    requirements = [Requirement(line) for line in lines]
    # requirements to follow, each with the extra of the package that has it; "": it has it without an extra
    pending = [(requirement, "") for requirement in requirements if requirement.name != table["name"]]
    packages: Packages = {}
    followed: set[tuple[str, str]] = set()  # package and extra
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for package_extra in ("", *requirement.extras):
            if (name, package_extra) in followed:
                continue
            followed.add((name, package_extra))
            try:
                package = metadata.distribution(name)
            except metadata.PackageNotFoundError:  # of another platform
                continue
            packages[name] = package
            pending += [(Requirement(line), package_extra) for line in package.requires or ()]
    return {name: packages[name] for name in sorted(packages) if name not in UNPINNED}


def constraint_lines(text: str) -> dict[str, str]:
    """The lines of a file of constraints, by package."""
    lines: dict[str, str] = {}
    for line in text.splitlines():
        match = CONSTRAINT.match(line)
        if match:
            lines[canonicalize_name(match["name"])] = line
    return lines


def update_constraints(text: str, versions: Mapping[str, str]) -> str:
    """A file of constraints with these versions; its comments, its remarks and all other packages stay."""
    comments = [line for line in text.splitlines() if line.startswith("#")]
    lines = constraint_lines(text)
    for name, version in versions.items():
        match = CONSTRAINT.match(lines.get(name, ""))
        remark = match["remark"] if match else ""
        lines[name] = f"{name}=={version}{remark}"
    return "\n".join([*comments, *(lines[name] for name in sorted(lines))]) + "\n"


def licence(package: metadata.Distribution) -> str:
    """The name of a package's licence, as the package gives it."""
    names: list[str] = []
    for classifier in package.metadata.get_all("Classifier", []):
        if classifier.startswith("License ::"):
            names.append(classifier.rpartition(" :: ")[2])
    expression = package.metadata.get("License-Expression")
    text = expression or ", ".join(names) or package.metadata.get("License") or "not said"
    return text.strip().splitlines()[0][:MAX_LICENCE_CHARACTERS]


def licence_lines(packages: Packages) -> Iterator[str]:
    """A line for each licence, with the packages under it."""
    names_by_licence = defaultdict[str, list[str]](list)
    for name, package in packages.items():
        names_by_licence[licence(package)].append(name)
    for name in sorted(names_by_licence, key=str.lower):
        yield f"{name}: {', '.join(names_by_licence[name])}"


def verdict(code: int, out: str, err: str) -> tuple[int, str]:
    """The exit code and the text for what pip-audit answered: its own exit code, stdout and stderr."""
    try:
        entries = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if UNREACHABLE.search(err):
            return 0, f"not audited, nobody could be asked: {err.strip().splitlines()[-1][:200]}"
        return code or 1, f"pip-audit failed: {err.strip()[-2000:]}"
    audited = [entry for entry in entries if "skip_reason" not in entry]
    if not audited:
        return 0, f"not audited, the service knows none of {len(entries)} packages: {entries[0]['skip_reason']}"
    lines: list[str] = []
    for entry in audited:
        for vulnerability in entry["vulns"]:
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
            lines.append(f"{entry['name']} {entry['version']}: {vulnerability['id']}, mended in {fixed}")
    summary = f"{len(lines)} known vulnerabilities in {len(audited)} packages"
    if len(audited) < len(entries):
        summary += f"; the service does not know {len(entries) - len(audited)} others"
    return int(len(lines) > 0), "\n".join([*lines, summary])


def main(options: Sequence[str], constraints: Path = CONSTRAINTS) -> int:
    """Write the constraints, or print licences and vulnerabilities; return the exit code."""
    packages = installed_packages()
    if "--write" in options:
        # the part behind + names a build, such as cpu, and is no part of the version
        versions = {name: package.version.partition("+")[0] for name, package in packages.items()}
        text = constraints.read_text(encoding="utf-8")
        constraints.write_text(update_constraints(text, versions), encoding="utf-8")
        return 0
    for line in licence_lines(packages):
        print(line)
    command = [sys.executable, "-P", "-m", "pip_audit", "--requirement", str(constraints), "--no-deps", "--disable-pip"]
    command += ["-f", "json", "--progress-spinner", "off", *options]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    code, text = verdict(process.returncode, process.stdout, process.stderr)
    print(f"\n{text}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
