"""A run as one page: what it makes, by which head, how near to the data, how it was trained and how it is judged.

`write` is the entrance. In this order it

1. reads what is on disk: log, evaluation, data (`_read_data`);
2. makes samples (`make_samples`), and images of prompts where the net reads texts;
3. draws them (`draw_samples`), and compares them with the data (`dumo.report.proximity`);
4. reaches a verdict (`dumo.report.verdict`), and draws what led there (`strip`, `reconstruction`);
5. renders the page (`render`), and writes it, with the pictures alone in report/.

The page is one file that needs no other, no script and no network. Numbers are made here, words stand in the template,
report.html.j2. `num_data_rows` also says how many images of the data the demo reads.
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

from dumo.config import recipes, word
from dumo.config.code import shell_command
from dumo.config.conditions import shown_data, squares
from dumo.config.load import dump
from dumo.config.place import LOG_FILE
from dumo.config.spec import Run
from dumo.data import Images, Latents, is_images
from dumo.evaluation.copy import THUMB_SIDE
from dumo.evaluation.neighbours import Real
from dumo.flow.generate import labels_in_turn
from dumo.flow.solver import Solver, can_make
from dumo.io import file, picture
from dumo.plan.plan import show
from dumo.report import judgement, score
from dumo.report.figure import Panel, draw_panels
from dumo.report.gallery import PASSES, reachable_passes, sampling_modes, write_pictures
from dumo.report.proximity import Proximity, measure_proximity
from dumo.report.reconstruction import Reconstruction, reconstruct
from dumo.report.strip import StripMoment, draw_strip
from dumo.report.verdict import reach_verdict
from dumo.run.judge import missing_to_judge
from dumo.run.prompt import conditions_of_prompts, edits_images, names_of_conditions
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, require_trained_images
from dumo.runtime import shell_path, threads
from dumo.runtime.device import software_versions
from dumo.runtime.door import option
from dumo.runtime.progress import Bar, line_printer, no_bar
from dumo.training import log
from dumo.types import Sample, UserError

ROWS = 8  # of a sheet of images: ours
COLUMNS = 10  # of a sheet of images, at most one class each: ours
MAX_DATA_ROWS = 2000  # that are read of data that are not in memory: ours
MAX_DATA_PIXELS = 2**24  # of images that are read of the data, 256 of 256 x 256: ours
SHEET = "sheet"  # the name of the samples by the run's own solver
PROMPT_PASSES = (1, 2, 4)  # of a sheet of prompts, as far as the solver can make them: ours
_LATE_FROM = 0.75  # of the steps of a training, where its late losses begin: ours
NUM_CAPTIONS = 9  # captions that are shown where no prompts are given: ours

Pictures = Mapping[int, Image.Image]  # by number of passes


@dataclass(frozen=True)
class NearestPictures:
    """The first samples of a sheet, and the training image that is nearest to each."""

    samples: Image.Image  # side by side
    nearest: Image.Image  # in the same order
    proximity: Proximity  # of all samples of the sheet
    count: int  # samples shown


@dataclass(frozen=True)
class PageParts:
    """What a page shows besides the run's own fields. A part that is empty or None is left out."""

    size: int | None = None  # samples in the data; None: they never end, or are not here
    missing: str = ""  # why the data could not be read; "": they were
    sheets: Pictures = field(default_factory=dict[int, Image.Image])  # samples by the run's own solver
    data: Image.Image | None = None  # a sheet of the data
    prompt_sheet: "PromptSheet | None" = None
    trajectories: Mapping[str, Pictures] = field(default_factory=dict[str, Pictures])  # by sampling mode
    strip: Sequence[StripMoment] = ()
    neighbours: NearestPictures | None = None
    reconstruction: Reconstruction | None = None
    charts: Sequence[Panel] = ()  # of the log
    late_losses: Mapping[str, Any] | None = None  # by bin of t, as the function `late_losses` returns them
    evaluation: judgement.Judgement | None = None  # the run's own evaluation
    benchmarks: Sequence[judgement.Judgement] = ()  # other evaluations


