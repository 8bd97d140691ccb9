"""Our own plans: their tables, charts and pictures, where these are special. The plans are YAML.

Functions are named after the plan and what they make: `fair_table`, `words_draw`, `best_charts`. The views of
`dumo.lab.reproduce` say which plan has which, and call them: `_table` makes rows of the results of cells, `_charts`
draws the table, `_draw` writes pictures that need the nets, and returns their paths.
"""

import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from math import fsum, hypot, log
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any

import torch
from PIL import Image

from dumo.config.spec import Evaluation
from dumo.data import Data
from dumo.encoders.classifier import digits
from dumo.evaluation.frechet import Moments, frechet_distance
from dumo.evaluation.measures import features_of
from dumo.flow.generate import labels_in_turn
from dumo.io import picture, weights
from dumo.lab import arm_picture
from dumo.lab.cell import Result, Row
from dumo.lab.paper import far_column
from dumo.lab.plan import Cost, Plan
from dumo.lab.table import average_by_arm, error_of_mean, group_by_arm, main_score, rows_of_all_passes
from dumo.report import chart, gallery
from dumo.run.sampler import Sampler
from dumo.runtime.random import noise
from dumo.runtime.text import nfe_text

_FEATURES = {"digits": digits.features, "cifar10-features": features_of}  # by the kind of the protocol
_MAX_IMAGES = 50_000  # by whose features classes are judged: all of CIFAR-10
_MAX_SAMPLES = 4000  # that a class FD takes in all, 400 of each of 10 classes: ours
Curve = Sequence[tuple[float, float, float | None]]  # points: budget, distance, and the deviation of the distance
# the names of heads and metric in the charts of `fair`
_TWO_HEADS = "two heads"
_ADAPTIVE = "one head, MeanFlow's metric"
_ONE_HEAD = "one head"
# the columns of `words` that averages give
_SCORES = (
    "nfe",
    "class_mmd",
    "class_mmd_sd",
    "mmd",
    "mmd_sd",
    "error",
    "fd",
    "fd_sd",
    "precision",
    "recall",
    "accuracy",
)


def fair_table(plan: Plan, results: list[Result]) -> list[Row]:
    """The averages, with a column more: the share of far jumps."""
    return average_by_arm(results, far_column)


def fair_charts(plan: Plan, table: list[Row]) -> dict[str, Image.Image]:
    """A chart per number of passes: a line per distribution of times, with a mark for each choice of heads."""
    charts: dict[str, Image.Image] = {}
    score = main_score(table[0])
    for nfe in dict.fromkeys(row["nfe"] for row in table):
        points: dict[str, dict[str, chart.Dot]] = {}
        rows = [row for row in table if row["nfe"] == nfe]
        for row in sorted(rows, key=lambda row: row[score]):  # the best on top
            line = f"{row['law']}, {row['jumps']}, on {row['rows']}"
            points.setdefault(line, {})[_heads_name(row)] = chart.Dot(row[score], row.get(f"{score}_sd"))
        title = f"Two heads and one at the same times and cost, {nfe_text(nfe)}"
        names = [_TWO_HEADS, _ADAPTIVE, _ONE_HEAD]
        charts[f"fair-nfe{nfe}"] = chart.dots(title, chart.score_label(score), points, names)
    return charts


def _heads_name(row: Row) -> str:
    """What a chart calls the heads and the metric of a row."""
    if row["heads"] == "two":
        return _TWO_HEADS
    return _ADAPTIVE if row["metric"] == "adaptive" else _ONE_HEAD


