"""The page of a run, report.html: samples, trajectories, nearest training images, curves of the log, and scores.

`write` reads the log, the evaluations and some images of the data, samples, draws, and renders the template
report.html.j2. The page is one file that needs no other file, no script and no network. Numbers are computed here, and
the words are in the template.
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

# Rows and columns of a sheet of images; a column holds at most one class.
ROWS = 8
COLUMNS = 10
# The number of samples to read from data that are not in memory; fewer if they have many pixels.
MAX_DATA_ROWS = 2000
MAX_DATA_PIXELS = 2**24
PROMPT_PASSES = (1, 2, 4)
# Captions that are shown if no prompts are given.
NUM_CAPTIONS = 9
# Losses count as late after this fraction of the training steps.
LATE_FROM = 0.75

Pictures = Mapping[int, Image.Image]  # by number of passes


@dataclass(frozen=True)
class NearestPictures:
    """The first samples of a sheet, and the training image that is nearest to each."""

    samples: Image.Image
    nearest: Image.Image
    # Of all samples of the sheet.
    proximity: Proximity
    # The number of samples shown.
    count: int


@dataclass(frozen=True)
class PromptSheet:
    """Prompts, and samples of each at several NFE from the same noise."""

    passes: Sequence[int]
    # A prompt, and its images side by side in the order of `passes`.
    shown: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class PageParts:
    """The content of a page besides the run's fields. Empty or None fields are omitted."""

    # The number of samples in the data; None if they never end or are not on this machine.
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
    # By bin of t, as the function `late_losses` returns them.
    late_losses: Mapping[str, Any] | None = None
    evaluations: Sequence[judgement.Judgement] = ()