def write(opened: RunFolder, bar: Bar = no_bar, prompts: Sequence[str] = ()) -> list[Path]:
    """Write report.html into the run's folder, and its pictures into report/; return all paths, the page last.

    A net that reads texts is shown with these prompts, or with captions of its data. Raises UserError, before anything
    is written, where metrics.jsonl or an evaluation is damaged, or prompts cannot be read, and OSError where nothing
    can be written.
    """
    folder = opened.output_folder
    picture_folder = folder / "report"
    for written_folder in (folder, picture_folder):
        file.check_writable(written_folder)
        file.sweep(written_folder)
    sampler = opened.sampler

    # what is on disk: the log, the evaluation, the data
    logged_rows = log.read_log(opened.folder / LOG_FILE)
    rows = [row for row in logged_rows if "skipped" not in row]  # a skipped step has no numbers
    evaluation = judgement.read_judgement(opened)
    benchmarks = judgement.read_benchmarks(opened)
    data = _read_data(opened)

    # samples
    with threads.fewer_when_busy(sampler.device, line_printer(bar)):
        prompt_sheet = _prompt_sheet(sampler, prompts, bar)
        samples = make_samples(sampler, bar)

    # what the page shows
    def draw(samples_by_passes: Mapping[int, Sample]) -> dict[int, Image.Image]:
        return {n: draw_samples(sampler, x, data.x) for n, x in samples_by_passes.items()}

    sheets = draw(samples[SHEET])
    trajectories = {name: draw(by_passes) for name, by_passes in samples.items() if name != SHEET}
    data_sheet = None
    neighbours = None
    if sampler.is_image and data.x is not None and data.size is not None:
        data_sheet = draw_samples(sampler, arrange_by_class(sampler, data.x, data.c), data.x)
        neighbours = draw_nearest(sampler, samples[SHEET][min(sheets)], data.x)
    strip = draw_strip(opened)
    reconstruction = reconstruct(sampler)
    parts = PageParts(
        size=data.size,
        missing=data.missing,
        sheets=sheets,
        data=data_sheet,
        prompt_sheet=prompt_sheet,
        trajectories=trajectories,
        strip=strip,
        neighbours=neighbours,
        reconstruction=reconstruction,
        charts=draw_panels(rows),
        late_losses=late_losses(rows),
        evaluation=evaluation,
        benchmarks=benchmarks,
    )

    # the page, and its pictures alone
    pictures = _pictures(sampler, parts)
    html = render(opened, parts)
    picture_paths = write_pictures({picture_folder / f"{name}.png": image for name, image in pictures.items()})
    page_path = folder / "report.html"
    file.write(page_path, html.encode())
    return [*picture_paths, page_path]


@dataclass(frozen=True)
class _DataRows:
    """Some samples of the data, to draw and to compare with."""

    x: Real | None  # (n, *pixels); None: the data are not here
    c: Tensor  # (n,), their classes
    size: int | None  # samples in all the data; None: they never end, or are not here
    missing: str = ""  # why they could not be read


def _read_data(opened: RunFolder) -> _DataRows:
    """Some samples of the data, as images are shown; none where the images are not here, or not those of the training.

    Raises UserError where data that are here cannot be read.
    """
    sampler = opened.sampler
    data_spec = squares(opened.run.data)
    try:
        require_trained_images(opened)
    except UserError as error:
        return _no_rows(error)
    try:
        data = data_spec.open()
    except UserError as error:
        images = shown_data(opened.run.data)
        are_elsewhere = is_images(images) and not images.is_here
        if not are_elsewhere and not opened.is_shipped:
            raise
        return _no_rows(error)
    x, c = data.reference(num_data_rows(sampler), sampler.spec.seed)
    if isinstance(data_spec, Latents):
        x = sampler.decode(x)
    return _DataRows(x, c, data.size)


def _no_rows(error: UserError) -> _DataRows:
    """What there is of data that cannot be shown, for the reason that the error says."""
    return _DataRows(x=None, c=torch.zeros(0, dtype=torch.long), size=None, missing=str(error))


