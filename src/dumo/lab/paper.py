"""Figures and tables of the paper: their tables, charts and pictures, where these are special. The plans are YAML."""

from collections.abc import Iterator
from itertools import islice
from math import log
from pathlib import Path
from typing import Any

from PIL import Image

from dumo.evaluation.word import MERITS, word
from dumo.flow import generate
from dumo.io import picture
from dumo.lab import chart
from dumo.lab.cell import Result
from dumo.lab.plan import Plan
from dumo.lab.table import Row, averaged, main_score
from dumo.run import gallery
from dumo.run.evaluation.evaluate import evaluator_of, row
from dumo.run.plan import plan as counts
from dumo.runtime.progress import no_bar

JUDGED = (1, 2, 50)  # passes of Fig. 5: few, and as many as the velocity needs
LOWEST = {(2.0, 2.0): 4.06}  # of Fig. 4c, Sec. 4.4
FAR = 3.0  # times the first arm's distance, beyond which the zoo says why


def far(one: Result) -> Row:
    """P(t - r > 0.9), the share of rows where one-step sampling is taught, as a column."""
    return {"far": round(counts.far(one.cell.spec.objective), 6)}


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
    for one in results:
        ratio, mmd2 = one.cell.labels["velocity_ratio"], one.report["results"][0]["mmd2"]
        title = "DuMo" if ratio is None else f"MeanFlow, velocity ratio {ratio:g}"
        made = one.trained.sampler.sample(generate.labels(2000, 0), nfe=1).x
        panels[f"{title}\nMMD² {mmd2:.2g}"] = picture.scatter(real, {"": made})
    panels["grey: data\nred: samples of one pass"] = picture.scatter(real, {"": real[:0]})
    path = folder / "fig3.png"
    picture.write_picture(path, picture.gathered(panels, 4))
    return [path]


def fig4a_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """Two curves, share on the velocity to the right, distance upwards."""
    score = main_score(table[0])
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    for of in table:
        what = "β of its loss" if of["objective"] == "DuMo" else "velocity ratio of its rows"
        point = of["share_on_velocity"], of[score], of.get(f"{score}_sd")
        points.setdefault(f"{of['objective']}, {what}", []).append(point)
    return {
        "fig4a": chart.curves("Share on the velocity, one pass", "share on the velocity", chart.axis(score), points)
    }


def fig4c_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per pair: the distance, its logarithm, and the share of rows where one-step sampling is taught."""
    return [
        of | {"log": log(of[main_score(of)]), "paper_log_fid_b2_10k": LOWEST.get((of["theta_1"], of["theta_2"]))}
        for of in averaged(results, far)
    ]


def fig4c_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """The grid, theta_1 to the right, theta_2 upwards, in colours and numbers; the lowest is bold."""
    score = main_score(table[0])
    values = {(of["theta_1"], of["theta_2"]): log(of[score]) for of in table}
    scale = f"log of the {word(MERITS, score).title} (lower is better)"
    return {"fig4c": chart.heat("t ~ Beta(θ₁, θ₂), one pass", "θ₁", "θ₂", values, scale)}


def fig5_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per objective, reading, step and number of passes: the first of the protocol's distances to the data."""
    return [{"objective": one.cell.labels["objective"], **of} for one in results for of in measured(one)]


def measured(one: Result) -> Iterator[Row]:
    """How near samples come to the data after each milestone, by reading and number of passes."""
    trained, spec = one.trained, one.trained.run
    evaluator = evaluator_of(trained.sampler, spec.evaluate, no_bar)
    c = spec.evaluate.protocol.labels(spec.data.classes)
    for step, file in gallery.stages(trained.folder, trained.step).items():
        then = gallery.open_at(trained, step, file)
        for reading in gallery.choose(then.sampler, None, JUDGED):
            for n in JUDGED:
                scores = row(then.sampler, evaluator, reading.at(n), n, c, spec.evaluate.seed)
                passes_solver_distance = islice(scores.items(), 3)
                yield {"reading": reading.letter, "step": step, **dict(passes_solver_distance)}


def fig5_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Trajectories of all readings in one picture, class grids of each objective, and each panel by itself."""
    files, rows = list[Path](), dict[str, Any]()
    for one in results:
        title = one.cell.labels["objective"]
        panels = gallery.trajectories(one.trained)
        rows |= {f"{title},\n{reading.name}": of for reading, of in panels.items()}
        grids = gallery.class_grids(one.trained, None, nfe=(1, 2))
        files += gallery.write_trajectories(folder / title.lower(), panels)
        files += gallery.write_class_grids(folder / title.lower(), grids)
    picture.write_picture(folder / "fig5.png", gallery.side_by_side(rows))
    return [folder / "fig5.png", *files]


def zoo_table(plan: Plan, results: list[Result]) -> list[Row]:
    """Every distance over DuMo's in one pass; and where one pass is over three of these, why."""
    rows = averaged(results)
    first = rows[0][score := main_score(rows[0])]
    found: list[Row] = []
    for of in rows:
        over = of[score] / first
        why = plan.why.get(of["objective"], "not known") if of["nfe"] == 1 and over > FAR else ""
        found.append(of | {"over_dumo_1_pass": over, "why": why})
    return found
