"""A run as one page: what it makes, by which head, how near to the data, how it was trained and how it is judged.

`write` is the entrance. It reads log, evaluation and data from disk, makes samples (`make`), draws them (`draw`),
compares them with the data (`proximity`), and renders the page; report/ has the pictures alone. The page is one file
that needs no other, no script and no network. Numbers are made here, words stand in the template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import jinja2
import torch
from PIL import Image
from torch import Tensor

from dumo.config import recipes, word
from dumo.config.conditions import shown as shown_data
from dumo.config.conditions import squares
from dumo.config.load import dump
from dumo.data import Images, Latents
from dumo.evaluation.neighbours import Real, nearest
from dumo.flow.generate import labels_in_turn
from dumo.flow.solver import Solver, can_make
from dumo.io import file, picture
from dumo.plan.plan import show
from dumo.report import score
from dumo.report.figure import charts
from dumo.report.gallery import PASSES, reachable_passes, sampling_modes
from dumo.run.prompt import names as names_of
from dumo.run.prompt import prompted
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import dist, threads, typed
from dumo.runtime.progress import Bar, no_bar, teller
from dumo.runtime.random import stream
from dumo.training import log
from dumo.types import Sample

ROWS = 8  # of a sheet of images
COLUMNS = 10  # of a sheet of images: classes
POINTS = 2000  # of a scatter; rows of a data set that are read for the page, if they are not all in memory
MAX_DATA_PIXELS = 2**24  # of data that are decoded for the page: 256 images of 256 x 256
SHEET = "sheet"  # the samples by the run's own solver
PROMPT_PASSES = (1, 2, 4)  # of a sheet of prompts, as far as the solver can make them
CAPTIONS = 9  # that are shown where no prompts are given

Pictures = Mapping[int, Image.Image]  # by number of passes


def write(opened: RunFolder, bar: Bar = no_bar, prompts: Sequence[str] = ()) -> list[Path]:
    """Write pictures into report/ and report.html into the run's folder; return all paths, the page last.

    A net that reads texts is shown with these prompts, or with captions of its data. Raises UserError, before anything
    is written, where metrics.jsonl or an evaluation is damaged, or prompts cannot be read, and OSError where nothing
    can be written.
    """
    folder = opened.folder
    for place in (folder, folder / "report"):
        file.check_writable(place)
        file.sweep(place)
    sampler = opened.sampler

    # what is on disk: the log, the evaluation, the data
    rows = [row for row in log.read_log(folder / "metrics.jsonl") if "skipped" not in row]  # they have no numbers
    judged = score.judgement(folder, opened.step, opened.weights)
    data_spec = squares(opened.run.data)
    source = data_spec.open()
    real, real_c = source.reference(data_rows(sampler), sampler.spec.seed)
    if isinstance(data_spec, Latents):
        real = sampler.decode(real)

    # samples
    with threads.fewer_when_busy(sampler.device, teller(bar)):
        texts = _prompt_sheet(sampler, prompts, bar)
        made = make(sampler, bar)

    # pictures
    drawn: dict[str, dict[int, Image.Image]] = {}
    for name, by_passes in made.items():
        drawn[name] = {n: draw(sampler, x, real) for n, x in by_passes.items()}
    sheets = drawn.pop(SHEET)
    names = _class_names(sampler)
    pictures = {f"nfe{n}": picture.with_column_names(sheet, names) for n, sheet in sheets.items()}
    pictures["trajectories"] = all_trajectories(sampler, drawn)
    data_sheet = None
    near = None
    if sampler.is_image and source.size is not None:
        data_sheet = draw(sampler, by_class(sampler, real, real_c), real)
        near = proximity(sampler, made[SHEET][min(sheets)], real)
        pictures["data"] = picture.with_column_names(data_sheet, names)
        pictures["nearest"] = picture.labelled_grid({"sample": [near["samples"]], "nearest": [near["found"]]})
    if texts:
        pictures["prompts"] = texts.picture()

    page = render(
        opened,
        size=source.size,
        texts=texts,
        sheets=sheets,
        data=data_sheet,
        trajectories=drawn,
        near=near,
        charts=charts(rows) if len(rows) > 1 else [],
        times=late_losses(rows),
        judged=judged,
        benchmarks=score.benchmarks(folder, opened.step, opened.weights),
    )
    paths: list[Path] = []
    for name, image in pictures.items():
        paths.append(folder / "report" / f"{name}.png")
        picture.write_picture(paths[-1], image)
    paths.append(folder / "report.html")
    file.write(paths[-1], page.encode())
    return paths


def data_rows(sampler: Sampler) -> int:
    """How many rows of the data are read, if they are not all in memory."""
    return min(POINTS, MAX_DATA_PIXELS // prod(sampler.pixels[1:]))


def render(opened: RunFolder, **parts: object) -> str:
    """The page, of these parts and of what the run says of itself. Whatever is put in is escaped."""
    run = opened.run
    sampler = opened.sampler
    facts = show(run)
    judged = cast(Any, parts["judged"])
    near = cast(Any, parts["near"])
    shipped = score.shipped_results(run.evaluate.protocol, run.data)
    results = recipes.results(shipped) if shipped else None
    others = None
    if results:
        others = score.others(results, judged, opened.step, facts["forward_units_per_step"])
    return (
        _template_environment()
        .get_template("report.html.j2")
        .render(
            run=run,
            facts=facts,
            folder=typed(opened.folder),
            name=opened.folder.resolve().name,
            step=opened.step,
            weights=opened.weights,
            image=sampler.is_image,
            heads={letter: mode.head for letter, mode in sampling_modes(sampler).items()},
            shipped=shipped,
            others=others,
            doubts=score.doubts(run.train.steps, opened.step, judged, near),
            score=score,
            names=_class_names(sampler),
            data_name=_data_name(sampler),
            word=word,
            method=word.method(run.objective),
            spread=score.spread,
            too_few=score.has_too_few_images,
            yaml=dump(run),
            versions=dist.versions(),
            **parts,
        )
    )


def _template_environment() -> jinja2.Environment:
    """Where the template is, and its filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dumo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast(dict[str, Any], environment.filters)
    filters.update(number=score.number, large=score.large, embed=picture.embed, sentence=_sentence)
    return environment


