"""Figure 4b: what a training step costs, by size and objective. Nothing is trained: nets are as drawn, data are noise.

All objectives of one size take turns, round by round, and the median over rounds of a ratio within each compares them:
a slow minute slows all alike. A step is whole: targets, backward pass, optimizer and average.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dumo.lab import chart
from dumo.lab.bench import interleave, quartiles
from dumo.lab.cell import Result
from dumo.lab.plan import Cell, Cost, Plan
from dumo.lab.table import Row
from dumo.run.config.spec import Run
from dumo.run.folder import RunFolder
from dumo.run.plan import machine
from dumo.runtime import dist
from dumo.runtime.progress import Bar
from dumo.runtime.random import stream
from dumo.training.optim import Constant
from dumo.training.state import begin
from dumo.training.step import Task, train_step
from dumo.types import UserError

MIDDLE = 10**6  # steps behind the one that is timed, and before the end: ours
LARGE = 10**8  # parameters, above which a CPU is not timed: ours
PLAIN, DUMO = "Flow matching", "DuMo, guided, central"
MEANFLOW, SPARING = "MeanFlow, guided, central on all rows", "MeanFlow, guided, central where r < t"
PAPER = {DUMO: 1.126, MEANFLOW: 1.0}  # Sec. 4.4: steps per second on XL over MeanFlow's


def finish(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Result]:
    """Time the steps of all cells, size by size.

    Raises UserError for several at a time, and for nets of the paper's size without a GPU.
    """
    here, results = dist.device(device), list[Result]()
    most, why = max(map(parameters, cells)), ""
    if jobs > 1:
        why = "fig4b times its cells in turn, so that a slow minute slows all alike: leave out --jobs"
    elif here.type == "cpu" and most > LARGE:
        why = f"scale 'paper' of fig4b has nets of up to {most / 1e6:.0f} M parameters: it needs a GPU; use laptop"
    if why:
        raise UserError(why)
    for size in dict.fromkeys(cell.labels["size"] for cell in cells):
        same = [cell for cell in cells if cell.labels["size"] == size]
        steps = [step(cell.spec, here) for cell in same]
        seconds = interleave(f"steps of size {size}", steps, same[0].labels["rounds"], here, bar)
        for cell, taken in zip(same, seconds, strict=True):
            facts = {"parameters": parameters(cell), "F_per_step": Cost(cell.spec).units, "seconds": taken.tolist()}
            trained = RunFolder(cell.spec, folder, cell.spec.outline(), 0, "none")
            results.append(Result(cell, trained, {"card": card(cell, here), **facts}))
    return results


def parameters(cell: Cell) -> int:
    """Of its net."""
    return sum(p.numel() for p in cell.spec.outline().parameters())


class Rest(Constant):
    """No rate at all."""

    def __call__(self, step: int, steps: int) -> float:
        """Zero."""
        return 0.0


def step(spec: Run, here: torch.device) -> Callable[[], object]:
    """A training step on random numbers, in the middle of the training; the rate is zero, so it cannot diverge."""
    rest = {"steps": 2 * MIDDLE, "schedule": Rest(), "micro_batch": None, "clip": None, "probe_every": 0}
    train, classes, rows = spec.train.model_copy(update=rest), spec.data.classes, spec.train.batch
    state, task = begin(spec.build(here), train), Task(spec.objective, spec.path, classes)
    state.step = MIDDLE
    x = torch.randn(rows, *spec.data.shape, generator=stream("fig4b", "x")).to(here)
    c = torch.randint(max(classes, 1), (rows,), generator=stream("fig4b", "c")).to(here)

    def once() -> None:
        train_step(state, task, (x, c), train)

    return once


def card(cell: Cell, here: torch.device) -> dict[str, Any]:
    """How it was measured."""
    return {
        "rounds": cell.labels["rounds"],
        "rows": cell.spec.train.batch,
        "precision": cell.spec.train.precision,
        "machine": machine.hardware(here).text,
        "threads": torch.get_num_threads(),
        "versions": dist.versions(),
    }


def table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per size and objective: counted units, units by time, and steps per second, over others' in each round."""
    taken = {(one.cell.labels["size"], one.cell.labels["objective"]): one.report for one in results}
    rows: list[Row] = []
    for (size, name), report in taken.items():
        plain, meanflow, own = (torch.tensor(taken[size, other]["seconds"]) for other in (PLAIN, MEANFLOW, name))
        low, ratio, high = quartiles(own / plain)
        rows.append(
            {
                "size": size,
                "objective": name,
                "parameters": report["parameters"],
                "F_per_step": report["F_per_step"],
                "F_by_time": ratio * taken[size, PLAIN]["F_per_step"],
                "steps_per_second": 1 / own.median().item(),
                "time_over_flow_matching": ratio,
                "low": low,
                "high": high,
                "speed_over_guided_meanflow": (meanflow / own).median().item(),
                "paper_speed_over_meanflow_xl": PAPER.get(name),
            }
        )
    return rows


def charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """The paper's bars, steps per second of the two by size; and all objectives, a line each."""
    bars: dict[str, dict[str, float]] = {}
    dots: dict[str, dict[str, tuple[float, float | None]]] = {}
    for row in table:
        dots.setdefault(row["objective"], {})[row["size"]] = row["time_over_flow_matching"], None
        if row["objective"] in (DUMO, MEANFLOW, SPARING):
            bars.setdefault(row["size"], {})[row["objective"]] = row["steps_per_second"]
    return {
        "fig4b": chart.bars("Training steps", "size of the net", "steps per second", bars),
        "fig4b-all": chart.dots("Time of a training step", "time over flow matching's", dots),
    }
