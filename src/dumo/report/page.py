"""A run as one page: what it makes, by which head, how near to the data, how it was trained and how it is judged.

The page is one file that needs no other, no script and no network. Numbers are made here, words stand in the template.
"""

import shlex
from collections.abc import Mapping, Sequence
from math import floor, log10, prod
from pathlib import Path
from typing import Any, cast

import jinja2
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dumo import dist, recipes
from dumo.config.load import dump
from dumo.config.spec import Run
from dumo.io import archive, file, picture
from dumo.io.json import read_json
from dumo.metrics.neighbours import Real, nearest
from dumo.preflight.show import show
from dumo.progress import Bar, no_bar
from dumo.random import stream
from dumo.report.figure import charts, embed, labelled
from dumo.report.gallery import PASSES, is_image, readings, within
from dumo.run.folder import RunFolder
from dumo.run.sample import sample
from dumo.sampling.generate import labels
from dumo.training import log
from dumo.types import Sample

ROWS, COLUMNS = 8, 10  # of a sheet of images; its columns are classes
GAP = 6  # pixels between images: digits fill their height
POINTS = 2000  # of a scatter; rows of a data set that are read for the page, if they are not all in memory
NEAR = 2**24  # pixels of data that are decoded for it: 256 images of 256 x 256
SHEET = "sheet"  # the samples by the run's own solver
SHIPPED = {"digits": "zoo", "moons": "fig3"}  # data: the packaged results that are of it

Pictures = Mapping[int, Image.Image]  # by number of passes