def _pictures(sampler: Sampler, parts: PageParts) -> dict[str, Image.Image]:
    """The pictures of a page, with names in them, by the name of their file."""
    names = _class_names(sampler)
    pictures = {f"nfe{n}": picture.with_column_names(sheet, names) for n, sheet in parts.sheets.items()}
    pictures["trajectories"] = join_trajectories(sampler, parts.trajectories)
    if parts.data is not None:
        pictures["data"] = picture.with_column_names(parts.data, names)
    if parts.neighbours:
        rows_of_neighbours = {"sample": [parts.neighbours.samples], "nearest": [parts.neighbours.nearest]}
        pictures["nearest"] = picture.labelled_grid(rows_of_neighbours)
    if parts.strip:
        images_by_noise = zip(*(moment.images for moment in parts.strip), strict=True)
        rows_of_strip = [("", list(images)) for images in images_by_noise]
        pictures["strip"] = picture.labelled_grid(rows_of_strip, [f"{moment.step:,}" for moment in parts.strip])
    if parts.reconstruction:
        rows_of_codec = {"photo": [parts.reconstruction.originals], "decoded": [parts.reconstruction.decoded]}
        pictures["reconstruction"] = picture.labelled_grid(rows_of_codec)
    if parts.prompt_sheet:
        pictures["prompts"] = parts.prompt_sheet.picture()
    return pictures


def num_data_rows(sampler: Sampler) -> int:
    """The number of samples that are read of data that are not in memory: fewer, the more pixels each has."""
    return min(MAX_DATA_ROWS, MAX_DATA_PIXELS // prod(sampler.pixels[1:]))


def render(opened: RunFolder, parts: PageParts) -> str:
    """The page as HTML, of these parts and of what the run's fields say. All that is put into it is escaped."""
    run = opened.run
    sampler = opened.sampler
    facts = show(run)
    shipped = judgement.shipped_results(run.evaluate.protocol, run.data)
    results = recipes.results(shipped) if shipped else None
    others = None
    if results:
        others = judgement.objectives_table(results, parts.evaluation, opened.step, facts.forward_units_per_step)
    proximity = parts.neighbours.proximity if parts.neighbours else None
    missing = missing_to_judge(run, parts.size)
    needs_data = run.evaluate.protocol.reads_data and not opened.is_shipped
    has_data = not parts.missing or not needs_data
    if not has_data:
        missing = "the images of the training"
    template = _template_environment(run).get_template("report.html.j2")
    return template.render(
        # the run
        run=run,
        facts=facts,
        folder=_typed_name(opened),
        name=opened.folder.resolve().name,
        step=opened.step,
        weights=opened.weights,
        image=sampler.is_image,
        heads={letter: mode.head for letter, mode in sampling_modes(sampler).items()},
        method=word.method(run.objective),
        names=_class_names(sampler),
        data_name=_data_name(sampler),
        is_shipped=opened.is_shipped,
        yaml=dump(run),
        versions=software_versions(),
        # how good it is
        verdict=reach_verdict(opened, _typed_name(opened), parts.evaluation, proximity, parts.size, has_data=has_data),
        missing_to_judge=missing,
        shipped=shipped,
        others=others,
        # functions and words
        judgement=judgement,
        score=score,
        spread=score.spread,
        too_few=score.has_too_few_images,
        THUMB_SIDE=THUMB_SIDE,
        word=word,
        **vars(parts),
    )


def _typed_name(opened: RunFolder) -> str:
    """The run as a user types it after a command: its folder, or the name by which it comes with dumo."""
    return str(opened.source) if opened.is_shipped else shell_path(opened.folder)


def _template_environment(run: Run) -> jinja2.Environment:
    """The environment that finds the template of a run's page, with its filters. What is put into a page is escaped."""
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
        ratio=score.ratio,
        large=score.abbreviate,
        embed=picture.embed,
        sentence=_sentence,
        typed=partial(shell_command, run),
    )
    return environment


def _sentence(title: str) -> str:
    """A title with a capital letter at its start; other letters stay."""
    return title[:1].upper() + title[1:]


