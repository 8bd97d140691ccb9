"""A folder with modules that must not be imported from it: each that is leaves word."""

from pathlib import Path

NAMES = ("hashlib", "json", "pickle", "random", "socket", "tempfile")


def lay(folder: Path) -> None:
    """Modules under names of the standard library."""
    for name in NAMES:
        code = f"from pathlib import Path\n(Path(__file__).parent / 'imported-{name}').touch()\n"
        (folder / f"{name}.py").write_text(code, encoding="utf-8")


def sprung(folder: Path) -> list[str]:
    """Which of them were imported."""
    return sorted(path.name for path in folder.glob("imported-*"))
