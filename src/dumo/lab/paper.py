"""Columns, charts and pictures of the paper's figures and tables that other plans do not have.

A `View` of `dumo.lab.reproduce` calls the functions of a figure in this order: `*_table` computes the rows from the
results, `*_charts` plots the table, and `*_draw` writes pictures that need the trained networks. Figure 4b times steps
instead of training, in `dumo.lab.fig4b`.
"""

from collections.abc import Iterator, Mapping
from math import log
from pathlib import Path
from statistics import fmean, stdev

from PIL import Image

from dumo.config.word import MERITS, word
from dumo.flow import sampling
from dumo.io import picture
from dumo.lab.cell import Result, Row
from dumo.lab.experiment import Plan
from dumo.lab.result_table import average_by_arm, group_by_arm, main_score
from dumo.plan.facts import far_share
from dumo.report import chart, evaluation, gallery
from dumo.report.sample_to_files import sample_to_files
from dumo.run.judge import evaluator_of
from dumo.runtime.progress import no_bar

# The NFEs at which Fig. 5 is evaluated. The velocity needs the largest one.
_FIG5_NFES = (1, 2, 50)
# The lowest value of Fig. 4c in the paper, by (theta_1, theta_2); Sec. 4.4.
_FIG4C_LOG_FID = {(2.0, 2.0): 4.06}
# The zoo's table explains distances above this multiple of the first arm's distance.
_EXPLAINED_RATIO = 3.0


def far_column(result: Result) -> Row:
    """Return the column `far`: P(t - r > 0.9), the share of rows that train one-step sampling."""
    return {"far": round(far_share(result.cell.spec.objective), 6)}


def fig3_table(plan: Plan, results: list[Result]) -> list[Row]:
    """Tabulate, by arm, MMD^2 of one-step samples over the seeds, and the sd of MMD^2 between two draws of data."""
    rows: list[Row] = []
    for results_of_arm in group_by_arm(results):
        first = results_of_arm[0]
        distances = [result.report["results"][0]["mmd2"] for result in results_of_arm]
        rows.append(
            {
                **first.cell.labels,
                "mmd2": fmean(distances),
                "mmd2_sd": stdev(distances) if len(distances) > 1 else None,
                "null_sd": first.report["baselines"]["null"]["sd"],
                "seeds": len(distances),
            }
        )
    return rows


def fig3_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write fig3.png, a panel per arm as in the paper: data in grey, one-step samples of the first seed in red."""
    real, _ = results[0].trained.spec.data.open().reference(4000, 0)
    panels: dict[str, Image.Image] = {}
    for result, *_ in group_by_arm(results):
        ratio = result.cell.labels["velocity_ratio"]
        mmd2 = result.report["results"][0]["mmd2"]
        title = "DuMo" if ratio is None else f"MeanFlow, velocity ratio {ratio:g}"
        samples = result.trained.make_samples(sampling.labels_in_turn(2000, 0), nfe=1).x
        panels[f"{title}\nMMD² {mmd2:.2g}"] = picture.scatter(real, {"": samples})
    panels["grey: data\nred: samples at 1 NFE"] = picture.scatter(real, {"": real[:0]})
    path = folder / "fig3.png"
    picture.write_picture(path, picture.labelled_grid(list(panels.values()), 4, list(panels)))
    return [path]


def fig4a_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """Plot distance over the share of training on the velocity, a curve per objective."""
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
    """Tabulate, by theta, the distance, its logarithm, and the share of rows that train one-step sampling."""
    rows: list[Row] = []
    for averages in average_by_arm(results, far_column):
        thetas = (averages["theta_1"], averages["theta_2"])
        log_distance = log(averages[main_score(averages)])
        rows.append({**averages, "log": log_distance, "paper_log_fid_b2_10k": _FIG4C_LOG_FID.get(thetas)})
    return rows


def fig4c_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """Plot the log distance as a heat map over theta_1 and theta_2, with the lowest value in bold."""
    score = main_score(table[0])
    values = {(averages["theta_1"], averages["theta_2"]): log(averages[score]) for averages in table}
    scale = f"log of the {word(MERITS, score).title} (lower is better)"
    return {"fig4c": chart.heat_map("t ~ Beta(θ₁, θ₂), 1 NFE", "θ₁", "θ₂", values, scale)}


def fig5_table(plan: Plan, results: list[Result]) -> list[Row]:
    """Tabulate the protocol's first distance by objective, sampling mode, training step and NFE."""
    rows: list[Row] = []
    for result in results:
        for distances in _distances_by_milestone(result):
            rows.append({"objective": result.cell.labels["objective"], **distances})
    return rows


def _distances_by_milestone(result: Result) -> Iterator[Row]:
    """Yield the first distance for each milestone of a run, sampling mode and NFE."""
    trained = result.trained
    spec = trained.spec
    evaluator = evaluator_of(spec, spec.evaluate, trained.device, no_bar)
    c = spec.evaluate.protocol.labels(spec.data.classes)
    for step, file in gallery.milestone_files(trained.folder, trained.step).items():
        milestone = gallery.open_milestone(trained, step, file)
        for mode in gallery.choose_modes(spec, _FIG5_NFES):
            for nfe in _FIG5_NFES:
                solver = mode.solver_for(nfe)
                scores = evaluation.score_passes(milestone, evaluator, solver, nfe, c, spec.evaluate.seed)
                first_distance = next(name for name in scores if name not in ("nfe", "solver"))
                columns = {name: scores[name] for name in ("nfe", "solver", first_distance)}
                yield {"reading": mode.letter, "step": step, **columns}


def fig5_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write trajectories of all objectives and sampling modes to fig5.png, and each objective's panels and samples."""
    files: list[Path] = []
    panels_by_title: dict[str, Mapping[int, Image.Image]] = {}
    for result in results:
        title = result.cell.labels["objective"]
        panels = gallery.trajectories(result.trained)
        for mode, panels_by_step in panels.items():
            panels_by_title[f"{title},\n{mode.name}"] = panels_by_step
        files += gallery.write_trajectories(folder / title.lower(), panels)
        files += sample_to_files(result.trained, folder / title.lower(), nfe=(1, 2))
    picture.write_picture(folder / "fig5.png", gallery.join_panels(panels_by_title))
    return [folder / "fig5.png", *files]


def zoo_table(plan: Plan, results: list[Result]) -> list[Row]:
    """Average over seeds, and add each distance relative to DuMo's at 1 NFE, or None if DuMo failed.

    Rows at 1 NFE above `_EXPLAINED_RATIO` times DuMo's distance get the plan's explanation.
    """
    rows = average_by_arm(results)
    score = main_score(rows[0])
    scales = plan.scales.values()
    first_arms = [arms[0].labels["objective"] for arms in (plan.arms, *(scale.arms for scale in scales)) if arms]
    dumo_distances = [row[score] for row in rows if row["objective"] in first_arms and row["nfe"] == 1]
    table: list[Row] = []
    for averages in rows:
        ratio = averages[score] / dumo_distances[0] if dumo_distances else None
        explanation = ""
        if averages["nfe"] == 1 and ratio is not None and ratio > _EXPLAINED_RATIO:
            explanation = plan.explanations.get(averages["objective"], "not known")
        table.append(averages | {"over_dumo_1_pass": ratio, "why": explanation})
    return table
