"""Our own plans: their tables, charts and pictures, where these are special. The plans are YAML.

Functions are named after the plan and what they make: `fair_table`, `words_draw`, `best_charts`. The views of
`dumo.lab.reproduce` say which plan has which.
"""

import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from math import exp, fsum, hypot, log
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

import torch
from PIL import Image

from dumo.config.tree import Evaluation
from dumo.data import Data
from dumo.encoders.classifier import digits
from dumo.evaluation.distance import Moments, frechet_distance
from dumo.evaluation.shipped import features_of
from dumo.flow.generate import labels_in_turn
from dumo.io import picture, weights
from dumo.lab import arm
from dumo.lab.cell import Result, Row, average_by_arm, error_of_mean, group_by_arm, main_score, rows_by_passes
from dumo.lab.paper import far_column
from dumo.lab.plan import Cost, Plan
from dumo.report import chart, gallery
from dumo.run.judge import training_data
from dumo.run.sampler import Sampler
from dumo.runtime.progress import passes_text
from dumo.runtime.random import noise

FEATURES = {"digits": digits.features, "cifar10-features": features_of}
MAX_SAMPLES = 4000  # of a class FD, 400 a class: ours
Curve = Sequence[tuple[float, float, float | None]]  # budget, distance, its deviation
TWO_HEADS = "two heads"
ADAPTIVE = "one head, MeanFlow's metric"
ONE_HEAD = "one head"
SCORES = ("nfe", "mmd", "mmd_sd", "error", "fd", "fd_sd", "fd_grey", "fd_grey_sd", "precision", "recall", "accuracy")


def fair_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per combination and number of passes."""
    return average_by_arm(results, far_column)


def fair_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """A line per law, two heads and one on it, the best on top; a picture per number of passes."""
    charts: dict[str, Image.Image] = {}
    score = main_score(table[0])
    for nfe in dict.fromkeys(row["nfe"] for row in table):
        points: dict[str, dict[str, chart.Dot]] = {}
        of_passes = [row for row in table if row["nfe"] == nfe]
        for row in sorted(of_passes, key=lambda row: row[score]):
            line = f"{row['law']}, {row['jumps']}, on {row['rows']}"
            points.setdefault(line, {})[_heads_name(row)] = chart.Dot(row[score], row.get(f"{score}_sd"))
        title = f"Two heads and one at the same times and cost, {passes_text(nfe)}"
        names = [TWO_HEADS, ADAPTIVE, ONE_HEAD]
        charts[f"fair-nfe{nfe}"] = chart.dots(title, chart.score_label(score), points, names)
    return charts


def _heads_name(row: Row) -> str:
    """The name in a chart of a row's heads and metric."""
    if row["heads"] == "two":
        return TWO_HEADS
    return ADAPTIVE if row["metric"] == "adaptive" else ONE_HEAD


def words_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per data, condition and number of passes: means over seeds, and the class FD of one pass.

    That is the mean distance of each class's samples to its own images, by captions of the training and, `held`, by
    templates that it never saw: low where texts are understood.
    """
    rows: list[Row] = []
    for same in group_by_arm(results):
        run = same[0].trained.run
        real = class_moments(run.data, run.evaluate.protocol.kind, run.train.batch)
        by_class: Row = {"class_fd": fmean(class_fd(one.trained.sampler, run.evaluate, real) for one in same)}
        by_class["class_fd_held"] = None
        if run.conditions.captions is not None:
            held = (class_fd(one.trained.sampler, run.evaluate, real, held=True) for one in same)
            by_class["class_fd_held"] = fmean(held)
        columns = {name: same[0].cell.labels[name] for name in (*plan.columns, "steps")}
        columns |= {"MFLOP_per_pass": round(Cost(same[0].cell.spec).flops / 1e6, 2)}
        for row in average_by_arm(same):
            apart = by_class if row["nfe"] == 1 else dict.fromkeys(by_class)
            rows.append({**columns, **{name: row.get(name) for name in SCORES}, **apart, "seeds": row["seeds"]})
    return rows


def class_fd(sampler: Sampler, spec: Evaluation, real: Sequence[Moments], *, held: bool = False) -> float:
    """The mean over classes of the Fréchet distance of their samples, of one pass, to their images, `real`."""
    classes = sampler.data.labels
    c = labels_in_turn(min(MAX_SAMPLES, 2 * len(spec.protocol.labels(classes))), classes)
    samples = sampler.sample(sampler.conditions.of(c, held=held), nfe=1, seed=spec.seed).x
    features = FEATURES[spec.protocol.kind](samples)
    distances = [frechet_distance(Moments.of(features[c == k]), moments) for k, moments in enumerate(real)]
    return fmean(distances)


def class_moments(data: Data, kind: str, batch: int) -> list[Moments]:
    """The moments of the data's images by class, of the features of a kind of protocol."""
    x, c = training_data(data).reference(batch, 0)
    features = FEATURES[kind](x)
    return [Moments.of(features[c == k]) for k in range(data.labels)]


