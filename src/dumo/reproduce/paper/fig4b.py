"""Figure 4b: what a training step costs, by size and objective. Nothing is trained: nets are as drawn, data are noise.

All objectives of one size take turns, round by round, so that a slow minute slows them alike; what is compared is the
median over rounds of a ratio within each. A step is whole: targets, backward pass, optimizer and average. The paper
compares DuMo and MeanFlow with guidance and central differences: so do those that are called guided. Its MeanFlow
makes four passes without gradients, so it takes the difference on all rows, though three quarters of them, r = t, have
no need of it; ours spares them, and stands beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from dumo import dist
from dumo.config.spec import Run
from dumo.io import archive
from dumo.preflight import machine
from dumo.progress import Bar
from dumo.random import stream
from dumo.reproduce import chart
from dumo.reproduce.arm import SMALL, Arm
from dumo.reproduce.paper.zoo import zoo
from dumo.reproduce.plan import Cell, Finished, Plan, units
from dumo.run.folder import RunFolder
from dumo.training.optim import Constant
from dumo.training.state import begin
from dumo.training.step import Task, train_step
from dumo.types import UserError

MIDDLE = 10**6  # steps behind the one that is timed, and before the end: ours
ROUNDS = {"smoke": 2, "laptop": 15, "paper": 15}
SIZES = {  # width, depth, heads of attention
    "smoke": {"tiny": (32, 1, 1)},
    "laptop": {"64 x 4": (64, 4, 4), "64 x 8": (64, 8, 4), "128 x 4": (128, 4, 4)},
    "paper": {"B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)},  # DiT, Tab. 1
}
CENTRAL = 'objective.slope={"kind": "central", "h": 0.005}'  # Sec. 3.3; h as UCGM
PLAIN, DUMO = "Flow matching", "DuMo, guided, central"
MEANFLOW, SPARING = "MeanFlow, guided, central on all rows", "MeanFlow, guided, central where r < t"
ALL = "objective.times.velocity_ratio=0"  # the difference is taken everywhere, as in the paper's count
PAPER = {DUMO: 1.126, MEANFLOW: 1.0}  # Sec. 4.4: steps per second on XL over MeanFlow's


def arms(scale: str) -> Iterator[Arm]:
    """Flow matching and the paper's two, one in two ways; but for the paper's scale, the zoo beside them."""
    if scale == "paper":
        sets = ("train.batch=32", "train.micro_batch=null")
        plain = ('objective={"kind": "flow_matching"}', "sample.solver.kind=euler")
        yield Arm(PLAIN, "imagenet256-xl2", (*sets, *plain))
        yield Arm(DUMO, "imagenet256-xl2", (*sets, CENTRAL))
        yield Arm(MEANFLOW, "imagenet256-xl2-meanflow", (*sets, CENTRAL, ALL))
        yield Arm(SPARING, "imagenet256-xl2-meanflow", (*sets, CENTRAL))
        return
    found = dict(zoo())
    sets = SMALL if scale == "smoke" else ()
    guided = (*sets, "objective.drop=0.1", "objective.guide.zeta=0.5", CENTRAL)
    yield Arm(PLAIN, found.pop(PLAIN), sets)
    yield Arm(DUMO, "digits", guided)
    yield Arm(MEANFLOW, "digits-meanflow", (*guided, ALL))
    yield Arm(SPARING, "digits-meanflow", guided)
    yield from (Arm(title, recipe, sets) for title, recipe in found.items())


def cells(scale: str) -> Iterator[Cell]:
    """Every objective in every size."""
    for size, (width, depth, attention) in SIZES[scale].items():
        net = (f"net.width={width}", f"net.depth={depth}", f"net.attention={attention}")
        for arm in arms(scale):
            labels = {"size": size, "objective": arm.name, "rounds": ROUNDS[scale]}
            yield Cell(f"{size} {arm.name}", arm.load(net), labels)


def measured(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Finished]:
    """Time the steps of all cells, size by size.

    Raises UserError for several at a time, and for nets of the paper's size without a GPU.
    """
    if jobs > 1:
        raise UserError("fig4b times its cells in turn, so that a slow minute slows all alike: leave out --jobs")
    here, done = dist.device(device), list[Finished]()
    sizes = list(dict.fromkeys(cell.labels["size"] for cell in cells))
    if here.type == "cpu" and {*sizes} & {*SIZES["paper"]}:
        raise UserError("fig4b at scale 'paper' times nets of up to 677 M parameters: it needs a GPU; use laptop here")
    for size in sizes:
        same = [cell for cell in cells if cell.labels["size"] == size]
        for cell, taken in zip(same, seconds(same, here, bar), strict=True):
            outline = cell.spec.outline()
            facts = {"parameters": sum(p.numel() for p in outline.parameters()), "F_per_step": units(cell.spec)}
            report = {"card": card(cell, here), **facts, "seconds": taken.tolist()}
            done.append(Finished(cell, RunFolder(cell.spec, folder, outline, 0, "none"), report))
    return done


def seconds(cells: Sequence[Cell], here: torch.device, bar: Bar) -> Tensor:
    """Seconds of a step, (cells, rounds): on a CPU of one thread's own time, so that other programs do not count."""
    clock: dict[str, Any] = {"timer": process_time} if here.type == "cpu" else {}
    timers = [Timer("step()", globals={"step": step(cell.spec, here)}, **clock) for cell in cells]
    rounds = cells[0].labels["rounds"]
    taken = torch.zeros(len(cells), rounds, dtype=torch.float64)
    with bar(f"steps of size {cells[0].labels['size']}", rounds) as tick:
        for i in range(rounds):
            for row, timer in zip(taken, timers, strict=True):
                row[i] = timer.timeit(1).median
            tick(i + 1, "")
    return taken


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
        "timer": "torch.utils.benchmark, CPU time of one thread" if here.type == "cpu" else "torch.utils.benchmark",
        "rounds": cell.labels["rounds"],
        "rows": cell.spec.train.batch,
        "precision": cell.spec.train.precision,
        "machine": machine.hardware(here).text,
        "versions": dist.versions(),
    }


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per size and objective: counted units, units by time, and steps per second, over others' in each round."""
    taken = {(one.cell.labels["size"], one.cell.labels["objective"]): one.report for one in done}
    rows: list[dict[str, Any]] = []
    for (size, name), report in taken.items():
        plain, meanflow, own = (torch.tensor(taken[size, other]["seconds"]) for other in (PLAIN, MEANFLOW, name))
        low, ratio, high = (own / plain).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
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


def draw(done: list[Finished], folder: Path) -> list[Path]:
    """The paper's bars, steps per second of the two by size; and all objectives, a line each."""
    bars: dict[str, dict[str, float]] = {}
    dots: dict[str, dict[str, tuple[float, float | None]]] = {}
    for row in table(done):
        dots.setdefault(row["objective"], {})[row["size"]] = row["time_over_flow_matching"], None
        if row["objective"] in (DUMO, MEANFLOW, SPARING):
            bars.setdefault(row["size"], {})[row["objective"]] = row["steps_per_second"]
    where = done[0].report["card"]["machine"]
    files = [folder / "fig4b.png", folder / "fig4b-all.png"]
    archive.write_picture(files[0], chart.bars(f"Training steps, {where}", "size of the net", "steps per second", bars))
    archive.write_picture(files[1], chart.dots("Time of a training step", "time over flow matching's", dots))
    return files


PLAN = Plan("Cost of a training step by size and objective (Fig. 4b)", cells, table, draw, measured)
