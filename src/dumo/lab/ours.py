"""Our own plans: their tables, charts and pictures, where these are special. The plans are YAML."""

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
from dumo.lab.cell import Result, Row, averaged, by_arm, by_passes, error_of_mean, main_score
from dumo.lab.paper import far
from dumo.lab.plan import Cost, Plan
from dumo.report import chart, gallery
from dumo.run.judge import training_data
from dumo.run.sampler import Sampler
from dumo.runtime.progress import passes_text
from dumo.runtime.random import noise

FEATURES = {"digits": digits.features, "cifar10-features": features_of}
MOST = 4000  # samples of a class FD, 400 a class: ours
Curve = Sequence[tuple[float, float, float | None]]  # budget, distance, its deviation
SCORES = ("nfe", "mmd", "mmd_sd", "error", "fd", "fd_sd", "fd_grey", "fd_grey_sd", "precision", "recall", "accuracy")


def fair_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per combination and number of passes."""
    return averaged(results, far)


def fair_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """A line per law, two heads and one on it, the best on top; a picture per number of passes."""
    drawn: dict[str, Image.Image] = {}
    score, names = main_score(table[0]), ["two heads", "one head, MeanFlow's metric", "one head"]
    for nfe in dict.fromkeys(row["nfe"] for row in table):
        points: dict[str, dict[str, chart.Dot]] = {}
        for row in sorted((row for row in table if row["nfe"] == nfe), key=lambda row: row[score]):
            name = names[0] if row["heads"] == "two" else names[1] if row["metric"] == "adaptive" else names[2]
            line = f"{row['law']}, {row['jumps']}, on {row['rows']}"
            points.setdefault(line, {})[name] = chart.Dot(row[score], row.get(f"{score}_sd"))
        title = f"Two heads and one at the same times and cost, {passes_text(nfe)}"
        drawn[f"fair-nfe{nfe}"] = chart.dots(title, chart.score_label(score), points, names)
    return drawn


def words_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per data, condition and number of passes: means over seeds, and the class FD of one pass.

    That is the mean distance of each class's samples to its own images, by captions of the training and, `held`, by
    templates that it never saw: low where texts are understood.
    """
    rows: list[Row] = []
    for same in by_arm(results):
        run = same[0].trained.run
        real = class_moments(run.data, run.evaluate.protocol.kind, run.train.batch)
        by_class: Row = {"class_fd": fmean(class_fd(one.trained.sampler, run.evaluate, real) for one in same)}
        by_class["class_fd_held"] = None
        if run.conditions.captions is not None:
            held = (class_fd(one.trained.sampler, run.evaluate, real, held=True) for one in same)
            by_class["class_fd_held"] = fmean(held)
        columns = {name: same[0].cell.labels[name] for name in (*plan.columns, "steps")}
        columns |= {"MFLOP_per_pass": round(Cost(same[0].cell.spec).flops / 1e6, 2)}
        for row in averaged(same):
            apart = by_class if row["nfe"] == 1 else dict.fromkeys(by_class)
            rows.append({**columns, **{name: row.get(name) for name in SCORES}, **apart, "seeds": row["seeds"]})
    return rows


def class_fd(sampler: Sampler, spec: Evaluation, real: Sequence[Moments], *, held: bool = False) -> float:
    """The mean over classes of the Fréchet distance of their samples, of one pass, to their images, `real`."""
    many = sampler.data.labels
    c = labels_in_turn(min(MOST, 2 * len(spec.protocol.labels(many))), many)
    made = sampler.sample(sampler.conditions.of(c, held=held), nfe=1, seed=spec.seed).x
    fake = FEATURES[spec.protocol.kind](made)
    return fmean(frechet_distance(Moments.of(fake[c == k]), of) for k, of in enumerate(real))


