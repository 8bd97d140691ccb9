"""A process among others and on its machine: ranks, devices, signals, memory, progress, random numbers by key.

Touches signals, threads and groups of ranks. Knows no file and no run.

This file is about what is installed: `version` and `installed_version` of packages; `import_extra`, `require_package`
and `package_problem` of optional ones; `packages_by_extra` and `install_command` for messages; `import_bitsandbytes`.
`shell_path` writes a path for a command line. Importing it imports no torch.
"""

import logging
import re
import shlex
import shutil
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from dumo.error import UserError

PACKAGE = Path(__file__).parents[1]  # the folder of dumo itself


def shell_path(place: str | Path) -> str:
    """A path as one types it after a command: quoted, and with ./ before it where it would be taken for something else.

    That is an option (it begins with a dash), and, of a Path, the name of a recipe or trained run that comes with dumo.
    A text is taken as somebody typed it, so it may be such a name.
    """
    text = str(place)
    is_packaged = (PACKAGE / "recipes" / f"{text}.yaml").exists() or (PACKAGE / "trained" / text).exists()
    is_bare_path = isinstance(place, Path) and place.parts == (place.name,)
    if text.startswith("-") or (is_bare_path and is_packaged):
        text = f"./{text}"
    return shlex.quote(text)


def version() -> str:
    """This package's version; "source" where it is not installed."""
    return installed_version("dumo") or "source"


def installed_version(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_extra(package: str, extra: str, subject: str) -> Any:  # noqa: ANN401, a module
    """Import a package of an extra of dumo, which may be slow.

    Raises UserError, which begins with `subject`, as `require_package` does, and where the import fails.
    """
    require_package(package, extra, subject)
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(f"{subject} needs {package}, whose import failed: {error}") from error


def require_package(package: str, extra: str, subject: str) -> None:
    """Raise UserError, which begins with `subject`, where a package of an extra is missing, or of another version."""
    problem = package_problem(package, extra)
    if problem:
        raise UserError(f"{subject} needs {problem}: {install_command(extra)}")


def package_problem(package: str, extra: str) -> str:
    """What to install of an extra's package, as a message names it; "" where a version that fits is there."""
    from packaging.requirements import Requirement  # slow to import

    version = installed_version(package)
    if version is None:
        return package
    for text in packages_by_extra().get(extra, []):
        requirement = Requirement(text)
        if requirement.name == package and not requirement.specifier.contains(version, prereleases=True):
            return f"{package}{requirement.specifier} ({version} is installed)"
    return ""


def packages_by_extra() -> dict[str, list[str]]:
    """The packages of each extra of dumo, as `pip` takes them; {} where dumo runs from its sources, not installed."""
    try:
        requirements = metadata.requires("dumo") or []
    except metadata.PackageNotFoundError:
        requirements = []
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        extra = re.search(r"\bextra == ['\"]([\w.-]+)['\"]", marker)
        if extra:
            packages.setdefault(extra[1], []).append(package.strip())
    return packages


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra of dumo, or one package, into this environment.

    It uses the environment's own pip, `python -m pip`, or uv, whichever is there.
    """
    python = shlex.quote(sys.executable)
    pip = shutil.which("pip")
    if pip and Path(pip).parent == Path(sys.executable).parent:
        tool = "pip install"
    elif installed_version("pip"):
        tool = f"{python} -m pip install"
    else:  # as in an environment that uv made
        tool = f"uv pip install --python {python}"
    return f"{tool} {shlex.join(packages_by_extra().get(extra, [extra]))}"


def import_bitsandbytes() -> None:
    """Import bitsandbytes without its search for kernels on a hub, where it is installed.

    The search needs the network. bitsandbytes makes it where the package `kernels` is installed, else logs an error:
    so that package is hidden, and the log is quiet, while it is imported. Call this before diffusers or peft
    are imported, which import it.
    """
    if not installed_version("bitsandbytes"):
        return
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    kernels_before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType], so that it is not found
    try:
        import bitsandbytes  # pyright: ignore[reportUnusedImport]  # noqa: F401
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if kernels_before is not None:
            sys.modules["kernels"] = kernels_before
