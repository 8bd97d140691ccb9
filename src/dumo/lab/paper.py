"""Figures and tables of the paper: their tables, charts and pictures, where these are special. The plans are YAML.

Functions are named after the figure and what they make: `fig3_table`, `fig4a_charts`, `fig5_draw`, `fig4b_finish`. The
views of `dumo.lab.reproduce` say which plan has which, and call them in this order: `_finish` trains or times the
cells, `_table` makes rows of their results, `_charts` draws the table, `_draw` writes pictures that need the nets.
`far_column` also serves `dumo.lab.ours`.

Figure 4b says what a training step costs, by size and objective. Nothing is trained: weights are random, data are
noise. All objectives of one size are timed in turn, round by round. A ratio of two times is taken within each round,
and its median over the rounds counts, so that a slow minute slows both alike. A step is all of it: targets, backward
pass, optimizer and average.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dumo.lab.cell import Result, Row
from dumo.lab.plan import Cell, Cost, Plan
from dumo.lab.table import average_by_arm, main_score
from dumo.plan import machine
from dumo.plan.plan import far_share
from dumo.report import chart, evaluate, gallery
from dumo.run.index import Index
from dumo.run.judge import evaluator_of
from dumo.run.net import outline
from dumo.run.weights import RunFolder, build
from dumo.runtime.device import choose_device, software_versions
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.random import stream
from dumo.runtime.stopwatch import Stopwatch, quartiles
from dumo.training.schedule import Constant
from dumo.training.state import begin
from dumo.training.step import flow_of, train_step
from dumo.types import UserError

_FIG5_PASSES = (1, 2, 50)  # at which Fig. 5 is judged: few, and as many as the velocity needs
_FIG4C_LOG_FID = {(2.0, 2.0): 4.06}  # by (theta_1, theta_2): the paper's lowest value of Fig. 4c, Sec. 4.4
_FAR_RATIO = 3.0  # times the first arm's distance, beyond which the zoo's table says why: ours
_TIMED_STEP = 10**6  # the step of the training that is timed, its middle: ours
_MAX_CPU_PARAMETERS = 10**8  # nets with more are not timed on a CPU: ours
# the objectives of Fig. 4b, as the column `objective` names them
FLOW_MATCHING = "Flow matching"
DUMO = "DuMo, guided, central"
MEANFLOW = "MeanFlow, guided, central on all rows"
MEANFLOW_FEWER_ROWS = "MeanFlow, guided, central where r < t"
_PAPER_SPEEDS = {DUMO: 1.126, MEANFLOW: 1.0}  # Sec. 4.4: steps per second on XL over MeanFlow's


def far_column(result: Result) -> Row:
    """P(t - r > 0.9), the share of rows where one-step sampling is taught, as the column `far`."""
    return {"far": round(far_share(result.cell.spec.objective), 6)}


def fig3_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per cell: MMD^2 of one-step samples, and its deviation between two draws of the data."""
    rows: list[Row] = []
    for result in results:
        report = result.report
        rows.append(
            {
                **result.cell.labels,
                "mmd2": report["results"][0]["mmd2"],
                "null_sd": report["baselines"]["null"]["sd"],
            }
        )
    return rows


def fig3_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write fig3.png, a panel per cell as in the paper: the data in grey, one-step samples in red; and a legend."""
    real, _ = results[0].trained.run.data.open().reference(4000, 0)
    panels: dict[str, Image.Image] = {}
    for result in results:
        ratio = result.cell.labels["velocity_ratio"]
        mmd2 = result.report["results"][0]["mmd2"]
        title = "DuMo" if ratio is None else f"MeanFlow, velocity ratio {ratio:g}"
        samples = result.trained.sampler.sample(generate.labels_in_turn(2000, 0), nfe=1).x
        panels[f"{title}\nMMD² {mmd2:.2g}"] = picture.scatter(real, {"": samples})
    panels["grey: data\nred: samples at 1 NFE"] = picture.scatter(real, {"": real[:0]})
    path = folder / "fig3.png"
    picture.write_picture(path, picture.named_blocks(panels, 4))
    return [path]


def fig4a_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """A curve per objective: the share of training on the velocity to the right, the distance upwards."""
    score = main_score(table[0])
    points: dict[str, list[chart.CurvePoint]] = {}
    for averages in table:
        objective = averages["objective"]
        varied = "β of its loss" if objective == "DuMo" else "velocity ratio of its rows"
        point = chart.CurvePoint(averages["share_on_velocity"], averages[score], averages.get(f"{score}_sd"))
        points.setdefault(f"{objective}, {varied}", []).append(point)
    label = chart.score_label(score)
    return {"fig4a": chart.curves("Share on the velocity, 1 NFE", "share on the velocity", label, points)}


def fig4c_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per pair: the distance, its logarithm, and the share of rows where one-step sampling is taught."""
    rows: list[Row] = []
    for averages in average_by_arm(results, far_column):
        thetas = (averages["theta_1"], averages["theta_2"])
        log_distance = log(averages[main_score(averages)])
        rows.append({**averages, "log": log_distance, "paper_log_fid_b2_10k": _FIG4C_LOG_FID.get(thetas)})
    return rows


