"""Write the HTML report of a run: samples, trajectories, nearest training images, training curves, and scores.

`write` reads the log, the evaluations and some images of the data, generates samples, and renders the template
report.html.j2. The page is a single file without scripts or external resources. This module computes the numbers; the
template contains the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import jinja2
import torch
from PIL import Image
from torch import Tensor

from dumo.config import word
from dumo.config.code import shell_command
from dumo.config.conditions import shown_data, squares
from dumo.config.load import dump
from dumo.config.place import LOG_FILE
from dumo.data import Images, Latents
from dumo.evaluation.copy import THUMB_SIDE
from dumo.evaluation.neighbours import Real
from dumo.flow.sampling import labels_in_turn
from dumo.flow.solver import can_make
from dumo.io import file, picture
from dumo.report import judgement, score
from dumo.report.figure import Panel, draw_panels
from dumo.report.gallery import PASSES, reachable_passes, sample_by_nfe, sampling_modes
from dumo.report.proximity import Proximity, measure_proximity
from dumo.run.judge import missing_to_judge
from dumo.run.trained import TrainedRun
from dumo.run.weights import require_trained_images
from dumo.runtime import shell_path
from dumo.runtime.device import software_versions
from dumo.runtime.progress import Bar, no_bar
from dumo.training import log
from dumo.types import Sample, UserError

# Rows and columns of a sheet of images. A column shows one class.
ROWS = 8
COLUMNS = 10
# The maximum number of samples and of pixels to read from the data.
MAX_DATA_ROWS = 2000
MAX_DATA_PIXELS = 2**24
PROMPT_PASSES = (1, 2, 4)
# The number of captions to use as prompts if the user passes none.
NUM_CAPTIONS = 9
# `late_losses` averages over the steps after this fraction of the training.
LATE_FROM = 0.75

Pictures = Mapping[int, Image.Image]  # by NFE


@dataclass(frozen=True)
class NearestPictures:
    """The first samples of a sheet and the nearest training image of each."""

    samples: Image.Image
    nearest: Image.Image
    # Computed over all samples of the sheet.
    proximity: Proximity
    # The number of samples that are shown.
    count: int


@dataclass(frozen=True)
class PromptSheet:
    """Samples of prompts at several NFE, from the same noise."""

    passes: Sequence[int]
    # Each prompt with an image that contains its samples in the order of `passes`.
    shown: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class PageParts:
    """The content of a page besides the run's fields. Empty or None fields are omitted."""

    # The number of samples in the data. None means infinite, or that the data are not on this machine.
    size: int | None = None
    # The reason why the data could not be read.
    missing: str = ""
    sheets: Pictures = field(default_factory=dict[int, Image.Image])
    data: Image.Image | None = None
    prompt_sheet: PromptSheet | None = None
    # By sampling mode.
    trajectories: Mapping[str, Pictures] = field(default_factory=dict[str, Pictures])
    neighbours: NearestPictures | None = None
    charts: Sequence[Panel] = ()
    # The output of the function `late_losses`.
    late_losses: Mapping[str, Any] | None = None
    evaluations: Sequence[judgement.Judgement] = ()


def write(trained: TrainedRun, bar: Bar = no_bar, prompts: Sequence[str] = ()) -> Path:
    """Write report.html to the run's folder and return its path.

    A text-conditional network is sampled with `prompts`, or with captions of its data if there are none. Raises
    UserError if the log or an evaluation is damaged, or if the run does not support prompts.
    """
    # Read the log, the evaluations and some images of the data.
    rows = [row for row in log.read_log(trained.run_folder.path / LOG_FILE) if "skipped" not in row]
    evaluations = judgement.read_judgements(trained)
    data = _read_data(trained)

    # Sample.
    prompt_sheet = _prompt_sheet(trained, prompts, bar)
    samples, trajectories = make_samples(trained, bar)

    # Draw the samples, and compare them with the data.
    def draw(samples_by_nfe: Mapping[int, Sample]) -> Pictures:
        return {n: draw_samples(trained, x, data.x) for n, x in samples_by_nfe.items()}

    data_sheet = None
    neighbours = None
    if trained.makes_images and data.x is not None and data.size is not None:
        data_sheet = draw_samples(trained, arrange_by_class(trained, data.x, data.c), data.x)
        neighbours = draw_nearest(trained, samples[min(samples)], data.x)
    parts = PageParts(
        size=data.size,
        missing=data.missing,
        sheets=draw(samples),
        data=data_sheet,
        prompt_sheet=prompt_sheet,
        trajectories={title: draw(by_nfe) for title, by_nfe in trajectories.items()},
        neighbours=neighbours,
        charts=draw_panels(rows),
        late_losses=late_losses(rows),
        evaluations=evaluations,
    )

    # Write the page.
    path = trained.folder / "report.html"
    file.write(path, render(trained, parts).encode())
    return path


