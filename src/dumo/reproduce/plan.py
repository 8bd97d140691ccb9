"""A plan: the cells that a figure or table needs, each trained and judged once, and how they are set out.

A cell is a run in a folder named after a hash of what trains it: one that is finished is not run again, one that was
stopped goes on, one whose recipe has changed starts anew.
"""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from statistics import stdev
from typing import Any

import torch

from dumo import dist, encode, run
from dumo.config.spec import Run
from dumo.data import Latents
from dumo.judge import card
from dumo.judge.evaluation import evaluate, standing
from dumo.run import Trained
from dumo.train import cost
from dumo.watch import Watch

SCALES = ("smoke", "laptop")


@dataclass(frozen=True)
class Cell:
    """One run of a plan: what it is called, its spec, and what it stands for in the table."""

    name: str
    spec: Run
    labels: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Finished:
    """A cell, trained and judged."""

    cell: Cell
    trained: Trained
    report: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What a figure or table needs, and how it is set out."""

    title: str
    cells: Callable[[str], Iterator[Cell]]  # by scale
    table: Callable[[list[Finished]], list[dict[str, Any]]]
    draw: Callable[[list[Finished], Path], list[Path]] = lambda done, folder: []  # most plans have pictures


def finish(cell: Cell, cells: Path, *, device: str, watch: Watch) -> Finished:
    """Train and judge a cell, or take what is there of it; latents are encoded before."""
    trained_by = cell.spec.model_dump_json(exclude={"about", "sample", "evaluate"})
    folder = cells / f"{cell.name}-{blake2b(trained_by.encode(), digest_size=4).hexdigest()}"
    if isinstance(cell.spec.data, Latents):
        encode.ensure(cell.spec.data, device=device, watch=watch)
    run.train(cell.spec, folder, device=device, watch=watch)
    trained = run.open_run(str(folder), device=device)
    return Finished(cell, trained, standing(trained) or evaluate(trained, watch=watch))


def alike(done: Sequence[Finished]) -> None:
    """Refuse cells of one protocol that were not measured alike. Raises UserError with what differs."""
    for kind in dict.fromkeys(one.cell.spec.evaluate.protocol.kind for one in done):
        same = [one for one in done if one.cell.spec.evaluate.protocol.kind == kind]
        card.alike({one.cell.name: one.report["card"] for one in same})


def origin(command: str) -> dict[str, Any]:
    """Where and when results were made."""
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": dist.versions(),
    }


def markdown(title: str, table: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    head = list(table[0])
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in table]
    lines = [head, ["---"] * len(head), *rows]
    return f"# {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def units(spec: Run) -> float:
    """Counted forward units of a step."""
    return cost.forward_units(spec.outline(), spec.objective, spec.path, spec.data.shape)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None of one."""
    return stdev(values) if len(values) > 1 else None