def words_table(plan: Plan, results: list[Result]) -> list[Row]:
    """A row per data, condition and number of passes: means over seeds, and of one pass the class FD.

    The class FD is the mean distance of each class's samples to its own images; it is low where texts are understood.
    `class_fd` is by captions of the training, `class_fd_held` by templates that were held out of it.
    """
    rows: list[Row] = []
    for seeds in group_by_arm(results):
        first = seeds[0]
        run = first.trained.run
        real_moments = class_moments(run.data, run.evaluate.protocol.kind)
        class_fds: dict[str, float | None] = {"class_fd": _mean_class_fd(seeds, run.evaluate, real_moments)}
        class_fds["class_fd_held"] = None
        if run.conditions.captions is not None:
            class_fds["class_fd_held"] = _mean_class_fd(seeds, run.evaluate, real_moments, held=True)
        columns = {name: first.cell.labels[name] for name in (*plan.columns, "steps")}
        columns["MFLOP_per_pass"] = round(Cost(first.cell.spec).flops / 1e6, 2)
        for averages in average_by_arm(seeds):
            scores = {name: averages.get(name) for name in _SCORES}
            measured_fds = class_fds if averages["nfe"] == 1 else dict.fromkeys(class_fds)
            rows.append({**columns, **scores, **measured_fds, "seeds": averages["seeds"]})
    return rows


def _mean_class_fd(
    results: Sequence[Result], spec: Evaluation, real_moments: Sequence[Moments], *, held: bool = False
) -> float:
    """The class FD (`class_fd`), in the mean of several runs."""
    return fmean(class_fd(result.trained.sampler, spec, real_moments, held=held) for result in results)


def class_fd(sampler: Sampler, spec: Evaluation, real_moments: Sequence[Moments], *, held: bool = False) -> float:
    """The mean over classes of the Fréchet distance between one-pass samples and images, by their `real_moments`.

    `held`: the samples are asked for by templates that were held out of the training.
    """
    classes = sampler.data.labels
    c = labels_in_turn(min(_MAX_SAMPLES, 2 * len(spec.protocol.labels(classes))), classes)
    samples = sampler.sample(sampler.conditions.of_labels(c, held_out=held), nfe=1, seed=spec.seed).x
    features = _FEATURES[spec.protocol.kind](samples)
    distances = [frechet_distance(Moments.of(features[c == k]), moments) for k, moments in enumerate(real_moments)]
    return fmean(distances)


def class_moments(data: Data, kind: str) -> list[Moments]:
    """The moments of each class of the data, in the features of the protocol `kind`."""
    x, c = data.originals().reference(_MAX_IMAGES, 0)
    features = _FEATURES[kind](x)
    return [Moments.of(features[c == k]) for k in range(data.labels)]


def words_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write a picture for each data set: samples of every arm's first seed in one pass."""
    paths: list[Path] = []
    for data in dict.fromkeys(result.cell.labels["data"] for result in results):
        results_of_data = [result for result in results if result.cell.labels["data"] == data]
        path = folder / f"words-{data}-samples.png"
        picture.write_picture(path, arm_picture.sample_sheets(results_of_data))
        paths.append(path)
    return paths


def pretrained_draw(plan: Plan, results: list[Result], folder: Path) -> list[Path]:
    """Write two pictures of the arm `full`, the base tuned by DuMo, of its first seed.

    One has trajectories before, during and after its training (as Figs. 5 and 6). The other is what diffusers' own
    pipeline makes of it.
    """
    tuned = next(result for result in results if result.cell.arm == "full")
    grid_path = folder / "pretrained-grid.png"
    panels_by_mode = {mode.name: panels for mode, panels in gallery.trajectories(tuned.trained).items()}
    picture.write_picture(grid_path, gallery.join_panels(panels_by_mode))
    stock_path = folder / "pretrained-stock.png"
    stock_images = sample_by_diffusers(tuned, folder / f"exported-{tuned.trained.folder.name}")
    picture.write_picture(stock_path, stock_images)
    return [grid_path, stock_path]


def sample_by_diffusers(result: Result, folder: Path) -> Image.Image:
    """Images of all classes by diffusers' own pipeline: a row in one pass, and a row in two.

    The run is exported to `folder` first, unless that exists.
    """
    trained = result.trained
    if not folder.exists():
        # -P: no module of the working folder is imported there
        subprocess.run([sys.executable, "-P", "-m", "dumo", "export", str(trained.folder), str(folder)], check=True)
    pipe = _open_stock_pipeline(folder)

    # sample in one pass, and in two
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