@dataclass(frozen=True)
class _DataRows:
    """Samples of the data to show and to compare with."""

    # (n, *pixels), or None if the data are not on this machine.
    x: Real | None
    # Classes of x, (n,).
    c: Tensor
    # The number of samples in the data. None means infinite, or that the data are not on this machine.
    size: int | None
    # The reason why the data could not be read.
    missing: str = ""


def _read_data(trained: TrainedRun) -> _DataRows:
    """Return decoded samples of the data, or none if the training images are not on this machine or have changed.

    Raises UserError if data on this machine cannot be read.
    """
    data_spec = squares(trained.spec.data)
    no_classes = torch.zeros(0, dtype=torch.long)
    try:
        require_trained_images(trained)
    except UserError as error:
        return _DataRows(None, no_classes, None, str(error))
    try:
        data = data_spec.open()
    except UserError as error:
        images = shown_data(trained.spec.data)
        are_elsewhere = isinstance(images, Images) and not images.is_here
        if not are_elsewhere and not trained.is_only_read:
            raise
        return _DataRows(None, no_classes, None, str(error))
    x, c = data.reference(num_data_rows(trained), trained.spec.sample.seed)
    if isinstance(data_spec, Latents):
        x = trained.decode(x)
    return _DataRows(x, c, data.size)