def _sentence(title: str) -> str:
    """A title with a capital letter at its start; other letters stay."""
    return title[:1].upper() + title[1:]


def columns(sampler: Sampler) -> list[int]:
    """The condition of each column of a sheet: the first ten classes, or captions of them, or fewer, each repeated."""
    data = sampler.data
    count = min(data.labels or data.classes, COLUMNS)
    conditions = sampler.conditions.in_turn(count).tolist() if data.labels else range(count)
    return [c for c in conditions for _ in range(COLUMNS // count)]


def _num_columns(sampler: Sampler) -> int:
    """How many columns a sheet has."""
    return len(columns(sampler)) or COLUMNS


def _class_names(sampler: Sampler) -> list[str]:
    """What the classes of a sheet are called, each over as many columns as it has."""
    if not sampler.is_image:
        return []
    return [sampler.conditions.name(c) for c in dict.fromkeys(columns(sampler))]


def _data_name(sampler: Sampler) -> str:
    """A name for the data: their kind, or the folder that images are in."""
    images = shown_data(sampler.data)
    return Path(images.root).name.lstrip("$") if isinstance(images, Images) else sampler.data.kind


@dataclass(frozen=True)
class _SamplingJob:
    """Samples for the page: what they are called, and how they are made."""

    name: str
    solver: Solver
    nfe: int
    c: Tensor


def _sampling_jobs(sampler: Sampler) -> list[_SamplingJob]:
    """A sheet for each of the run's numbers of passes, then trajectories, a row of a sheet each (points: as many)."""
    if sampler.is_image:
        count = ROWS * _num_columns(sampler)
        classes = columns(sampler)
    else:
        count = POINTS
        classes = range(min(sampler.data.classes, COLUMNS))
    sheet_c = labels_in_turn(count, sampler.data.classes, classes or None)
    row_c = sheet_c[: _num_columns(sampler)] if sampler.is_image else sheet_c
    jobs = [_SamplingJob(SHEET, sampler.spec.solver, n, sheet_c) for n in sampler.spec.nfe]
    modes = sampling_modes(sampler).values()
    passes = reachable_passes(PASSES, sampler, modes)
    for mode in modes:
        jobs += [_SamplingJob(mode.title, mode.solver, n, row_c) for n in passes]
    return jobs


def make(sampler: Sampler, bar: Bar) -> dict[str, dict[int, Sample]]:
    """The samples of the page, by name and number of passes, image i always from the same noise."""
    jobs = _sampling_jobs(sampler)
    made: dict[str, dict[int, Sample]] = {}
    done = 0
    with bar("sampling for the report", sum(job.nfe for job in jobs)) as tick:
        for job in jobs:
            x = sampler.sample(job.c, nfe=job.nfe, solver=job.solver).x
            made.setdefault(job.name, {})[job.nfe] = x
            done += job.nfe
            tick(done, f"{job.name}, {job.nfe}")
    return made


def draw(sampler: Sampler, x: Sample, real: Real) -> Image.Image:
    """Samples as a picture: a sheet with clear gaps, for a page may be dark, or red points before the grey truth."""
    if not sampler.is_image:
        return picture.scatter(real, {"": x})
    return picture.sheet(picture.to_rows(x), _num_columns(sampler), gap=picture.GAP, clear=True)


def by_class(sampler: Sampler, x: Real, c: Tensor) -> Sample:
    """The first rows of the data, in the order of a sheet; grey where a class has none among the rows read."""
    of_each_class = [x[c == label] for label in dict.fromkeys(columns(sampler))]
    if not any(map(len, of_each_class)):
        return x[: ROWS * COLUMNS]
    width = _num_columns(sampler) // len(of_each_class)  # columns of a class
    full_rows = [len(images) // width for images in of_each_class if len(images)]
    rows = max(1, min(ROWS, *full_rows))
    grey = torch.zeros_like(x[:1]).expand(rows * width, *x.shape[1:])
    blocks = [torch.cat([images, grey])[: rows * width].unflatten(0, (rows, width)) for images in of_each_class]
    return torch.cat(blocks, 1).flatten(0, 1)


def all_trajectories(sampler: Sampler, drawn: Mapping[str, Pictures]) -> Image.Image:
    """All trajectories in one picture with names: a row per number of passes, or, of points, a row per mode."""
    rows: list[tuple[str, list[Image.Image]]] = []
    passes: list[int] = []
    for title, by_passes in drawn.items():
        name, *_ = title.split()
        passes = list(by_passes)
        if sampler.is_image:
            rows += [(f"{name} {n}", [strip]) for n, strip in by_passes.items()]
        else:
            rows.append((name, list(by_passes.values())))
    column_names = [] if sampler.is_image else [f"NFE {n}" for n in passes]
    return picture.labelled_grid(rows, column_names)


def proximity(sampler: Sampler, x: Sample, real: Real) -> dict[str, Any]:
    """How near samples lie to the data, in pixel space, and how near as many rows of the data lie to the other rows.

    A distance is Euclidean, over all pixels of images in [-1, 1]. The rows held out are keyed by the sampling seed; of
    little data they are half, and as many samples are counted.
    """
    distances, places = nearest(real, x)
    order = torch.randperm(len(real), generator=stream(sampler.spec.seed, "held out"))
    held_out = min(len(x), len(real) // 2)
    counted = held_out or len(x)
    compared = {"samples": distances[:counted]}
    if held_out:
        compared[word.REAL], _ = nearest(real[order[held_out:]], real[order[:held_out]])
    shown = _num_columns(sampler)
    return {
        "samples": draw(sampler, x[:shown], real),
        "found": draw(sampler, real[places[:shown]], real),
        "distances": distances[:shown].tolist(),
        "count": counted,
        "rows": [{"name": name, "mean": d.mean().item(), "least": d.min().item()} for name, d in compared.items()],
    }


def late_losses(rows: Sequence[log.Row]) -> dict[str, Any] | None:
    """Mean loss by bin of t over the last quarter of the training, row by row of the logged batches; None of no log."""
    if not rows:
        return None
    late = [row for row in rows if row["step"] > 0.75 * rows[-1]["step"]]
    counts = torch.tensor([row["counts"] for row in late], dtype=torch.float64)
    total = counts.sum(0)
    bins: dict[str, list[float]] = {}
    for part in late[0]["bins"]:
        means = torch.tensor([[value or 0.0 for value in row["bins"][part]] for row in late], dtype=torch.float64)
        bins[part] = ((means * counts).sum(0) / total).tolist()
    if bins["loss"] in [bins[part] for part in bins if part != "loss"]:
        del bins["loss"]  # it is its only part
    return {"first": late[0]["step"], "logged": len(late), "counts": total.tolist(), "bins": bins}


@dataclass(frozen=True)
class _PromptSheet:
    """Prompts at these numbers of passes, each with its images side by side: a prompt keeps its noise."""

    passes: tuple[int, ...]
    shown: Sequence[tuple[str, Image.Image]]

    def picture(self) -> Image.Image:
        """All of them as one picture on white."""
        head = f"from left to right: {', '.join(map(str, self.passes))} passes through the net"
        return picture.captioned_pictures(self.shown, head)


def _prompt_sheet(sampler: Sampler, prompts: Sequence[str] = (), bar: Bar = no_bar) -> _PromptSheet | None:
    """What the net makes of these prompts, or, where none are given, of captions of its data; None: it reads no texts.

    Raises UserError as `dumo.run.prompt.prompted`.
    """
    conditions = sampler.conditions
    if prompts:
        c = prompted(sampler, prompts)
    elif conditions.captions is not None and sampler.is_image:
        c = conditions.in_turn(CAPTIONS)
    else:
        return None
    reachable = [n for n in PROMPT_PASSES if can_make(sampler.spec.solver, sampler.taught, n)]
    passes = tuple(reachable) or sampler.spec.nfe
    by_passes: list[Tensor] = []
    done = 0
    with bar("sampling prompts", sum(passes)) as tick:
        for n in passes:
            by_passes.append(picture.to_rows(sampler.sample(c, nfe=n).x))
            done += n
            tick(done, "")
    by_prompt = torch.stack(by_passes, 1)
    strips = [picture.sheet(pixels, len(passes), gap=picture.GAP) for pixels in by_prompt]
    return _PromptSheet(passes, list(zip(names_of(sampler, c), strips, strict=True)))