def _open_stock_pipeline(folder: Path) -> Any:  # noqa: ANN401, a pipeline of diffusers
    """Diffusers' own pipeline of an exported run, without autoencoder and text encoders."""
    diffusers: Any = import_module("diffusers")  # typed as if a pipeline needed its text encoders
    model = diffusers.SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    missing_parts: dict[str, None] = {"vae": None}
    for number in ("", "_2", "_3"):
        missing_parts[f"text_encoder{number}"] = None
        missing_parts[f"tokenizer{number}"] = None
    pipe = diffusers.StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, **missing_parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _curve(rows: Sequence[Row], name: str, nfe: int = 1) -> list[chart.CurvePoint]:
    """The curve of the arm `name` at one number of passes: budget, distance and its deviation, by budget."""
    score = main_score(rows[0])
    arm_rows = [row for row in rows if (row["arm"], row["nfe"]) == (name, nfe)]
    return sorted(chart.CurvePoint(row["budget"], row[score], row[f"{score}_sd"]) for row in arm_rows)


def _first_distance(rows: Sequence[Row], nfe: int = 1) -> float:
    """The distance of the table's first arm at a budget of 1."""
    return next(y for budget, y, _ in _curve(rows, rows[0]["arm"], nfe) if budget == 1)


def scaling_table(plan: Plan, results: list[Result]) -> list[Row]:
    """The averages, with two columns more: `slope` and its standard error, `slope_error`.

    The slope is p where the distance is proportional to budget^p, fitted to each seed and averaged. Seeds with one
    budget are left out; None where all are.
    """
    rows = average_by_arm(results)
    score = main_score(rows[0])
    curves: dict[tuple[str, int], dict[int, list[chart.CurvePoint]]] = {}  # by arm and number of passes, then by seed
    for result in results:
        labels_of_cell = result.cell.labels
        for row in rows_of_all_passes(result.report):
            by_seed = curves.setdefault((labels_of_cell["arm"], row["nfe"]), {})
            point = chart.CurvePoint(labels_of_cell["budget"], row[score], row[f"{score}_sd"])
            by_seed.setdefault(result.cell.spec.train.seed, []).append(point)

    table: list[Row] = []
    for row in rows:
        curves_of_seeds = curves[row["arm"], row["nfe"]].values()
        slopes = [fit_power_law(points) for points in curves_of_seeds if len(points) > 1]
        slope = None
        slope_error = None
        if slopes:
            slope = fmean(value for value, _ in slopes)
            slope_error = error_of_mean(slopes)
        table.append(row | {"slope": slope, "slope_error": slope_error})
    return table


def fit_power_law(points: Curve) -> tuple[float, float]:
    """Fit distance = a budget^slope, by least squares of log distance on log budget.

    Returns the slope and its standard error, which follows from the deviations of the distances.
    """
    x = [log(budget) for budget, _, _ in points]
    y = [log(distance) for _, distance, _ in points]
    mean_x = fmean(x)
    centred = [value - mean_x for value in x]
    errors = [a * (sd or 0.0) / distance for a, (_, distance, sd) in zip(centred, points, strict=True)]
    slope_error = hypot(*errors) / fsum(a * a for a in centred)
    return linear_regression(x, y).slope, slope_error


def best_charts(plan: Plan, table: list[Row], passes: Sequence[int] = (1, 2)) -> dict[str, Image.Image]:
    """Distance against budget, a chart per number of passes; a dashed line is the first arm at a budget of 1.

    The table's first arm is DuMo untuned, its second DuMo tuned. Arms whose name begins with + are left out.
    """
    arms = list(dict.fromkeys(row["arm"] for row in table if not row["arm"].startswith("+")))
    untuned, tuned, *rivals = arms
    unit_steps = next(row["steps"] for row in table if row["arm"] == untuned and row["budget"] == 1)
    x_label = f"counted operations, over those of {unit_steps:,} steps of {untuned}"
    charts: dict[str, Image.Image] = {}
    for nfe in passes:
        charts[f"{plan.name}-nfe{nfe}"] = chart.curves(
            f"What a budget buys, {nfe_text(nfe)}",
            x_label,
            chart.score_label(main_score(table[0])),
            {name: _curve(table, name, nfe) for name in (tuned, *sorted(rivals), untuned)},
            log_x=True,
            level=chart.Level(_first_distance(table, nfe), f"{untuned} at 1"),
        )
    return charts