def column_conditions(sampler: Sampler) -> list[int]:
    """The condition of each column of a sheet: the first ten classes, or captions of them.

    Fewer than ten are repeated, each in columns side by side. [] without conditions.
    """
    data = sampler.data
    count = min(data.labels or data.classes, COLUMNS)
    conditions = sampler.conditions.in_turn(count).tolist() if data.labels else range(count)
    return [c for c in conditions for _ in range(COLUMNS // count)]


def _num_columns(sampler: Sampler) -> int:
    """The number of columns of a sheet."""
    return len(column_conditions(sampler)) or COLUMNS


def _class_names(sampler: Sampler) -> list[str]:
    """The names above a sheet, one for each class; [] of points."""
    if not sampler.is_image:
        return []
    return [sampler.conditions.name(c) for c in dict.fromkeys(column_conditions(sampler))]


def _data_name(sampler: Sampler) -> str:
    """The name of the data: that of the folder of images, else their kind."""
    images = shown_data(sampler.data)
    if isinstance(images, Images):
        return Path(images.root).name.lstrip("$")
    return sampler.data.kind


@dataclass(frozen=True)
class _SamplingJob:
    """A set of samples that the page needs."""

    name: str  # SHEET, or the title of a sampling mode
    solver: Solver
    nfe: int
    c: Tensor  # (n,), the condition of each sample


def _sampling_jobs(sampler: Sampler) -> list[_SamplingJob]:
    """A sheet for each of the run's numbers of passes, then the trajectories of each sampling mode.

    Of a trajectory, each number of passes is as many images as a row of a sheet has; of points, as many as a sheet.
    """
    if sampler.is_image:
        classes = column_conditions(sampler)
        sheet_c = labels_in_turn(ROWS * _num_columns(sampler), sampler.data.classes, classes or None)
        row_c = sheet_c[: _num_columns(sampler)]
    else:
        classes = range(min(sampler.data.classes, COLUMNS))
        sheet_c = labels_in_turn(picture.SCATTER_POINTS, sampler.data.classes, classes or None)
        row_c = sheet_c
    jobs = [_SamplingJob(SHEET, sampler.spec.solver, n, sheet_c) for n in sampler.spec.nfe]
    modes = sampling_modes(sampler).values()
    passes = reachable_passes(PASSES, sampler, modes)
    for mode in modes:
        jobs += [_SamplingJob(mode.title, mode.solver, n, row_c) for n in passes]
    return jobs


def make_samples(sampler: Sampler, bar: Bar) -> dict[str, dict[int, Sample]]:
    """The samples of the page, by name and number of passes; sample i always starts from the same noise."""
    jobs = _sampling_jobs(sampler)
    samples: dict[str, dict[int, Sample]] = {}
    done = 0
    with bar("sampling for the report", sum(job.nfe for job in jobs)) as tick:
        for job in jobs:
            x = sampler.sample(job.c, nfe=job.nfe, solver=job.solver).x
            samples.setdefault(job.name, {})[job.nfe] = x
            done += job.nfe
            tick(done, f"{job.name}, {job.nfe}")
    return samples


def draw_samples(sampler: Sampler, x: Sample, real: Real | None) -> Image.Image:
    """Samples (n, *pixels) as a picture: images as a sheet, points in red before the data `real` in grey.

    The gaps of a sheet are transparent, since a page may be light or dark.
    """
    if not sampler.is_image:
        assert real is not None, "points are drawn from a distribution, which is always here"
        return picture.scatter(real, {"": x})
    return picture.sheet(picture.to_rows(x), _num_columns(sampler), gap=picture.GAP, clear=True)


def arrange_by_class(sampler: Sampler, x: Real, c: Tensor) -> Sample:
    """The first images x (n, *pixels), of classes c (n,), in the order of a sheet, a column or more for each class.

    A class without images is grey. Where no class of the sheet has any, the images stay in their order.
    """
    images_by_class = [x[c == label] for label in dict.fromkeys(column_conditions(sampler))]
    if not any(map(len, images_by_class)):
        return x[: ROWS * COLUMNS]
    width = _num_columns(sampler) // len(images_by_class)  # columns of a class
    full_rows = [len(images) // width for images in images_by_class if len(images)]
    rows = max(1, min(ROWS, *full_rows))
    grey = torch.zeros_like(x[:1]).expand(rows * width, *x.shape[1:])
    blocks: list[Tensor] = []
    for images in images_by_class:
        block = torch.cat([images, grey])[: rows * width]
        blocks.append(block.unflatten(0, (rows, width)))
    return torch.cat(blocks, 1).flatten(0, 1)


def join_trajectories(sampler: Sampler, trajectories: Mapping[str, Pictures]) -> Image.Image:
    """All trajectories, by the title of their mode, in one picture with names.

    It has a row for each mode and number of passes; of points, a row for each mode and a column for each number.
    """
    rows: list[tuple[str, list[Image.Image]]] = []
    passes: list[int] = []
    for title, pictures in trajectories.items():
        name, *_ = title.split()
        passes = list(pictures)
        if sampler.is_image:
            rows += [(f"{name} {n}", [strip]) for n, strip in pictures.items()]
        else:
            rows.append((name, list(pictures.values())))
    column_names = [] if sampler.is_image else [f"NFE {n}" for n in passes]
    return picture.labelled_grid(rows, column_names)


def draw_nearest(sampler: Sampler, x: Sample, real: Real) -> NearestPictures:
    """The first row of a sheet of samples x (n, *pixels), with the image of the data `real` nearest to each."""
    proximity = measure_proximity(sampler.data, x, real, sampler.spec.seed)
    count = min(_num_columns(sampler), len(x))
    return NearestPictures(
        samples=draw_samples(sampler, x[:count], real),
        nearest=draw_samples(sampler, proximity.nearest[:count], real),
        proximity=proximity,
        count=count,
    )


def late_losses(rows: Sequence[log.Row]) -> dict[str, Any] | None:
    """The mean loss, and each of its parts, by bin of t, over the last quarter of the training; None without bins.

    Every sample of the logged batches counts alike. Returns the step of the `first` row of the log that counts, how
    many are `logged`, the samples in each bin as `counts`, and the means by part as `bins`.
    """
    # a run that comes with dumo has a log of one row, with the last loss and no bins
    rows_with_bins = [row for row in rows if "bins" in row]
    if not rows_with_bins:
        return None
    last_step = rows_with_bins[-1]["step"]
    late_rows = [row for row in rows_with_bins if row["step"] > _LATE_FROM * last_step]
    counts = torch.tensor([row["counts"] for row in late_rows], dtype=torch.float64)
    bins = {part: _mean_by_bin(part, late_rows, counts) for part in late_rows[0]["bins"]}
    other_parts = [means for part, means in bins.items() if part != "loss"]
    if str(bins["loss"]) in map(str, other_parts):  # the loss has one part alone; as text NaN is equal to itself
        del bins["loss"]
    return {"first": late_rows[0]["step"], "logged": len(late_rows), "counts": counts.sum(0).tolist(), "bins": bins}


def _mean_by_bin(part: str, rows: Sequence[log.Row], counts: Tensor) -> list[float]:
    """The mean of a part of the loss by bin of t; `counts` (rows, bins) are the samples of each row in each bin."""
    means_by_row: list[list[float]] = []
    for row in rows:
        means_by_row.append([mean or 0.0 for mean in row["bins"][part]])  # an empty bin has null
    means = torch.tensor(means_by_row, dtype=torch.float64)
    return ((means * counts).sum(0) / counts.sum(0)).tolist()


@dataclass(frozen=True)
class PromptSheet:
    """Prompts, and what each becomes in several numbers of passes, from the same noise."""

    passes: tuple[int, ...]
    shown: Sequence[tuple[str, Image.Image]]  # a prompt, and its images side by side in the order of `passes`

    def picture(self) -> Image.Image:
        """All prompts and images as one picture on white."""
        head = f"from left to right: {', '.join(map(str, self.passes))} NFE"
        return picture.captioned_pictures(self.shown, head)


def _prompt_sheet(sampler: Sampler, prompts: Sequence[str], bar: Bar) -> PromptSheet | None:
    """What the net makes of these prompts, or, where there are none, of captions of its data.

    None of a net that reads no texts. Raises UserError for prompts that the net cannot read.
    """
    conditions = sampler.conditions
    if prompts:
        if edits_images(sampler.data):
            raise UserError(f"this run edits images, and a report takes prompts alone: leave {option('prompts')} out")
        c = conditions_of_prompts(sampler, prompts)
    elif conditions.captions is not None and sampler.is_image:
        try:
            c = conditions.in_turn(NUM_CAPTIONS)
        except UserError:  # the captions lie with the images, which are not here, or others
            return None
    else:
        return None
    reachable = [n for n in PROMPT_PASSES if can_make(sampler.spec.solver, sampler.taught, n)]
    passes = tuple(reachable) or sampler.spec.nfe
    pixels_by_passes: list[Tensor] = []
    done = 0
    with bar("sampling prompts", sum(passes)) as tick:
        for n in passes:
            pixels_by_passes.append(picture.to_rows(sampler.sample(c, nfe=n).x))
            done += n
            tick(done, "")
    pixels_by_prompt = torch.stack(pixels_by_passes, 1)  # (prompts, passes, ...)
    strips = [picture.sheet(pixels, len(passes), gap=picture.GAP) for pixels in pixels_by_prompt]
    return PromptSheet(passes, list(zip(names_of_conditions(sampler, c), strips, strict=True)))
