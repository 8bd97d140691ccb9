"""A run as one page: what it makes, by which head, how near to the data, how it was trained and how it is judged.

The page is one file that needs no other, no script and no network. Numbers are made here, words stand in the template.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import jinja2
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from dumo.config import recipes, word
from dumo.config.conditions import shown as shown_data
from dumo.config.conditions import squares
from dumo.config.load import dump
from dumo.data import Images, Latents
from dumo.evaluation.neighbours import Real, nearest
from dumo.flow.generate import labels
from dumo.flow.solver import able
from dumo.io import file, picture
from dumo.io.picture import headed, labelled, letters
from dumo.plan.plan import show
from dumo.report import score
from dumo.report.figure import charts, embed
from dumo.report.gallery import PASSES, readings, within
from dumo.report.score import judgement, large, number
from dumo.run.prompt import names as names_of
from dumo.run.prompt import prompted
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import dist, threads, typed
from dumo.runtime.progress import Bar, no_bar, teller
from dumo.runtime.random import stream
from dumo.training import log
from dumo.types import Sample

ROWS, COLUMNS = 8, 10  # of a sheet of images; its columns are classes
GAP = 6  # pixels between images: digits fill their height
POINTS = 2000  # of a scatter; rows of a data set that are read for the page, if they are not all in memory
NEAR = 2**24  # pixels of data that are decoded for it: 256 images of 256 x 256
SHEET = "sheet"  # the samples by the run's own solver

PROMPTED = (1, 2, 4)  # passes of a sheet of prompts, as far as the solver can make them
CAPTIONS = 9  # that are shown where no prompts are given
LETTER, MARGIN = 14, 18  # pixels: of a letter, between prompts
NARROWEST = 240  # pixels of a prompt's column: room for its words

Pictures = Mapping[int, Image.Image]  # by number of passes


def write(opened: RunFolder, bar: Bar = no_bar, prompts: Sequence[str] = ()) -> list[Path]:
    """Write pictures into report/ and report.html into the run's folder; return all paths, the page last.

    A net that reads texts is shown with these prompts, or with captions of its data. Raises UserError, before anything
    is written, where metrics.jsonl or an evaluation is damaged, or prompts cannot be read, and OSError where nothing
    can be written.
    """
    for place in (opened.folder, opened.folder / "report"):
        file.check_writable(place)
        file.sweep(place)
    sampler, folder, judged_by = opened.sampler, opened.folder, squares(opened.run.data)
    source = judged_by.open()
    rows = [row for row in log.read_log(folder / "metrics.jsonl") if "skipped" not in row]  # they have no numbers
    judged = judgement(opened.folder, opened.step, opened.weights)
    real, c = source.reference(min(POINTS, NEAR // prod(sampler.pixels[1:])), sampler.spec.seed)
    real = sampler.decode(real) if isinstance(judged_by, Latents) else real

    with threads.fewer_when_busy(sampler.device, teller(bar)):
        texts = prompt_sheet(sampler, prompts, bar)
        made = make(sampler, bar)
    drawn = {name: {n: look(sampler, x, real) for n, x in row.items()} for name, row in made.items()}
    sheets, names, data, near = drawn.pop(SHEET), class_names(sampler), None, None
    pictures = {f"nfe{n}": headed(sheet, names) for n, sheet in sheets.items()}
    pictures["trajectories"] = joined(sampler, drawn)
    if sampler.is_image and source.size is not None:
        data = look(sampler, by_class(sampler, real, c), real)
        near = proximity(sampler, made[SHEET][min(sheets)], real)
        pictures["data"] = headed(data, names)
        pictures["nearest"] = labelled({"sample": [near["samples"]], "nearest": [near["found"]]})

    pictures |= {"prompts": texts.picture()} if texts else {}
    page = render(
        opened,
        size=source.size,
        texts=texts,
        sheets=sheets,
        data=data,
        trajectories=drawn,
        near=near,
        charts=charts(rows) if len(rows) > 1 else [],
        times=late(rows),
        judged=judged,
        benchmarks=score.benchmarks(opened.folder, opened.step, opened.weights),
    )
    paths = [folder / "report" / f"{name}.png" for name in pictures]
    for path, image in zip(paths, pictures.values(), strict=True):
        picture.write_picture(path, image)
    file.write(folder / "report.html", page.encode())
    return [*paths, folder / "report.html"]


def render(opened: RunFolder, **parts: object) -> str:
    """The page, of these parts and of what the run says of itself. Whatever is put in is escaped."""
    run, sampler, shipped = opened.run, opened.sampler, score.shipped(opened.run.evaluate.protocol, opened.run.data)
    facts, judged, near = show(run), cast(Any, parts["judged"]), cast(Any, parts["near"])
    results = recipes.results(shipped) if shipped else None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dumo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cast(dict[str, Any], environment.filters).update(number=number, large=large, embed=embed, sentence=sentence)
    return environment.get_template("report.html.j2").render(
        run=run,
        facts=facts,
        folder=typed(opened.folder),
        name=opened.folder.resolve().name,
        step=opened.step,
        weights=opened.weights,
        image=sampler.is_image,
        heads={letter: one.head for letter, one in readings(sampler).items()},
        shipped=shipped,
        others=score.others(results, judged, opened.step, facts["forward_units_per_step"]) if results else None,
        doubts=score.doubts(run.train.steps, opened.step, judged, near),
        score=score,
        names=class_names(sampler),
        data_name=data_name(sampler),
        word=word,
        method=word.method(run.objective),
        spread=score.spread,
        too_few=score.too_few,
        yaml=dump(run),
        versions=dist.versions(),
        **parts,
    )


def sentence(title: str) -> str:
    """With a capital letter at its start, the others as they are."""
    return title[:1].upper() + title[1:]


def columns(sampler: Sampler) -> list[int]:
    """The condition of each column of a sheet: the first ten classes, or captions of them, or fewer, each repeated."""
    shown = min(sampler.data.labels or sampler.data.classes, COLUMNS)
    turn = sampler.conditions.in_turn(shown).tolist() if sampler.data.labels else range(shown)
    return [c for c in turn for _ in range(COLUMNS // shown)]


def across(sampler: Sampler) -> int:
    """How many columns a sheet has."""
    return len(columns(sampler)) or COLUMNS


def class_names(sampler: Sampler) -> list[str]:
    """What the classes of a sheet are called, each over as many columns as it has."""
    return [sampler.conditions.name(c) for c in dict.fromkeys(columns(sampler))] if sampler.is_image else []


def data_name(sampler: Sampler) -> str:
    """What the data are called: their kind, or the folder that images are in."""
    images = shown_data(sampler.data)
    return Path(images.root).name.lstrip("$") if isinstance(images, Images) else sampler.data.kind


def make(sampler: Sampler, bar: Bar) -> dict[str, dict[int, Sample]]:
    """The samples of the page, by name and number of passes, image i always from the same noise."""
    many = labels(
        ROWS * across(sampler) if sampler.is_image else POINTS,
        sampler.data.classes,
        (columns(sampler) if sampler.is_image else range(min(sampler.data.classes, COLUMNS))) or None,
    )
    few = many[: across(sampler)] if sampler.is_image else many
    jobs, ways = [(SHEET, sampler.spec.solver, n, many) for n in sampler.spec.nfe], readings(sampler).values()
    jobs += [(one.title, one.solver, n, few) for one in ways for n in within(PASSES, sampler, ways)]
    made: dict[str, dict[int, Sample]] = {}
    done = 0
    with bar("sampling for the report", sum(n for _, _, n, _ in jobs)) as tick:
        for name, solver, n, c in jobs:
            made.setdefault(name, {})[n] = sampler.sample(c, nfe=n, solver=solver).x
            tick(done := done + n, f"{name}, {n}")
    return made


def look(sampler: Sampler, x: Sample, real: Real) -> Image.Image:
    """Samples as a picture: a sheet with clear gaps, or red points before the grey truth."""
    if not sampler.is_image:
        return picture.scatter(real, {"": x})
    pixels = picture.to_rows(x)
    sheet, gaps = (picture.sheet(p, across(sampler), gap=GAP) for p in (pixels, 0 * pixels))
    sheet.putalpha(ImageOps.invert(gaps.convert("L")))  # a page may be dark
    return sheet


def by_class(sampler: Sampler, x: Real, c: Tensor) -> Sample:
    """The first rows of the data, in the order of a sheet; grey where a class has none among the rows read."""
    shown = [x[c == label] for label in dict.fromkeys(columns(sampler))]
    if not any(map(len, shown)):
        return x[: ROWS * COLUMNS]
    each = across(sampler) // len(shown)  # columns of a class
    rows = max(1, min(ROWS, *(len(of) // each for of in shown if len(of))))
    grey = torch.zeros_like(x[:1]).expand(rows * each, *x.shape[1:])
    blocks = [torch.cat([of, grey])[: rows * each].unflatten(0, (rows, each)) for of in shown]
    return torch.cat(blocks, 1).flatten(0, 1)


def joined(sampler: Sampler, drawn: Mapping[str, Pictures]) -> Image.Image:
    """All trajectories in one picture with labels: a row per number of passes, or, of points, a row per reading."""
    rows = [(name.split()[0], row) for name, row in drawn.items()]
    if sampler.is_image:
        return labelled([(f"{name} {n}", [p]) for name, row in rows for n, p in row.items()])
    return labelled([(name, list(row.values())) for name, row in rows], [f"NFE {n}" for n in rows[0][1]])


def proximity(sampler: Sampler, x: Sample, real: Real) -> dict[str, Any]:
    """How near samples lie to the data, in pixel space, and how near as many rows of the data lie to the other rows.

    A distance is Euclidean, over all pixels of images in [-1, 1]. The rows held out are keyed by the sampling seed; of
    little data they are half, and as many samples are counted.
    """
    distances, places = nearest(real, x)
    order = torch.randperm(len(real), generator=stream(sampler.spec.seed, "held out"))
    count, few = min(len(x), len(real) // 2), across(sampler)
    compared = {"samples": distances[: count or len(x)]}
    if count:
        compared[word.REAL], _ = nearest(real[order[count:]], real[order[:count]])
    return {
        "samples": look(sampler, x[:few], real),
        "found": look(sampler, real[places[:few]], real),
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


@dataclass(frozen=True)
class PromptSheet:
    """Prompts at these numbers of passes, each with its images side by side: a prompt keeps its noise."""

    passes: tuple[int, ...]
    shown: Sequence[tuple[str, Image.Image]]

    def picture(self, across: int = 3) -> Image.Image:
        """All of them as one picture on white, `across` prompts to a row."""
        (_, first), *_ = self.shown
        width = max(NARROWEST, first.width)
        font = letters(LETTER)
        texts = [textwrap.fill(prompt, max(1, int(width / font.getlength("n")))) for prompt, _ in self.shown]
        high = first.height + (1 + max(text.count("\n") + 1 for text in texts)) * (LETTER + 4) + MARGIN
        rows, across = -(-len(texts) // across), min(across, len(texts))
        page = Image.new("RGB", (across * (width + MARGIN) - MARGIN, rows * high + LETTER + MARGIN), "white")
        pen = ImageDraw.Draw(page)
        head = f"from left to right: {', '.join(map(str, self.passes))} passes through the net"
        pen.text((0, 0), head, "black", font)
        for i, ((_, image), text) in enumerate(zip(self.shown, texts, strict=True)):
            x, y = i % across * (width + MARGIN), i // across * high + LETTER + MARGIN
            page.paste(image, (x, y))
            pen.multiline_text((x, y + image.height + 4), text, "black", font)
        return page


def prompt_sheet(sampler: Sampler, prompts: Sequence[str] = (), bar: Bar = no_bar) -> PromptSheet | None:
    """What the net makes of these prompts, or, where none are given, of captions of its data; None: it reads no texts.

    Raises UserError as `dumo.run.prompt.prompted`.
    """
    conditions, spec = sampler.conditions, sampler.spec
    if not prompts and (conditions.captions is None or not sampler.is_image):
        return None
    c = prompted(sampler, prompts) if prompts else conditions.in_turn(CAPTIONS)
    passes = tuple(n for n in PROMPTED if able(spec.solver, sampler.taught, n)) or spec.nfe
    with bar("sampling prompts", sum(passes)) as tick:
        made = list[torch.Tensor]()
        for done, n in enumerate(passes, 1):
            made.append(picture.to_rows(sampler.sample(c, nfe=n).x))
            tick(sum(passes[:done]), "")
    sheets = (picture.sheet(row, len(passes), gap=GAP) for row in torch.stack(made, 1))
    return PromptSheet(passes, [*zip(names_of(sampler, c), sheets, strict=True)])