def write(opened: RunFolder, bar: Bar = no_bar) -> list[Path]:
    """Write pictures into report/ and report.html into the run's folder; return all paths, the page last.

    Raises UserError, before anything is written, where metrics.jsonl or evaluation.json is damaged.
    """
    run, folder, source = opened.run, opened.folder, opened.run.data.open()
    rows, judged = log.read_log(folder / "metrics.jsonl"), judgement(opened)
    real, c = source.reference(min(POINTS, NEAR // prod(run.pixels[1:])), run.sample.seed)
    real = opened.decode(real)

    made = make(opened, bar)
    drawn = {name: {n: look(run, x, real) for n, x in row.items()} for name, row in made.items()}
    sheets = drawn.pop(SHEET)
    pictures = {f"nfe{n}": sheet for n, sheet in sheets.items()} | {"trajectories": joined(run, drawn)}
    near = None
    if is_image(run) and source.size is not None:
        pictures["data"] = look(run, by_class(run, real, c), real)
        near = proximity(run, made[SHEET][min(sheets)], real)
        pictures["nearest"] = labelled({"sample": [near["samples"]], "nearest": [near["found"]]})

    page = render(
        opened,
        size=source.size,
        sheets=sheets,
        data=pictures.get("data"),
        trajectories=drawn,
        near=near,
        charts=charts(rows) if len(rows) > 1 else [],
        times=late(rows),
        judged=judged,
    )
    paths = [folder / "report" / f"{name}.png" for name in pictures]
    for path, image in zip(paths, pictures.values(), strict=True):
        archive.write_picture(path, image)
    file.write(folder / "report.html", page.encode())
    return [*paths, folder / "report.html"]


def render(opened: RunFolder, **parts: object) -> str:
    """The page, of these parts and of what the run says of itself. Whatever is put in is escaped."""
    run, shipped = opened.run, SHIPPED.get(opened.run.data.kind)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dumo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cast(dict[str, Any], environment.filters).update(number=number, large=large, spread=spread, embed=embed)
    return environment.get_template("report.html.j2").render(
        run=run,
        facts=show(run),
        folder=shlex.quote(str(opened.folder)),
        name=opened.folder.resolve().name,
        step=opened.step,
        weights=opened.weights,
        image=is_image(run),
        heads={letter: one.head for letter, one in readings(run).items()},
        shipped=shipped,
        others=recipes.results(shipped) if shipped else None,
        yaml=dump(run),
        versions=dist.versions(),
        **parts,
    )


def across(run: Run) -> int:
    """Columns of a sheet: a class each, the first ten."""
    return min(run.data.classes or COLUMNS, COLUMNS)


def make(opened: RunFolder, bar: Bar) -> dict[str, dict[int, Sample]]:
    """The samples of the page, by name and number of passes, image i always from the same noise."""
    run = opened.run
    many = labels(
        ROWS * across(run) if is_image(run) else POINTS,
        run.data.classes,
        range(across(run)) if run.data.classes else None,
    )
    few = many[: across(run)] if is_image(run) else many
    jobs, asked = [(SHEET, run.sample.solver, n, many) for n in run.sample.nfe], readings(run).values()
    jobs += [(one.title, one.solver, n, few) for one in asked for n in within(PASSES, run, asked)]
    made: dict[str, dict[int, Sample]] = {}
    done = 0
    with bar("sampling for the report", sum(n for _, _, n, _ in jobs)) as tick:
        for name, solver, n, c in jobs:
            made.setdefault(name, {})[n] = sample(opened, nfe=n, c=c, solver=solver).x
            tick(done := done + n, f"{name}, {n}")
    return made


def look(run: Run, x: Sample, real: Real) -> Image.Image:
    """Samples as a picture: a sheet with clear gaps, or red points before the grey truth."""
    if not is_image(run):
        return picture.scatter(real, {"": x})
    pixels = picture.to_rows(x)
    sheet, gaps = (picture.sheet(p, across(run), gap=GAP) for p in (pixels, 0 * pixels))
    sheet.putalpha(ImageOps.invert(gaps.convert("L")))  # a page may be dark
    return sheet


def by_class(run: Run, x: Real, c: Tensor) -> Sample:
    """The first rows of the data, in the order of a sheet; grey where a class has none among the rows read."""
    columns = [x[c == label][:ROWS] for label in range(across(run))]
    if not run.data.classes or not any(map(len, columns)):
        return x[: ROWS * COLUMNS]
    rows = min(len(column) for column in columns if len(column))
    grey = torch.zeros_like(x[:1]).expand(rows, *x.shape[1:])
    return torch.stack([column[:rows] if len(column) else grey for column in columns], 1).flatten(0, 1)


def joined(run: Run, drawn: Mapping[str, Pictures]) -> Image.Image:
    """All trajectories in one picture with labels: a row per number of passes, or, of points, a row per reading."""
    rows = [(name.split()[0], row) for name, row in drawn.items()]
    if is_image(run):
        return labelled([(f"{name} {n}", [p]) for name, row in rows for n, p in row.items()])
    return labelled([(name, list(row.values())) for name, row in rows], [f"NFE {n}" for n in rows[0][1]])


def proximity(run: Run, x: Sample, real: Real) -> dict[str, Any]:
    """How near samples lie to the data, in pixel space, and how near as many rows of the data lie to the other rows.

    A distance is Euclidean, over all pixels of images in [-1, 1]. The rows held out are keyed by the sampling seed; of
    little data they are half, and as many samples are counted.
    """
    distances, places = nearest(real, x)
    order = torch.randperm(len(real), generator=stream(run.sample.seed, "held out"))
    count, few = min(len(x), len(real) // 2), across(run)
    compared = {"samples": distances[: count or len(x)]}
    if count:
        compared["data, held against the rest of it"], _ = nearest(real[order[count:]], real[order[:count]])
    return {
        "samples": look(run, x[:few], real),
        "found": look(run, real[places[:few]], real),
        "distances": distances[:few].tolist(),
        "count": count or len(x),
        "rows": [{"name": name, "mean": d.mean().item(), "least": d.min().item()} for name, d in compared.items()],
    }


def late(rows: Sequence[log.Row]) -> dict[str, Any] | None:
    """Mean loss by bin of t over the last quarter of the training, row by row of the logged batches; None of no log."""
    if not rows:
        return None
    last = [row for row in rows if row["step"] > 0.75 * rows[-1]["step"]]
    counts = torch.tensor([row["counts"] for row in last], dtype=torch.float64)
    bins: dict[str, list[float]] = {}
    for part in last[0]["bins"]:
        means = torch.tensor([[value or 0.0 for value in row["bins"][part]] for row in last], dtype=torch.float64)
        bins[part] = ((means * counts).sum(0) / counts.sum(0)).tolist()
    if bins["loss"] in [bins[part] for part in bins if part != "loss"]:
        del bins["loss"]  # it is its only part
    return {"first": last[0]["step"], "logged": len(last), "counts": counts.sum(0).tolist(), "bins": bins}


def judgement(opened: RunFolder) -> dict[str, Any] | None:
    """What `dumo evaluate` wrote, or None. `fresh`: of these weights; `columns`: its figures, spreads left out.

    Raises UserError where the file is not JSON.
    """
    path = opened.folder / "evaluation.json"
    if not path.is_file():
        return None
    found = read_json(path, f"run dumo evaluate {opened.folder} again")
    columns = [key for key in found["results"][0] if key not in ("nfe", "solver") and not key.endswith("_sd")]
    fresh = (found["step"], found["weights"]) == (opened.step, opened.weights)
    return {**found, "columns": columns, "fresh": fresh}


def number(value: object) -> str:
    """Three significant digits, no exponent unless it is needed, a dash for nothing; other things as they are."""
    if value is None or value != value:
        return "–"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or not value or 100 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", "−")
    power = floor(log10(abs(value)))
    if -4 < power < 6:
        return f"{value:.{max(0, 2 - power)}f}".replace("-", "−")
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10**power:.2f}".replace("-", "−") + f" · 10{raised}"


def large(value: float | int) -> str:
    """Three significant digits and k, M, G or T for a power of a thousand."""
    power = min(4, floor(log10(value) / 3)) if value >= 1000 else 0
    return f"{number(value / 1000**power)}\u00a0{'kMGT'[power - 1]}" if power else number(value)


def spread(value: float | None, sd: float | None) -> str:
    """A number with its spread, to two digits of the spread."""
    if value is None or not sd:
        return number(value)
    digits = max(0, 1 - floor(log10(sd)))
    return f"{value:.{digits}f} ± {sd:.{digits}f}".replace("-", "−")
