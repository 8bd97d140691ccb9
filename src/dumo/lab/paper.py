"""Figures and tables of the paper: their tables, charts and pictures, where these are special. The plans are YAML.

Functions are named after the figure and what they make: `fig3_table`, `fig4a_charts`, `fig5_draw`. The views of
`dumo.lab.reproduce` say which plan has which.

Figure 4b says what a training step costs, by size and objective. Nothing is trained: nets are as drawn, data are noise.
All objectives of one size take turns, round by round, and the median over rounds of a ratio within each compares them:
a slow minute slows all the same. A step is whole: targets, backward pass, optimizer and average.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from math import log
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dumo.config.spec import Run
from dumo.config.word import MERITS, word
from dumo.flow import generate
from dumo.io import picture
from dumo.lab.cell import Result, Row, average_by_arm, main_score
from dumo.lab.plan import Cell, Cost, Plan
from dumo.plan import machine
from dumo.plan import plan as counts
from dumo.report import chart, gallery
from dumo.report.evaluate import row
from dumo.run.index import Index
from dumo.run.judge import evaluator_of
from dumo.run.net import outline
from dumo.run.weights import RunFolder, build
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.random import stream
from dumo.runtime.stopwatch import Stopwatch, quartiles
from dumo.training.optim import Constant
from dumo.training.state import begin
from dumo.training.step import flow_of, train_step
from dumo.types import UserError

JUDGED = (1, 2, 50)  # passes of Fig. 5: few, and as many as the velocity needs
LOWEST = {(2.0, 2.0): 4.06}  # of Fig. 4c, Sec. 4.4
FAR = 3.0  # times the first arm's distance, beyond which the zoo says why
MIDDLE = 10**6  # steps behind the one that is timed, and before the end: ours
LARGE = 10**8  # parameters, above which a CPU is not timed: ours
# objectives of Fig. 4b, by their column
PLAIN = "Flow matching"
DUMO = "DuMo, guided, central"
MEANFLOW = "MeanFlow, guided, central on all rows"
SPARING = "MeanFlow, guided, central where r < t"
PAPER = {DUMO: 1.126, MEANFLOW: 1.0}  # Sec. 4.4: steps per second on XL over MeanFlow's


def far_column(one: Result) -> Row:
    """P(t - r > 0.9), the share of rows where one-step sampling is taught, as a column."""
    return {"far": round(counts.far_share(one.cell.spec.objective), 6)}


def fig3_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per cell: MMD^2 of one-step samples, with the sd of its null."""
    return [
        {
            **one.cell.labels,
            "mmd2": one.report["results"][0]["mmd2"],
            "null_sd": one.report["baselines"]["null"]["sd"],
        }
        for one in results
    ]


def fig3_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """A panel per cell as the paper's: grey truth, red one-step samples; and a legend."""
    real, _ = results[0].trained.run.data.open().reference(4000, 0)
    panels: dict[str, Image.Image] = {}
    for result in results:
        ratio = result.cell.labels["velocity_ratio"]
        mmd2 = result.report["results"][0]["mmd2"]
        title = "DuMo" if ratio is None else f"MeanFlow, velocity ratio {ratio:g}"
        samples = result.trained.sampler.sample(generate.labels_in_turn(2000, 0), nfe=1).x
        panels[f"{title}\nMMD² {mmd2:.2g}"] = picture.scatter(real, {"": samples})
    panels["grey: data\nred: samples of one pass"] = picture.scatter(real, {"": real[:0]})
    path = folder / "fig3.png"
    picture.write_picture(path, picture.named_blocks(panels, 4))
    return [path]


def fig4a_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """Two curves, share on the velocity to the right, distance upwards."""
    score = main_score(table[0])
    points: dict[str, list[chart.CurvePoint]] = {}
    for of in table:
        what = "β of its loss" if of["objective"] == "DuMo" else "velocity ratio of its rows"
        point = chart.CurvePoint(of["share_on_velocity"], of[score], of.get(f"{score}_sd"))
        points.setdefault(f"{of['objective']}, {what}", []).append(point)
    label = chart.score_label(score)
    return {"fig4a": chart.curves("Share on the velocity, one pass", "share on the velocity", label, points)}


def fig4c_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per pair: the distance, its logarithm, and the share of rows where one-step sampling is taught."""
    return [
        of | {"log": log(of[main_score(of)]), "paper_log_fid_b2_10k": LOWEST.get((of["theta_1"], of["theta_2"]))}
        for of in average_by_arm(results, far_column)
    ]


def fig4c_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """The grid, theta_1 to the right, theta_2 upwards, in colours and numbers; the lowest is bold."""
    score = main_score(table[0])
    values = {(of["theta_1"], of["theta_2"]): log(of[score]) for of in table}
    scale = f"log of the {word(MERITS, score).title} (lower is better)"
    return {"fig4c": chart.heat_map("t ~ Beta(θ₁, θ₂), one pass", "θ₁", "θ₂", values, scale)}


def fig5_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per objective, reading, step and number of passes: the first of the protocol's distances to the data."""
    rows: list[Row] = []
    for result in results:
        for distances in _distances_by_milestone(result):
            rows.append({"objective": result.cell.labels["objective"], **distances})
    return rows


def _distances_by_milestone(result: Result) -> Iterator[Row]:
    """How near samples come to the data after each milestone, by reading and number of passes."""
    trained = result.trained
    spec = trained.run
    evaluator = evaluator_of(trained.sampler, spec.evaluate, no_bar)
    c = spec.evaluate.protocol.labels(spec.data.classes)
    for step, file in gallery.milestone_files(trained.folder, trained.step).items():
        milestone = gallery.open_at(trained, step, file)
        for reading in gallery.choose_modes(milestone.sampler, None, JUDGED):
            for n in JUDGED:
                scores = row(milestone.sampler, evaluator, reading.at(n), n, c, spec.evaluate.seed)
                passes_solver_distance = islice(scores.items(), 3)
                yield {"reading": reading.letter, "step": step, **dict(passes_solver_distance)}


