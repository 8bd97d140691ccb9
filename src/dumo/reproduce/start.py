"""Cells that begin from others of their plan, by whose names they know them, and are made after these."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dumo.config.spec import Run
from dumo.progress import Bar
from dumo.reproduce.plan import Cell, Finished, alike, finish_all


def begins(cell: str, heads: Mapping[str, str]) -> str:
    """A start from the run of a cell, with heads that begin as others of it, as a setting."""
    return f"start={json.dumps({'kind': 'run', 'source': cell, 'heads': heads})}"


def finish(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Finished]:
    """Every cell after those that it begins from, which are among them. Raises UserError as `finish_all`."""
    done: dict[str, Finished] = {}
    while left := [cell for cell in cells if cell.name not in done]:
        ready = [cell for cell in left if sources(cell.spec) <= {*done}]
        assert ready, [cell.name for cell in left]
        begun = [replace(cell, spec=found(cell.spec, done)) for cell in ready]
        done |= {one.cell.name: one for one in finish_all(begun, folder, jobs=jobs, device=device, bar=bar)}
    alike([*done.values()])
    return [done[cell.name] for cell in cells]


def sources(spec: Run) -> set[str]:
    """The cells that a run begins from or is taught by."""
    return {of.source for of in (spec.start, spec.teacher) if of}


def found(spec: Run, done: Mapping[str, Finished]) -> Run:
    """The run with the folders of these in the place of their names."""
    update = {
        name: of.model_copy(update={"source": str(done[of.source].opened.folder)})
        for name in ("start", "teacher")
        if (of := getattr(spec, name))
    }
    return spec.model_copy(update=update)
