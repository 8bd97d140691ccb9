"""What the page answers: rows of pictures with their words. Knows no browser and no server.

What takes long is answered in parts: each answer holds what there was before, and more.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from dumo.evaluation.neighbours import nearest
from dumo.flow.solver import Fresh
from dumo.io import picture
from dumo.io.read import brief
from dumo.report.sampler import Sampler, between
from dumo.run.gallery import POINTS, Reading
from dumo.types import Sample, UserError

PASSES = (1, 2, 4, 50)  # side by side: what few-step models take, and what flow models do
SEEDS = 4  # rows of the grid
STEPS = 9  # from one noise to another, both ends among them
SAMPLES = 8  # whose nearest images are shown
DIGITS = 18  # of a seed, at most: ours


@dataclass(frozen=True)
class Cell:
    """A picture and the words below it; None: there is none, and the words say why."""

    picture: Image.Image | None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Pictures side by side, and what they have in common."""

    title: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Answer:
    """Rows of pictures, and a line about all of them."""

    rows: Sequence[Row]
    line: str = ""


def passes(sampler: Sampler, what: str, seed: str) -> Iterator[Answer]:
    """The same noise by 1, 2, 4 and 50 passes, a row for each reading; of points, many in a scatter.

    What a reading cannot make says why. Raises UserError for a class or seed that is none.
    """
    c, late = sampler.condition(what), time.monotonic() + sampler.limit
    images = 1 if sampler.opened.sampler.is_image else POINTS
    fresh = sampler.fresh([seed_of(seed)], images)
    cells = {letter: [Cell(None)] * len(PASSES) for letter in sampler.readings}
    kind = sampler.opened.run.objective.kind
    lacks = [what for letter, what in {"u": "jumps", "v": "velocity"}.items() if letter not in cells]
    line = f"Objective {kind} teaches no {' and no '.join(lacks)}." if lacks else ""
    for letter, reading in sampler.readings.items():
        for i, nfe in enumerate(PASSES):
            cells[letter][i] = tried(sampler, reading, nfe, c, fresh, late)
            yield Answer([Row(sampler.readings[name].title, [*row]) for name, row in cells.items()], line)


def tried(sampler: Sampler, reading: Reading, nfe: int, c: int, fresh: Fresh, late: float) -> Cell:
    """A sample as a cell, with its passes and time, or why there is none."""
    try:
        made = sampler.make(reading, nfe, c, fresh, late)
        return Cell(drawn(sampler, made.x)[0], f"{counted(made.nfe)}, {lasted(made.seconds)}")
    except UserError as error:
        return Cell(None, f"{counted(nfe)}: {error}")


def seeds(sampler: Sampler, what: str, seed: str, letter: str) -> Iterator[Answer]:
    """A grid: a row for each of some seeds, a column for each number of passes. Raises as `passes`."""
    c, first, reading = sampler.condition(what), seed_of(seed), sampler.reading(letter)
    some, late = range(first, first + SEEDS), time.monotonic() + sampler.limit
    columns: list[list[Cell]] = []
    for nfe in PASSES:
        try:
            made = sampler.make(reading, nfe, c, sampler.fresh(some), late)
            columns.append([Cell(one, counted(made.nfe)) for one in drawn(sampler, made.x)])
        except UserError as error:
            columns.append([Cell(None, f"{counted(nfe)}: {error}")] * SEEDS)
        rows = zip(some, zip(*columns, strict=True), strict=True)
        yield Answer([Row(f"seed {n}", cells) for n, cells in rows])


def interpolation(sampler: Sampler, what: str, seed: str, other: str, letter: str, nfe: int) -> Iterator[Answer]:
    """Samples along the way from the noise of a seed to that of another. Raises UserError as `passes`, and for one."""
    c, a, b = sampler.condition(what), seed_of(seed), seed_of(other)
    if a == b:
        raise UserError(f"both seeds are {a}: there is no way between them, give another one")
    made = sampler.make(sampler.reading(letter), nfe, c, between(sampler.fresh([a]), sampler.fresh([b]), STEPS))
    notes = [f"seed {a}", *(f"{k}/{STEPS - 1}" for k in range(1, STEPS - 1)), f"seed {b}"]
    cells = [Cell(one, note) for one, note in zip(drawn(sampler, made.x), notes, strict=True)]
    yield Answer(
        [Row("", cells)],
        f"{counted(made.nfe)} each, {lasted(made.seconds)} for all. Noises at equal angles on the quarter circle from "
        f"that of seed {a} to that of seed {b}.",
    )


def neighbours(sampler: Sampler, what: str, seed: str, letter: str, nfe: int) -> Iterator[Answer]:
    """Samples of some seeds, and below each the nearest image of the data. Raises UserError as `passes`."""
    c, first, reading = sampler.condition(what), seed_of(seed), sampler.reading(letter)
    some = range(first, first + SAMPLES)
    made = sampler.make(reading, nfe, c, sampler.fresh(some))
    samples = Row("samples", [Cell(one, f"seed {n}") for n, one in zip(some, drawn(sampler, made.x), strict=True)])
    try:
        (real, size), spacing = sampler.data, sampler.spacing
    except (UserError, OSError) as error:
        yield Answer([samples], f"The data are not here, so no image is compared: {error}")
        return
    far, places = nearest(real, made.x)
    found = zip(drawn(sampler, real[places]), far.tolist(), strict=True)
    nearests = Row("nearest", [Cell(one, f"distance {d:.2f}") for one, d in found])
    yield Answer([samples, nearests], compared(len(real), size, spacing))


def compared(rows: int, size: int | None, spacing: float) -> str:
    """What a distance is, among how many images, and how far these lie from one another."""
    among = f"all {rows:,}" if rows == size else f"{rows:,} of {size:,}" if size else f"{rows:,}"
    return (
        f"Looked for among {among} images of the data, which lie {spacing:.2f} from the nearest other one in the mean. "
        "Distances are Euclidean, between the pixels of images in [-1, 1], not between what they show: an image moved "
        "by a pixel is far from itself. A copy has distance 0."
    )


def drawn(sampler: Sampler, x: Sample) -> list[Image.Image]:
    """Samples as pictures: one each, of points one for all. Raises UserError where they are no finite numbers."""
    if not sampler.opened.sampler.is_image:
        return [picture.scatter(sampler.data[0], {"": x})]
    return [Image.fromarray(pixels.numpy()) for pixels in picture.to_rows(x)]


def seed_of(text: str) -> int:
    """A seed as it was typed. Raises UserError for what is none."""
    word = text.strip()
    if not (word.isascii() and word.isdecimal() and len(word) <= DIGITS):
        raise UserError(f"seed '{brief(word, 40)}' is none: give a whole number from 0 on, of at most {DIGITS} digits")
    return int(word)


def counted(nfe: int) -> str:
    """'1 pass', '2 passes'."""
    return f"{nfe} pass{'es' * (nfe != 1)}"


def lasted(seconds: float) -> str:
    """'12 ms', '3.4 s'."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
