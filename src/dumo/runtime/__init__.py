"""What a process is among others and on its machine: ranks, signals, memory, progress, random numbers by key."""

from importlib import metadata


def version() -> str:
    """This package's version; "source" where it is not installed."""
    try:
        return metadata.version("dumo")
    except metadata.PackageNotFoundError:
        return "source"