def class_moments(data: Data, kind: str, batch: int) -> list[Moments]:
    """Those of the features, of this kind, of the data's images, by class."""
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
    for one, *_ in by_arm(results):  # a picture each, for each has steps of its own
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
    none = dict.fromkeys(("vae", *(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3"))))
    pipe = diffusers.StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, **none)
    pipe.set_progress_bar_config(disable=True)
    run, codes = trained.run, weights.load(folder / "codes.safetensors")
    n, side, m = run.data.classes, 8 * run.data.shape[-1], run.sample.solver.m  # pyright: ignore[reportAttributeAccessIssue]
    tokens = {"prompt_embeds": codes["tokens"][:n], "pooled_prompt_embeds": codes["pooled"][:n]}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # of the noise between two passes
        z = noise(0, range(n), 0, run.data.shape)
        made = [
            pipe(**tokens, latents=z, sigmas=sigmas, guidance_scale=1.0, height=side, width=side, output_type="latent")
            for sigmas in ([1.0], [1.0, m])
        ]
    names = [run.conditions.name(c) for c in range(n)]
    return picture.sheet(
        picture.to_rows(trained.sampler.decode(torch.cat([out.images for out in made]))), n, titles=names
    )


def best_table(plan: Plan, results: list[Result]) -> list[Row]:
    """What a budget buys: a row per arm, budget and number of passes.

    `even_at` is the budget at which an arm is as near in one pass as the first is at a budget of 1: read off between
    its own budgets, straight where both axes are logarithms; None beyond them.
    """
    rows = averaged(results)
    return [row | {"even_at": even(curve(rows, row["arm"]), level(rows)) if row["nfe"] == 1 else None} for row in rows]


def curve(rows: Sequence[Row], name: str, nfe: int = 1) -> list[chart.CurvePoint]:
    """The curve of one arm."""
    score = main_score(rows[0])
    own = [row for row in rows if (row["arm"], row["nfe"]) == (name, nfe)]
    return sorted(chart.CurvePoint(row["budget"], row[score], row[f"{score}_sd"]) for row in own)


def level(rows: Sequence[Row], nfe: int = 1) -> float:
    """The distance of the first arm at a budget of 1."""
    return next(y for budget, y, _ in curve(rows, rows[0]["arm"], nfe) if budget == 1)


def even(points: Curve, to: float) -> float | None:
    """Where a curve comes down to this distance."""
    for (a, high, _), (b, low, _) in pairwise(points):
        if low <= to <= high and low < high:
            return exp(log(a) + log(b / a) * log(high / to) / log(high / low))
    return None


def scaling_table(plan: Plan, results: list[Result]) -> list[Row]:
    """The same with `slope`, the power of the budget by which the distance changes, and its standard error."""
    rows = best_table(plan, results)
    score = main_score(rows[0])
    points: dict[tuple[str, int, int], list[chart.CurvePoint]] = {}
    for one in results:
        for row in by_passes(one.report):
            key = (one.cell.labels["arm"], row["nfe"], one.cell.spec.train.seed)
            point = chart.CurvePoint(one.cell.labels["budget"], row[score], row[f"{score}_sd"])
            points.setdefault(key, []).append(point)

    def fitted(row: Row) -> Row:
        own = [power(curve) for key, curve in points.items() if key[:2] == (row["arm"], row["nfe"])]
        return {"slope": fmean(slope for slope, _ in own), "slope_error": error_of_mean(own)}

    return [row | fitted(row) for row in rows]


def power(points: Curve) -> tuple[float, float]:
    """Of a curve y = x^slope the slope by least squares where both axes are logarithms, and its error by those of y."""
    x, y = [log(x) for x, _, _ in points], [log(y) for _, y, _ in points]
    off = [value - fmean(x) for value in x]
    error = hypot(*(a * (sd or 0.0) / at for a, (_, at, sd) in zip(off, points, strict=True)))
    return linear_regression(x, y).slope, error / fsum(a * a for a in off)


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
            {name: curve(table, name, nfe) for name in (ours, *sorted(rivals), paper)},
            log_x=True,
            level=chart.Level(level(table, nfe), f"{paper} at 1"),
        )
        for nfe in passes
    }