def num_data_rows(trained: TrainedRun) -> int:
    """Return the number of samples to read from the data."""
    return min(MAX_DATA_ROWS, MAX_DATA_PIXELS // prod(trained.spec.shown_shape[1:]))


def render(trained: TrainedRun, parts: PageParts) -> str:
    """Render the page from `parts` and the run's fields. All inserted text is escaped."""
    run = trained.spec
    missing = missing_to_judge(run, parts.size)
    if parts.missing and run.evaluate.protocol.reads_data and not trained.is_only_read:
        missing = "the training images"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dumo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast(dict[str, Any], environment.filters)
    filters.update(
        number=score.number,
        large=score.abbreviate,
        embed=picture.embed,
        sentence=_capitalize,
        typed=partial(shell_command, run),
    )
    return environment.get_template("report.html.j2").render(
        run=run,
        name=trained.run_folder.path.resolve().name,
        step=trained.step,
        next=_next_command(trained, parts.evaluations, missing),
        image=trained.makes_images,
        parameters=sum(parameter.numel() for parameter in trained.net.parameters()),
        heads={letter: mode.head for letter, mode in sampling_modes(trained.spec).items()},
        method=word.method(run.objective),
        names=_class_names(trained),
        data_name=_data_name(trained),
        yaml=dump(run),
        versions=software_versions(),
        missing_to_judge=missing,
        judgement=judgement,
        score=score,
        THUMB_SIDE=THUMB_SIDE,
        word=word,
        **vars(parts),
    )


def _capitalize(title: str) -> str:
    """Capitalize the first letter of a title, except for the symbols v and u."""
    return title if len(title) == 1 else title[0].upper() + title[1:]


def _next_command(
    trained: TrainedRun, evaluations: Sequence[judgement.Judgement], missing: str | None
) -> tuple[str, str, str]:
    """Return the status of the run, the next command, and what it does. `missing` is what an evaluation lacks."""
    train = trained.spec.train
    name = str(trained.source) if trained.is_only_read else shell_path(trained.run_folder.path)
    if train.minutes is None and trained.step < train.steps:
        return f"Stopped at step {trained.step:,} of {train.steps:,}.", f"dumo train {name}", "resumes it"
    if not evaluations and not missing:
        return "Not evaluated yet.", f"dumo evaluate {name}", "scores it"
    sentences = [evaluation["sentence"] for evaluation in evaluations if evaluation["sentence"]]
    return " ".join(sentences[:1]), f"dumo sample {name}", "generates more samples"


def column_conditions(trained: TrainedRun) -> list[int]:
    """Return the condition of each column of a sheet: up to ten classes or captions, or [] without conditions.

    Five or fewer conditions take several adjacent columns each.
    """
    data = trained.spec.data
    count = min(data.labels or data.classes, COLUMNS)
    conditions = trained.spec.conditions.in_turn(count).tolist() if data.labels else range(count)
    return [c for c in conditions for _ in range(COLUMNS // count)]


def _num_columns(trained: TrainedRun) -> int:
    """Return the number of columns of a sheet."""
    return len(column_conditions(trained)) or COLUMNS


def _class_names(trained: TrainedRun) -> list[str]:
    """Return the class names above a sheet, or [] for points."""
    if not trained.makes_images:
        return []
    return [trained.spec.conditions.name(c) for c in dict.fromkeys(column_conditions(trained))]


def _data_name(trained: TrainedRun) -> str:
    """Return the name of the image folder, or the kind of the data."""
    images = shown_data(trained.spec.data)
    if isinstance(images, Images):
        return Path(images.root).name.lstrip("$")
    return trained.spec.data.kind


def make_samples(trained: TrainedRun, bar: Bar) -> tuple[dict[int, Sample], dict[str, dict[int, Sample]]]:
    """Return samples for the sheets, by NFE, and for the trajectories, by sampling mode and NFE.

    Sheets use the run's solver. A trajectory has as many images as a row of a sheet, or as many points as a sheet, and
    sample i has the same noise in all of them.
    """
    count = ROWS * _num_columns(trained) if trained.makes_images else picture.SCATTER_POINTS
    classes = column_conditions(trained) if trained.makes_images else range(min(trained.spec.data.classes, COLUMNS))
    c = labels_in_turn(count, trained.spec.data.classes, classes or None)
    row_c = c[: _num_columns(trained)] if trained.makes_images else c
    modes = sampling_modes(trained.spec).values()
    passes = reachable_passes(PASSES, trained.spec, modes)
    total = sum(trained.spec.sample.nfe) + len(modes) * sum(passes)
    with bar("sampling for the report", total) as tick:
        sheets = {n: trained.make_samples(c, nfe=n).x for n in trained.spec.sample.nfe}
        done = sum(trained.spec.sample.nfe)
        tick(done, "sheets")
        trajectories: dict[str, dict[int, Sample]] = {}
        for mode in modes:
            by_nfe = sample_by_nfe(trained, mode, passes, row_c)
            trajectories[mode.title] = {n: samples.x for n, samples in by_nfe.items()}
            done += sum(passes)
            tick(done, mode.title)
    return sheets, trajectories


def draw_samples(trained: TrainedRun, x: Sample, real: Real | None) -> Image.Image:
    """Draw samples (n, *pixels): images as a sheet, points in red over the data `real` in grey.

    Gaps of a sheet are transparent, because a page may have a light or dark background.
    """
    if not trained.makes_images:
        assert real is not None, "points are drawn from a distribution"
        return picture.scatter(real, {"": x})
    return picture.sheet(picture.to_rows(x), _num_columns(trained), gap=picture.GAP, clear=True)


def arrange_by_class(trained: TrainedRun, x: Real, c: Tensor) -> Sample:
    """Arrange images x (n, *pixels) of classes c (n,) in the order of a sheet, with one or more columns per class.

    A class without images is grey. If no class of the sheet has images, the order is unchanged.
    """
    images_by_class = [x[c == label] for label in dict.fromkeys(column_conditions(trained))]
    if not any(map(len, images_by_class)):
        return x[: ROWS * COLUMNS]
    width = _num_columns(trained) // len(images_by_class)
    full_rows = [len(images) // width for images in images_by_class if len(images)]
    rows = max(1, min(ROWS, *full_rows))
    grey = torch.zeros_like(x[:1]).expand(rows * width, *x.shape[1:])
    blocks: list[Tensor] = []
    for images in images_by_class:
        block = torch.cat([images, grey])[: rows * width]
        blocks.append(block.unflatten(0, (rows, width)))
    return torch.cat(blocks, 1).flatten(0, 1)


def draw_nearest(trained: TrainedRun, x: Sample, real: Real) -> NearestPictures:
    """Draw the first row of a sheet of samples x (n, *pixels) and the nearest image in `real` of each sample."""
    proximity = measure_proximity(trained.spec.data, x, real, trained.spec.sample.seed)
    count = min(_num_columns(trained), len(x))
    return NearestPictures(
        samples=draw_samples(trained, x[:count], real),
        nearest=draw_samples(trained, proximity.nearest[:count], real),
        proximity=proximity,
        count=count,
    )


def late_losses(rows: Sequence[log.Row]) -> dict[str, Any] | None:
    """Average the loss and its parts by bin of t over the last quarter of the training, or return None without bins.

    All samples of the logged batches have equal weight. Returns the step of the `first` averaged row, the number of
    `logged` rows, the samples in each bin as `counts`, and the means by part as `bins`.
    """
    # The bundled runs have a log of one row without bins.
    rows_with_bins = [row for row in rows if "bins" in row]
    if not rows_with_bins:
        return None
    last_step = rows_with_bins[-1]["step"]
    late_rows = [row for row in rows_with_bins if row["step"] > LATE_FROM * last_step]
    counts = torch.tensor([row["counts"] for row in late_rows], dtype=torch.float64)
    bins: dict[str, list[float]] = {}
    for part in late_rows[0]["bins"]:
        # The mean of an empty bin is null.
        means = torch.tensor([[mean or 0.0 for mean in row["bins"][part]] for row in late_rows], dtype=torch.float64)
        bins[part] = ((means * counts).sum(0) / counts.sum(0)).tolist()
    # Omit a loss that equals its only part. NaN equals itself only as text.
    if str(bins["loss"]) in [str(means) for part, means in bins.items() if part != "loss"]:
        del bins["loss"]
    return {"first": late_rows[0]["step"], "logged": len(late_rows), "counts": counts.sum(0).tolist(), "bins": bins}


def _prompt_sheet(trained: TrainedRun, prompts: Sequence[str], bar: Bar) -> PromptSheet | None:
    """Sample prompts, or captions of the data if there are none. Returns None for a run without texts.

    Raises UserError if the run does not support prompts.
    """
    conditions = trained.spec.conditions
    if prompts:
        c = trained.conditions(prompts=prompts)
    elif conditions.captions is not None and trained.makes_images:
        try:
            c = conditions.in_turn(NUM_CAPTIONS)
        except UserError:
            # Captions are stored with the images, which are not on this machine.
            return None
    else:
        return None
    reachable = [n for n in PROMPT_PASSES if can_make(trained.spec.sample.solver, trained.spec.readings, n)]
    passes = reachable or list(trained.spec.sample.nfe)
    pixels_by_passes: list[Tensor] = []
    done = 0
    with bar("sampling prompts", sum(passes)) as tick:
        for n in passes:
            pixels_by_passes.append(picture.to_rows(trained.make_samples(c, nfe=n).x))
            done += n
            tick(done, "")
    pixels_by_prompt = torch.stack(pixels_by_passes, 1)  # (prompts, passes, ...)
    strips = [picture.sheet(pixels, len(passes), gap=picture.GAP) for pixels in pixels_by_prompt]
    return PromptSheet(passes, list(zip(trained.names_of_conditions(c), strips, strict=True)))