def fig4c_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """The grid, theta_1 to the right, theta_2 upwards, in colours and numbers; the lowest is bold."""
    score = main_score(table[0])
    values = {(averages["theta_1"], averages["theta_2"]): log(averages[score]) for averages in table}
    scale = f"log of the {word(MERITS, score).title} (lower is better)"
    return {"fig4c": chart.heat_map("t ~ Beta(θ₁, θ₂), 1 NFE", "θ₁", "θ₂", values, scale)}


def fig5_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per objective, sampling mode, step and number of passes: the protocol's first distance to the data."""
    rows: list[Row] = []
    for result in results:
        for distances in _distances_by_milestone(result):
            rows.append({"objective": result.cell.labels["objective"], **distances})
    return rows


def _distances_by_milestone(result: Result) -> Iterator[Row]:
    """A row for each milestone of a run, sampling mode and number of passes, with the first distance to the data."""
    trained = result.trained
    spec = trained.run
    evaluator = evaluator_of(trained.sampler, spec.evaluate, no_bar)
    c = spec.evaluate.protocol.labels(spec.data.classes)
    for step, file in gallery.milestone_files(trained.folder, trained.step).items():
        milestone = gallery.open_milestone(trained, step, file)
        for mode in gallery.choose_modes(milestone.sampler, None, _FIG5_PASSES):
            for nfe in _FIG5_PASSES:
                solver = mode.solver_for(nfe)
                row = evaluate.score_passes(milestone.sampler, evaluator, solver, nfe, c, spec.evaluate.seed)
                passes_solver_distance = islice(row.items(), 3)
                yield {"reading": mode.letter, "step": step, **dict(passes_solver_distance)}


def fig5_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write fig5.png, trajectories of all objectives by all modes; and each objective's panels and class grids."""
    files: list[Path] = []
    panels_by_title: dict[str, Mapping[int, Image.Image]] = {}
    for result in results:
        title = result.cell.labels["objective"]
        panels = gallery.trajectories(result.trained)
        for mode, panels_by_step in panels.items():
            panels_by_title[f"{title},\n{mode.name}"] = panels_by_step
        grids = gallery.class_grids(result.trained, None, nfe=(1, 2))
        files += gallery.write_trajectories(folder / title.lower(), panels)
        files += gallery.write_class_grids(folder / title.lower(), grids)
    picture.write_picture(folder / "fig5.png", gallery.join_panels(panels_by_title))
    return [folder / "fig5.png", *files]


def zoo_table(plan: Plan, results: list[Result]) -> list[Row]:
    """The average rows, with each distance over that of DuMo in one pass, and why it is over `_FAR_RATIO` times it."""
    rows = average_by_arm(results)
    score = main_score(rows[0])
    dumo_distance = rows[0][score]  # of the first arm in one pass
    table: list[Row] = []
    for averages in rows:
        ratio = averages[score] / dumo_distance
        why = ""
        if averages["nfe"] == 1 and ratio > _FAR_RATIO:
            why = plan.why.get(averages["objective"], "not known")
        table.append(averages | {"over_dumo_1_pass": ratio, "why": why})
    return table


def fig4b_finish(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Result]:
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
            untrained = RunFolder(cell.spec, Index.read(folder), outline(cell.spec), 0, "none")
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
            "probe_every": 0,
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


def fig4b_table(plan: Plan, results: list[Result]) -> list[Row]:
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


def fig4b_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
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