def words_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """What the first seeds make in one pass, a picture for each of the data."""
    files: list[Path] = []
    for data in dict.fromkeys(one.cell.labels["data"] for one in results):
        files.append(folder / f"words-{data}-samples.png")
        picture.write_picture(files[-1], arm.samples([one for one in results if one.cell.labels["data"] == data]))
    return files


def pretrained_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Trajectories of the base and of the first seed of each way: before, during and after (as Figs. 5 and 6).

    And what the stock pipeline makes of the first one that was tuned, once exported.
    """
    files: list[Path] = []
    for one, *_ in group_by_arm(results):  # a picture each, for each has steps of its own
        files.append(folder / f"pretrained-{one.cell.name.rpartition('-')[0]}.png")
        rows = {reading.name: row for reading, row in gallery.trajectories(one.trained).items()}
        picture.write_picture(files[-1], gallery.side_by_side(rows))
    files.append(folder / "pretrained-stock.png")
    picture.write_picture(files[-1], by_stock(results[1], folder / "exported"))
    return files


def by_stock(one: Result, folder: Path) -> Image.Image:
    """An image of each class by diffusers' own pipeline of an export, in one pass and in two; rows are passes."""
    trained = one.trained
    diffusers: Any = import_module("diffusers")  # typed as if a pipeline needed its text encoders
    if not folder.exists():
        # -P: no module of the folder we are in is imported there
        subprocess.run([sys.executable, "-P", "-m", "dumo", "export", str(trained.folder), str(folder)], check=True)
    model = diffusers.SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    missing_parts: dict[str, None] = {"vae": None}
    for number in ("", "_2", "_3"):
        missing_parts[f"text_encoder{number}"] = None
        missing_parts[f"tokenizer{number}"] = None
    pipe = diffusers.StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, **missing_parts)
    pipe.set_progress_bar_config(disable=True)
    run = trained.run
    codes = weights.load(folder / "codes.safetensors")
    n = run.data.classes
    side = 8 * run.data.shape[-1]
    m = run.sample.solver.m  # pyright: ignore[reportAttributeAccessIssue], of Restart
    tokens = {"prompt_embeds": codes["tokens"][:n], "pooled_prompt_embeds": codes["pooled"][:n]}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # of the noise between two passes
        z = noise(0, range(n), 0, run.data.shape)
        latents: list[torch.Tensor] = []
        for sigmas in ([1.0], [1.0, m]):
            output = pipe(
                **tokens,
                latents=z,
                sigmas=sigmas,
                guidance_scale=1.0,
                height=side,
                width=side,
                output_type="latent",
            )
            latents.append(output.images)
    names = [run.conditions.name(c) for c in range(n)]
    pixels = picture.to_rows(trained.sampler.decode(torch.cat(latents)))
    return picture.sheet(pixels, n, titles=names)


