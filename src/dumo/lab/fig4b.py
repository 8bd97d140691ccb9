"""Figure 4b of the paper: what a training step costs, by size and objective.

`dumo.lab.reproduce` calls `time_cells`, `table` and `charts`, in this order.

Nothing is trained: weights are random, data are noise. All objectives of one size are timed in turn, round by round. A
ratio of two times is taken within each round, and its median over the rounds counts, so that a slow minute slows both
alike. A step is all of it: targets, backward pass, optimizer and average.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dumo.config.spec import Run
from dumo.lab.cell import Result, Row
from dumo.lab.plan import Cell, Cost, Plan
from dumo.plan import machine
from dumo.report import chart
from dumo.run.index import Index
from dumo.run.net import outline
from dumo.run.weights import RunFolder, build
from dumo.runtime.device import choose_device, software_versions
from dumo.runtime.progress import Bar
from dumo.runtime.random import stream
from dumo.runtime.stopwatch import Stopwatch, quartiles
from dumo.training.schedule import Constant
from dumo.training.state import begin
from dumo.training.step import flow_of, train_step
from dumo.types import UserError

_TIMED_STEP = 10**6  # the step of the training that is timed, its middle: ours
_MAX_CPU_PARAMETERS = 10**8  # nets with more are not timed on a CPU: ours
# the objectives of Fig. 4b, as the column `objective` names them
FLOW_MATCHING = "Flow matching"
DUMO = "DuMo, guided, central"
MEANFLOW = "MeanFlow, guided, central on all rows"
MEANFLOW_FEWER_ROWS = "MeanFlow, guided, central where r < t"
_PAPER_SPEEDS = {DUMO: 1.126, MEANFLOW: 1.0}  # Sec. 4.4: steps per second on XL over MeanFlow's


def time_cells(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Result]:
    """Time the steps of all cells, size by size; nothing is trained.

    Raises UserError for several jobs, and for nets of the paper's size without a GPU.
    """
    torch_device = choose_device(device)
    if jobs > 1:
        raise UserError("fig4b times its cells in turn, so that a slow minute slows all alike: leave out --jobs")
    largest = max(_num_parameters(cell) for cell in cells)
    if torch_device.type == "cpu" and largest > _MAX_CPU_PARAMETERS:
        raise UserError(
            f"scale 'paper' of fig4b has nets of up to {largest / 1e6:.0f} M parameters: it needs a GPU; use laptop"
        )
    results: list[Result] = []
    for size in dict.fromkeys(cell.labels["size"] for cell in cells):
        cells_of_size = [cell for cell in cells if cell.labels["size"] == size]
        steps = [_prepare_step(cell.spec, torch_device) for cell in cells_of_size]
        rounds = cells_of_size[0].labels["rounds"]
        seconds = Stopwatch.for_bench(torch_device).time_rounds(steps, rounds, bar=bar, title=f"steps of size {size}")
        for cell, cell_seconds in zip(cells_of_size, seconds, strict=True):
            report = {
                "card": _timing_facts(cell, torch_device),
                "parameters": _num_parameters(cell),
                "F_per_step": Cost(cell.spec).units,
                "seconds": cell_seconds.tolist(),
            }
            untrained = RunFolder(cell.spec, Index.read(folder), outline(cell.spec), step=0, weights="none")
            results.append(Result(cell, untrained, report))
    return results


def _num_parameters(cell: Cell) -> int:
    """The number of parameters of a cell's net."""
    return sum(p.numel() for p in outline(cell.spec).parameters())


class _ZeroRate(Constant):
    """A schedule whose learning rate is zero at every step."""

    def __call__(self, step: float, steps: int) -> float:
        """The factor of the learning rate, 0."""
        return 0.0


def _prepare_step(spec: Run, device: torch.device) -> Callable[[], object]:
    """A function that makes a training step on random data, in the middle of the training.

    The learning rate is zero, so that many steps cannot diverge.
    """
    train = spec.train.model_copy(
        update={
            "steps": 2 * _TIMED_STEP,
            "schedule": _ZeroRate(),
            "micro_batch": None,
            "clip": None,
        }
    )
    rows = train.batch
    classes = spec.data.classes
    state = begin(build(spec, device), train)
    flow = flow_of(state, train, spec.objective, spec.path, classes)
    state.step = _TIMED_STEP
    x = torch.randn(rows, *spec.data.shape, generator=stream("fig4b", "x")).to(device)
    c = torch.randint(max(classes, 1), (rows,), generator=stream("fig4b", "c")).to(device)

    def make_step() -> None:
        train_step(state, flow, (x, c), train)

    return make_step


def _timing_facts(cell: Cell, device: torch.device) -> dict[str, Any]:
    """How the steps of a cell were timed: rounds, rows, precision and machine."""
    return {
        "rounds": cell.labels["rounds"],
        "rows": cell.spec.train.batch,
        "precision": cell.spec.train.precision,
        "machine": machine.hardware(device).text,
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
    }


def table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per size and objective: cost of a step in forward passes, as counted and by time, and steps per second.

    Times are divided round by round, before the median is taken.
    """
    reports: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        labels = result.cell.labels
        reports[labels["size"], labels["objective"]] = result.report
    rows: list[Row] = []
    for (size, objective), report in reports.items():
        seconds = torch.tensor(report["seconds"])
        flow_matching = reports[size, FLOW_MATCHING]
        flow_matching_seconds = torch.tensor(flow_matching["seconds"])
        meanflow_seconds = torch.tensor(reports[size, MEANFLOW]["seconds"])
        low, ratio, high = quartiles(seconds / flow_matching_seconds)
        rows.append(
            {
                "size": size,
                "objective": objective,
                "parameters": report["parameters"],
                "F_per_step": report["F_per_step"],
                "F_by_time": ratio * flow_matching["F_per_step"],
                "steps_per_second": 1 / seconds.median().item(),
                "time_over_flow_matching": ratio,
                "low": low,
                "high": high,
                "speed_over_guided_meanflow": (meanflow_seconds / seconds).median().item(),
                "paper_speed_over_meanflow_xl": _PAPER_SPEEDS.get(objective),
            }
        )
    return rows


def charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """The paper's bars, steps per second of DuMo and MeanFlow by size; and times of all objectives, a line each."""
    bars: dict[str, dict[str, float]] = {}
    dots: dict[str, dict[str, chart.Dot]] = {}
    for timing in table:
        size = timing["size"]
        objective = timing["objective"]
        dots.setdefault(objective, {})[size] = chart.Dot(timing["time_over_flow_matching"], None)
        if objective in (DUMO, MEANFLOW, MEANFLOW_FEWER_ROWS):
            bars.setdefault(size, {})[objective] = timing["steps_per_second"]
    return {
        "fig4b": chart.bars("Training steps", "size of the net", "steps per second", bars),
        "fig4b-all": chart.dots("Time of a training step", "time over flow matching's", dots),
    }
