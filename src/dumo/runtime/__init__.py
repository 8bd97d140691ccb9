"""The runtime of a process: ranks, devices, signals, memory, progress and keyed random numbers.

This file deals with installed packages: `version` of dumo, `installed_version`, `require` for an optional package, and
`import_bitsandbytes`. `shell_path` quotes a path for a command line. Importing this module does not import torch.
"""

import logging
import shlex
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from dumo.error import UserError

PACKAGE = Path(__file__).parents[1]  # the folder of dumo itself


def shell_path(place: str | Path) -> str:
    """Quote a path for a command line, and prefix it with ./ if it would be ambiguous.

    It is ambiguous if it begins with a dash, or if it is a Path that equals the name of a recipe or trained run that
    ships with dumo. A string is as a user typed it, so it may be such a name.
    """
    text = str(place)
    is_packaged = (PACKAGE / "recipes" / f"{text}.yaml").exists() or (PACKAGE / "trained" / text).exists()
    is_bare_path = isinstance(place, Path) and place.parts == (place.name,)
    if text.startswith("-") or (is_bare_path and is_packaged):
        text = f"./{text}"
    return shlex.quote(text)


def version() -> str:
    """Return the version of dumo, or "source" if it is not installed."""
    return installed_version("dumo") or "source"


def installed_version(name: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def require(package: str, extra: str, subject: str) -> Any:  # noqa: ANN401, a module
    """Import an optional package, which belongs to an extra of dumo.

    Raises UserError, which begins with `subject`, if the package is missing or the extra does not allow its version,
    because another version may silently compute different results.
    """
    from packaging.requirements import Requirement  # slow to import

    try:
        declared = [Requirement(text) for text in metadata.requires("dumo") or []]
    except metadata.PackageNotFoundError:  # dumo runs from its sources
        declared = []
    packages = [one for one in declared if one.marker and one.marker.evaluate({"extra": extra})]
    installed = installed_version(package)
    problem = "" if installed else f"{package}, which is not installed"
    for one in packages:
        if one.name == package and installed and not one.specifier.contains(installed, prereleases=True):
            problem = f"{package}{one.specifier}, and {installed} is installed"
    if problem:
        names = shlex.join(f"{one.name}{one.specifier}" for one in packages) or package
        raise UserError(f"{subject} needs {problem}: pip install {names}")
    return import_module(package)


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, without its search for kernels on the Hub.

    The search needs the network. bitsandbytes searches if the package `kernels` is installed, and otherwise logs an
    error. So that package is hidden, and the log silenced, during the import. Call this before importing diffusers or
    peft, which import bitsandbytes.
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