def fig5_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Trajectories of all readings in one picture, class grids of each objective, and each panel by itself."""
    files: list[Path] = []
    rows: dict[str, Any] = {}
    for result in results:
        title = result.cell.labels["objective"]
        panels = gallery.trajectories(result.trained)
        for reading, panel in panels.items():
            rows[f"{title},\n{reading.name}"] = panel
        grids = gallery.class_grids(result.trained, None, nfe=(1, 2))
        files += gallery.write_trajectories(folder / title.lower(), panels)
        files += gallery.write_class_grids(folder / title.lower(), grids)
    picture.write_picture(folder / "fig5.png", gallery.side_by_side(rows))
    return [folder / "fig5.png", *files]


def zoo_table(plan: Plan, results: list[Result]) -> list[Row]:
    """Every distance over DuMo's in one pass; and where one pass is over three of these, why."""
    rows = average_by_arm(results)
    score = main_score(rows[0])
    first = rows[0][score]
    table: list[Row] = []
    for averages in rows:
        ratio = averages[score] / first
        why = ""
        if averages["nfe"] == 1 and ratio > FAR:
            why = plan.why.get(averages["objective"], "not known")
        table.append(averages | {"over_dumo_1_pass": ratio, "why": why})
    return table


def fig4b_finish(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Result]:
    """Time the steps of all cells, size by size.

    Raises UserError for several at a time, and for nets of the paper's size without a GPU.
    """
    torch_device = dist.device(device)
    if jobs > 1:
        raise UserError("fig4b times its cells in turn, so that a slow minute slows all alike: leave out --jobs")
    largest = max(parameters(cell) for cell in cells)
    if torch_device.type == "cpu" and largest > LARGE:
        raise UserError(
            f"scale 'paper' of fig4b has nets of up to {largest / 1e6:.0f} M parameters: it needs a GPU; use laptop"
        )
    results: list[Result] = []
    for size in dict.fromkeys(cell.labels["size"] for cell in cells):
        same = [cell for cell in cells if cell.labels["size"] == size]
        steps = [step(cell.spec, torch_device) for cell in same]
        watch = Stopwatch.for_bench(torch_device)
        seconds = watch.rounds(steps, same[0].labels["rounds"], bar=bar, title=f"steps of size {size}")
        for cell, taken in zip(same, seconds, strict=True):
            facts = {"parameters": parameters(cell), "F_per_step": Cost(cell.spec).units, "seconds": taken.tolist()}
            trained = RunFolder(cell.spec, Index.read(folder), outline(cell.spec), 0, "none")
            results.append(Result(cell, trained, {"card": _timing_facts(cell, torch_device), **facts}))
    return results


def parameters(cell: Cell) -> int:
    """The number of parameters of a cell's net."""
    return sum(p.numel() for p in outline(cell.spec).parameters())


class _ZeroRate(Constant):
    """A schedule whose learning rate is zero at every step."""

    def __call__(self, step: int, steps: int) -> float:
        """The factor of the learning rate, 0."""
        return 0.0


def step(spec: Run, device: torch.device) -> Callable[[], object]:
    """A training step on random numbers, in the middle of the training; the rate is zero, so it cannot diverge."""
    changes = {"steps": 2 * MIDDLE, "schedule": _ZeroRate(), "micro_batch": None, "clip": None, "probe_every": 0}
    train = spec.train.model_copy(update=changes)
    rows = train.batch
    classes = spec.data.classes
    state = begin(build(spec, device), train)
    flow = flow_of(state, train, spec.objective, spec.path, classes)
    state.step = MIDDLE
    x = torch.randn(rows, *spec.data.shape, generator=stream("fig4b", "x")).to(device)
    c = torch.randint(max(classes, 1), (rows,), generator=stream("fig4b", "c")).to(device)

    def once() -> None:
        train_step(state, flow, (x, c), train)

    return once


def _timing_facts(cell: Cell, device: torch.device) -> dict[str, Any]:
    """How the steps of a cell were timed: rounds, rows, precision and machine."""
    return {
        "rounds": cell.labels["rounds"],
        "rows": cell.spec.train.batch,
        "precision": cell.spec.train.precision,
        "machine": machine.hardware(device).text,
        "threads": torch.get_num_threads(),
        "versions": dist.versions(),
    }


def fig4b_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per size and objective: counted units, units by time, and steps per second, over others' in each round."""
    taken = {(one.cell.labels["size"], one.cell.labels["objective"]): one.report for one in results}
    rows: list[Row] = []
    for (size, name), report in taken.items():
        plain = torch.tensor(taken[size, PLAIN]["seconds"])
        meanflow = torch.tensor(taken[size, MEANFLOW]["seconds"])
        own = torch.tensor(report["seconds"])
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


def fig4b_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """The paper's bars, steps per second of the two by size; and all objectives, a line each."""
    bars: dict[str, dict[str, float]] = {}
    dots: dict[str, dict[str, chart.Dot]] = {}
    for of in table:
        dots.setdefault(of["objective"], {})[of["size"]] = chart.Dot(of["time_over_flow_matching"], None)
        if of["objective"] in (DUMO, MEANFLOW, SPARING):
            bars.setdefault(of["size"], {})[of["objective"]] = of["steps_per_second"]
    return {
        "fig4b": chart.bars("Training steps", "size of the net", "steps per second", bars),
        "fig4b-all": chart.dots("Time of a training step", "time over flow matching's", dots),
    }