def write(trained: TrainedRun, bar: Bar = no_bar, prompts: Sequence[str] = ()) -> Path:
    """Write report.html into the run's folder, and return its path.

    A network that reads texts is sampled with these prompts, or with captions of its data. Raises UserError if the log
    or an evaluation is damaged, or if the run cannot read prompts.
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
    """Some samples of the data, to draw and to compare with."""

    # (n, *pixels); None if the data are not on this machine.
    x: Real | None
    # (n,), their classes.
    c: Tensor
    # The number of samples in all the data; None if they never end or are not on this machine.
    size: int | None
    # The reason why they could not be read.
    missing: str = ""


def _read_data(trained: TrainedRun) -> _DataRows:
    """Return some samples of the data, decoded; none if the images are elsewhere, or are not those of the training.

    Raises UserError if data that are on this machine cannot be read.
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
    """Return the number of samples that are read of data that are not in memory."""
    return min(MAX_DATA_ROWS, MAX_DATA_PIXELS // prod(trained.spec.shown_shape[1:]))


def render(trained: TrainedRun, parts: PageParts) -> str:
    """Return the page as HTML, of these parts and of the run's fields. All that is put into it is escaped."""
    run = trained.spec
    missing = missing_to_judge(run, parts.size)
    if parts.missing and run.evaluate.protocol.reads_data and not trained.is_only_read:
        missing = "the images of the training"
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
    """Return a title with a capital letter at its start; other letters stay, and so do the symbols v and u."""
    return title if len(title) == 1 else title[0].upper() + title[1:]


def _next_command(
    trained: TrainedRun, evaluations: Sequence[judgement.Judgement], missing: str | None
) -> tuple[str, str, str]:
    """Where the run stands, the command to type next, and what it does. `missing` is what an evaluation lacks."""
    train = trained.spec.train
    name = str(trained.source) if trained.is_only_read else shell_path(trained.run_folder.path)
    if train.minutes is None and trained.step < train.steps:
        return f"Stopped at step {trained.step:,} of {train.steps:,}.", f"dumo train {name}", "resumes it"
    if not evaluations and not missing:
        return "Not evaluated yet.", f"dumo evaluate {name}", "scores it"
    sentences = [evaluation["sentence"] for evaluation in evaluations if evaluation["sentence"]]
    return " ".join(sentences[:1]), f"dumo sample {name}", "makes more samples"


def column_conditions(trained: TrainedRun) -> list[int]:
    """Return the condition of each column of a sheet: the first ten classes, or captions of them.

    Fewer than ten are repeated, each in columns side by side. [] without conditions.
    """
    data = trained.spec.data
    count = min(data.labels or data.classes, COLUMNS)
    conditions = trained.spec.conditions.in_turn(count).tolist() if data.labels else range(count)
    return [c for c in conditions for _ in range(COLUMNS // count)]


def _num_columns(trained: TrainedRun) -> int:
    """Return the number of columns of a sheet."""
    return len(column_conditions(trained)) or COLUMNS


def _class_names(trained: TrainedRun) -> list[str]:
    """Return the names above a sheet, one for each class; [] for points."""
    if not trained.makes_images:
        return []
    return [trained.spec.conditions.name(c) for c in dict.fromkeys(column_conditions(trained))]


def _data_name(trained: TrainedRun) -> str:
    """Return the name of the data: that of the folder of images, or their kind."""
    images = shown_data(trained.spec.data)
    if isinstance(images, Images):
        return Path(images.root).name.lstrip("$")
    return trained.spec.data.kind


def make_samples(trained: TrainedRun, bar: Bar) -> tuple[dict[int, Sample], dict[str, dict[int, Sample]]]:
    """Return the samples of the sheets by number of passes, and those of the trajectories by mode and number of passes.

    Sheets are made by the run's own solver. A trajectory has as many images as a row of a sheet, or as many points as a
    sheet, and sample i starts from the same noise in all of them.
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
    """Draw samples (n, *pixels): images as a sheet, points in red before the data `real` in grey.

    The gaps of a sheet are transparent, since a page may be light or dark.
    """
    if not trained.makes_images:
        assert real is not None, "points are drawn from a distribution"
        return picture.scatter(real, {"": x})
    return picture.sheet(picture.to_rows(x), _num_columns(trained), gap=picture.GAP, clear=True)


def arrange_by_class(trained: TrainedRun, x: Real, c: Tensor) -> Sample:
    """The first images x (n, *pixels), of classes c (n,), in the order of a sheet, a column or more for each class.

    A class without images is grey. If no class of the sheet has any, the images keep their order.
    """
    images_by_class = [x[c == label] for label in dict.fromkeys(column_conditions(trained))]
    if not any(map(len, images_by_class)):
        return x[: ROWS * COLUMNS]
    width = _num_columns(trained) // len(images_by_class)  # columns of a class
    full_rows = [len(images) // width for images in images_by_class if len(images)]
    rows = max(1, min(ROWS, *full_rows))
    grey = torch.zeros_like(x[:1]).expand(rows * width, *x.shape[1:])
    blocks: list[Tensor] = []
    for images in images_by_class:
        block = torch.cat([images, grey])[: rows * width]
        blocks.append(block.unflatten(0, (rows, width)))
    return torch.cat(blocks, 1).flatten(0, 1)


def draw_nearest(trained: TrainedRun, x: Sample, real: Real) -> NearestPictures:
    """Draw the first row of a sheet of samples x (n, *pixels), with the image of the data `real` nearest to each."""
    proximity = measure_proximity(trained.spec.data, x, real, trained.spec.sample.seed)
    count = min(_num_columns(trained), len(x))
    return NearestPictures(
        samples=draw_samples(trained, x[:count], real),
        nearest=draw_samples(trained, proximity.nearest[:count], real),
        proximity=proximity,
        count=count,
    )


def late_losses(rows: Sequence[log.Row]) -> dict[str, Any] | None:
    """The mean loss, and each of its parts, by bin of t, over the last quarter of the training; None without bins.

    Every sample of the logged batches counts alike. Returns the step of the `first` row of the log that counts, how
    many are `logged`, the samples in each bin as `counts`, and the means by part as `bins`.
    """
    # A run that ships with dumo has a log of one row without bins.
    rows_with_bins = [row for row in rows if "bins" in row]
    if not rows_with_bins:
        return None
    last_step = rows_with_bins[-1]["step"]
    late_rows = [row for row in rows_with_bins if row["step"] > LATE_FROM * last_step]
    counts = torch.tensor([row["counts"] for row in late_rows], dtype=torch.float64)
    bins: dict[str, list[float]] = {}
    for part in late_rows[0]["bins"]:
        # An empty bin has null.
        means = torch.tensor([[mean or 0.0 for mean in row["bins"][part]] for row in late_rows], dtype=torch.float64)
        bins[part] = ((means * counts).sum(0) / counts.sum(0)).tolist()
    # A loss of one part equals that part; as text NaN is equal to itself.
    if str(bins["loss"]) in [str(means) for part, means in bins.items() if part != "loss"]:
        del bins["loss"]
    return {"first": late_rows[0]["step"], "logged": len(late_rows), "counts": counts.sum(0).tolist(), "bins": bins}


def _prompt_sheet(trained: TrainedRun, prompts: Sequence[str], bar: Bar) -> PromptSheet | None:
    """What the network makes of these prompts, or of captions of its data if there are none; None without texts.

    Raises UserError for prompts that the network cannot read.
    """
    conditions = trained.spec.conditions
    if prompts:
        c = trained.conditions(prompts=prompts)
    elif conditions.captions is not None and trained.makes_images:
        try:
            c = conditions.in_turn(NUM_CAPTIONS)
        except UserError:
            # The captions are with the images, which are elsewhere.
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
