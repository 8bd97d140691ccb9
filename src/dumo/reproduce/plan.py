"""A plan: the cells that a figure or table needs, each trained and judged once, and how they are set out.

A cell is a run in a folder named after a hash of what trains it: one that is finished is not run again, one that was
stopped goes on, one whose recipe has changed starts anew.
"""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial, wraps
from hashlib import blake2b
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from PIL import Image

from dumo import dist
from dumo.config.spec import Run
from dumo.data import Latents
from dumo.evaluation import card
from dumo.evaluation.evaluate import evaluate, standing
from dumo.peer import Lost
from dumo.preflight import cost
from dumo.progress import Bar, no_bar
from dumo.reproduce import job
from dumo.run import encode, text
from dumo.run.folder import RunFolder, open_run
from dumo.run.train import train
from dumo.types import UserError

SCALES = ("smoke", "laptop", "paper")  # a minute; this machine's cores within an hour; the paper's size, on GPUs


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
    opened: RunFolder
    report: dict[str, Any]


def finish_all(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Finished]:
    """Train and judge all cells, `jobs` at a time, each in a process of its own with its share of the cores.

    A small net is quicker on one core, and two of them on two, than one on two. Raises UserError as `finish` does, and
    for cells of one protocol that were not measured alike.
    """
    for data in dict.fromkeys(cell.spec.data for cell in cells):
        if isinstance(data, Latents):
            encode.ensure(data, device=device, bar=bar)
    cells = [replace(cell, spec=text.ready(cell.spec)) for cell in cells]  # known by its texts, made or found
    if jobs > 1:
        made_apart(cells, folder, jobs=jobs, device=device, bar=bar)
    finished = [finish(cell, folder, device=device, bar=bar) for cell in cells]
    alike(finished)
    return finished


@dataclass(frozen=True)
class Plan:
    """What a figure or table needs, and how it is set out."""

    title: str
    cells: Callable[[str], Iterator[Cell]]  # by scale
    table: Callable[[list[Finished]], list[dict[str, Any]]]
    draw: Callable[[list[Finished], Path], list[Path]] = lambda done, folder: []  # pictures that take the nets
    finish: Callable[..., list[Finished]] = finish_all
    charts: Callable[[list[dict[str, Any]]], dict[str, Image.Image]] = lambda table: {}  # by the names of their files
    unpublished: str = ""  # why it has no paper's scale

    def check(self, name: str, scale: str) -> None:
        """Refuse a scale that this plan, of this name, does not have. Raises UserError with those that it has."""
        if scale == "paper" and self.unpublished:
            raise UserError(f"{name} has no scale 'paper': {self.unpublished}; it has smoke and laptop")


def made_apart(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> None:
    """Finish cells in processes of their own. One that is killed does not keep the others from being finished.

    Raises `Lost` then, which names it.
    """
    threads, lost = max(1, (os.cpu_count() or 1) // jobs), list[str]()
    with bar(f"{len(cells)} cells, {jobs} at a time", len(cells)) as tick:
        made = job.side_by_side(partial(work, folder=folder, device=device), cells, jobs=jobs, threads=threads)
        for done, (cell, error) in enumerate(made, 1):
            lost += [f"{cell.name}: {error}"] if error else []
            tick(done, cell.name)
    if lost:
        ways = "; the others are finished. Start the same command again, with fewer --jobs where memory is short"
        raise Lost("; ".join(lost) + ways)


def work(cell: Cell, folder: Path, device: str) -> None:
    """Finish a cell."""
    finish(cell, folder, device=device, bar=no_bar)


def finish(cell: Cell, cells: Path, *, device: str, bar: Bar) -> Finished:
    """Train and judge a cell, or take what is there of it."""
    trained_by = cell.spec.model_dump_json(exclude={"about", "sample", "evaluate"})
    folder = cells / f"{cell.name}-{blake2b(trained_by.encode(), digest_size=4).hexdigest()}"
    train(cell.spec, folder, device=device, bar=bar)
    opened = open_run(str(folder), device=device)
    return Finished(cell, opened, standing(opened) or evaluate(opened, bar=bar))


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


def trained_as(spec: Run, **fields: Any) -> Run:  # noqa: ANN401, of any type
    """The run with other fields of its training."""
    return spec.model_copy(update={"train": spec.train.model_copy(update=fields)})


def once(count: Callable[[Run], float]) -> Callable[[Run], float]:
    """A count that is remembered by all it depends on: of a plan's runs most differ in their training alone."""
    known: dict[str, float] = {}

    @wraps(count)
    def counted(spec: Run) -> float:
        key = spec.model_dump_json(include={"data", "net", "objective", "path", "teacher"}) + repr(spec.train.ref)
        if key not in known:
            known[key] = count(spec)
        return known[key]

    return counted


@once
def units(spec: Run) -> float:
    """Counted forward units of a step. A teacher's pass counts as one of the net, guided as two."""
    taught = 0 if spec.teacher is None or spec.teacher.pairs else 1 if spec.teacher.guide.scale == 1 else 2
    return taught + cost.forward_units(spec.outline(), spec.objective, spec.path, spec.data.shape, ref=spec.train.ref)


@once
def flops(spec: Run) -> float:
    """Counted operations of a pass, per row."""
    return cost.forward_flops(spec.outline(), spec.objective, spec.data.shape)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None of one."""
    return stdev(values) if len(values) > 1 else None
