"""Reports of measurements, to read: torch is not needed for that."""

from collections.abc import Iterator
from typing import Any


def title(report: dict[str, Any]) -> str:
    """What was measured, and on what."""
    shape, size = " x ".join(map(str, report["shape"])), f"{report['parameters'] / 1e6:.4g} M parameters"
    where = f"{report['machine']}, {report['threads']} threads, {report['rounds']} rounds"
    return f"{size}, {report['batch']} samples of {shape} at a time, on {where}"


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of the bench of training steps; what is not known is left empty."""

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return "" if row[key] is None else format(scale * row[key], form)

    return {
        "slope": row["slope"],
        "precision": row["precision"],
        "compiled": row["compile"],
        "way": "refused" if row["refused"] else row["way"] or "",
        "F counted": cell("units_counted", ".2f"),
        "F by time": cell("units_timed", ".2f"),
        "quartiles": f"{cell('units_low', '.2f')}-{cell('units_high', '.2f')}".strip("-"),
        "ms": cell("milliseconds", ".4g"),
        "images/s": cell("images_per_second", ".4g"),
        "MB": cell("bytes", ".1f", 1e-6),
        "x central": cell("bytes_over_central", ".2f"),
        "% of peak": cell("share_of_peak", ".1f", 1e2),
        "du/dt off": cell("error", ".1e"),
    }


def notes(report: dict[str, Any]) -> Iterator[str]:
    """Why training would refuse what it would."""
    return (f"{row['slope']} in {row['precision']}: {row['refused']}" for row in report["rows"] if row["refused"])