def best_table(plan: Plan, results: list[Result]) -> list[Row]:
    """What a budget buys: a row per arm, budget and number of passes.

    `even_at` is the budget at which an arm is as near in one pass as the first is at a budget of 1: read off between
    its own budgets, straight where both axes are logarithms; None beyond them.
    """
    rows = average_by_arm(results)
    table: list[Row] = []
    for row in rows:
        even_at = None
        if row["nfe"] == 1:
            even_at = even_budget(_curve(rows, row["arm"]), _level(rows))
        table.append(row | {"even_at": even_at})
    return table


def _curve(rows: Sequence[Row], name: str, nfe: int = 1) -> list[chart.CurvePoint]:
    """The curve of one arm."""
    score = main_score(rows[0])
    own = [row for row in rows if (row["arm"], row["nfe"]) == (name, nfe)]
    return sorted(chart.CurvePoint(row["budget"], row[score], row[f"{score}_sd"]) for row in own)


def _level(rows: Sequence[Row], nfe: int = 1) -> float:
    """The distance of the first arm at a budget of 1."""
    return next(y for budget, y, _ in _curve(rows, rows[0]["arm"], nfe) if budget == 1)


def even_budget(points: Curve, to: float) -> float | None:
    """The budget at which a curve comes down to this distance; None where it does not."""
    for (a, high, _), (b, low, _) in pairwise(points):
        if low <= to <= high and low < high:
            return exp(log(a) + log(b / a) * log(high / to) / log(high / low))
    return None


def scaling_table(plan: Plan, results: list[Result]) -> list[Row]:
    """The same with `slope`, the power of the budget by which the distance changes, and its standard error."""
    rows = best_table(plan, results)
    score = main_score(rows[0])
    curves: dict[tuple[str, int], dict[int, list[chart.CurvePoint]]] = {}  # by arm and number of passes, then by seed
    for result in results:
        labels_of_cell = result.cell.labels
        for row in rows_by_passes(result.report):
            by_seed = curves.setdefault((labels_of_cell["arm"], row["nfe"]), {})
            point = chart.CurvePoint(labels_of_cell["budget"], row[score], row[f"{score}_sd"])
            by_seed.setdefault(result.cell.spec.train.seed, []).append(point)

    table: list[Row] = []
    for row in rows:
        slopes = [power(points) for points in curves[row["arm"], row["nfe"]].values()]
        slope = fmean(value for value, _ in slopes)
        table.append(row | {"slope": slope, "slope_error": error_of_mean(slopes)})
    return table


def power(points: Curve) -> tuple[float, float]:
    """Of a curve y = x^slope the slope by least squares where both axes are logarithms, and its error by those of y."""
    x = [log(budget) for budget, _, _ in points]
    y = [log(distance) for _, distance, _ in points]
    mean = fmean(x)
    centred = [value - mean for value in x]
    errors = [a * (sd or 0.0) / distance for a, (_, distance, sd) in zip(centred, points, strict=True)]
    slope_error = hypot(*errors) / fsum(a * a for a in centred)
    return linear_regression(x, y).slope, slope_error


def best_charts(plan: Plan, table: list[Row], passes: Sequence[int] = (1, 2)) -> dict[str, Image.Image]:
    """Distance against budget, a chart per number of passes, ours first, and where the paper's recipe is at 1."""
    arms = list(dict.fromkeys(row["arm"] for row in table if not row["arm"].startswith("+")))
    paper, ours, *rivals = arms
    steps = plan.at("laptop").steps
    return {
        f"{plan.name}-nfe{nfe}": chart.curves(
            f"What a budget buys, {passes_text(nfe)}",
            f"counted operations, over those of {steps:,} steps of {paper}",
            chart.score_label(main_score(table[0])),
            {name: _curve(table, name, nfe) for name in (ours, *sorted(rivals), paper)},
            log_x=True,
            level=chart.Level(_level(table, nfe), f"{paper} at 1"),
        )
        for nfe in passes
    }
