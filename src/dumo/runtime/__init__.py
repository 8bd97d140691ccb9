"""A process among others and on its machine: ranks, devices, signals, memory, progress, random numbers by key.

Touches signals, threads and groups of ranks. Knows no file and no run.
"""

import logging
import re
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shell_path(place: str | Path) -> str:
    """A path as it is typed after a command: quoted, and not as an option where it begins with a dash.

    Nor is a Path typed as the bare name of a recipe or a trained run that dumo brings; a text is as somebody typed it.
    """
    text = str(place)
    is_packaged = (PACKAGE / "recipes" / f"{text}.yaml").exists() or (PACKAGE / "trained" / text).exists()
    is_bare_path = isinstance(place, Path) and place.parts == (place.name,)
    if text.startswith("-") or (is_bare_path and is_packaged):
        text = f"./{text}"
    return shlex.quote(text)


def version() -> str:
    """This package's version; "source" where it is not installed."""
    return installed("dumo") or "source"


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, list[str]]:
    """The packages of each extra, as `pip` takes them; none where dumo runs from its sources, not installed."""
    try:
        requirements = metadata.requires("dumo") or []
    except metadata.PackageNotFoundError:
        requirements = []
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        package, _, marker = requirement.partition(";")
        if match := re.search(r"\bextra == ['\"]([\w.-]+)['\"]", marker):
            packages.setdefault(match[1], []).append(package.strip())
    return packages


def install(extra: str) -> str:
    """The command that installs an extra's packages, or a package, into this environment, however dumo came into it."""
    python = shlex.quote(sys.executable)
    pip = shutil.which("pip")
    if pip and Path(pip).parent == Path(sys.executable).parent:
        tool = "pip install"
    elif installed("pip"):
        tool = f"{python} -m pip install"
    else:  # as in an environment that uv made
        tool = f"uv pip install --python {python}"
    return f"{tool} {shlex.join(extras().get(extra, [extra]))}"


def import_bitsandbytes() -> bool:
    """Import bitsandbytes without its search for kernels on a hub, which needs the network; False: it is missing.

    It searches where the package `kernels` is installed, and complains where it is not. Call this before diffusers or
    peft are imported, which import it.
    """
    if not installed("bitsandbytes"):
        return False
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType], so that it is not found
    try:
        import bitsandbytes  # pyright: ignore[reportUnusedImport]  # noqa: F401
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
    return True
