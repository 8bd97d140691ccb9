"""What the demo answers: rows of pictures with their words, of one run or of several.

What takes long is answered in parts: each answer holds what there was before, and more. Nothing here knows a browser
or a server.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import cos, isqrt, pi, sin

import torch
from PIL import Image
from torch import Tensor

from dumo.evaluation.neighbours import nearest
from dumo.flow.guide import CFG
from dumo.flow.solver import Fresh
from dumo.io import picture
from dumo.io.read import brief
from dumo.report.gallery import POINTS as SCATTERED
from dumo.report.gallery import Reading, solver_title
from dumo.report.live import WORDS, Live
from dumo.report.sample import titles
from dumo.run.prompt import names
from dumo.runtime.progress import passes_text
from dumo.types import Sample, UserError

PASSES = (1, 2, 4, 50)  # side by side: what few-step models take, and what flow models do
STEPS = 9  # from one noise to another, both ends among them
SAMPLES = 8  # with their nearest images
DIGITS = 18  # of a seed, at most: ours


def between(a: Fresh, b: Fresh, steps: int) -> Fresh:
    """Noises from that of a to that of b, one row each, at equal angles, both ends among them.

    They lie on a quarter circle, cos(s pi/2) a + sin(s pi/2) b, so that each is N(0, I) as a and b are: ours. Slerp
    (White 2016, Sec. 2.1) takes the angle between a and b for the right one: of many independent numbers it is nearly
    that.
    """
    angles = [pi / 2 * k / (steps - 1) for k in range(steps)]

    def fresh(k: int) -> Sample:
        return torch.cat([a(k) * cos(angle) + b(k) * sin(angle) for angle in angles])

    return fresh


@dataclass(frozen=True)
class Cell:
    """A picture and the words below it; None: there is none, and the words say why."""

    picture: Image.Image | None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """Pictures side by side, and what they have in common; `across`: how many to a line, all if 0."""

    title: str
    cells: Sequence[Cell]
    across: int = 0

    @property
    def width(self) -> int:
        """How many pictures stand in its longest line."""
        return self.across or len(self.cells)


@dataclass(frozen=True)
class Answer:
    """Rows of pictures, and a line about them all; of samples to keep, their sheet, and the Python that makes them."""

    rows: Sequence[Row]
    line: str = ""
    sheet: Image.Image | None = None
    script: str = ""


Answers = Callable[..., Iterator[Answer]]  # of a run, and what a person chose


def together(lives: Sequence[Live], answers: Answers, *chosen: object) -> Iterator[dict[str, Answer]]:
    """The answer of each run by its name, one run after the other, each as far as it is.

    Where a run cannot answer and another can, its line says why. Raises UserError where none can.
    """
    done, wrong = dict[str, Answer](), list[UserError]()
    for live in lives:
        part = Answer([])
        try:
            for part in answers(live, *chosen):
                yield {**done, live.name: part}
        except UserError as error:
            part = replace(part, line=str(error))
            wrong.append(error)
        done[live.name] = part
    if len(wrong) == len(lives):
        raise wrong[0]
    if wrong:
        yield done


def make(live: Live, what: str, seed: str, guidance: float, n: int, nfe: int, letter: str) -> Iterator[Answer]:
    """Samples 0 to n - 1 of a seed, as `dumo sample` and `run.sample` make them. Raises UserError as `passes`."""
    c, first, reading = live.conditions(what, n), seed_of(seed), live.reading(letter)
    made = live.make(reading, nfe, c, live.fresh(first, n), live.guide(guidance))
    conditions, called = live.sampler.conditions, names(live.sampler, c)
    several = len(set(called)) > 1 and conditions.count
    cells = [Cell(one, called[i] if several else f"{i}") for i, one in enumerate(pictures(live, made.x))]
    yield Answer(
        [Row("", cells, 1 + isqrt(n - 1))],
        f"{n} image{'s' * (n > 1)}, {passes_text(made.nfe)} each, {seconds_text(made.seconds)} for all.",
        picture.sheet(picture.to_rows(made.x), **titles(c, conditions, called)),
        script(live, what, first, guidance, n, nfe, reading),
    )


def script(live: Live, what: str, seed: int, guidance: float, n: int, nfe: int, reading: Reading) -> str:
    """The Python that makes the same images, and writes them to files."""
    conditions, options = live.sampler.conditions, dict[str, object]()
    if conditions.count and what.strip():
        options["prompts" if conditions.captions else "classes"] = what.strip()
    options |= {"n": n, "nfe": nfe, "seed": seed}
    if reading.solver.kind != live.sampler.spec.solver.kind:
        options["solver"] = reading.solver.kind
    if not live.unguided:
        options["guidance"] = guidance
    given = ", ".join(f"{name}={value!r}" for name, value in (options | {"output": "pil"}).items())
    file = live.name.replace("{", "{{").replace("}", "}}") + "-{i:06d}.png"
    lines = f"run = {live.load}", f"images = run.sample({given})", "for i, image in enumerate(images):"
    return "\n".join([*lines, f"    image.save(f{file!r})\n"])


def passes(live: Live, what: str, seed: str, guidance: float) -> Iterator[Answer]:
    """The same noise by 1, 2, 4 and 50 passes, a row for each reading; of points, many in a scatter.

    What a reading cannot make says why. Raises UserError for a class, seed or guidance that is none.
    """
    late, images = time.monotonic() + live.limit, 1 if live.sampler.is_image else SCATTERED
    c, fresh, guide = live.conditions(what, images), live.fresh(seed_of(seed), images), live.guide(guidance)
    cells = {letter: [Cell(None)] * len(PASSES) for letter in live.readings}
    lacks = [what for letter, what in WORDS.items() if letter not in cells]
    line = f"Objective {live.sampler.flow.objective.kind} teaches no {' and no '.join(lacks)}." if lacks else ""
    for letter, reading in live.readings.items():
        for i, nfe in enumerate(PASSES):
            cells[letter][i] = attempt(live, reading, nfe, c, fresh, guide, late)
            yield Answer([Row(title(live.readings[name]), [*row]) for name, row in cells.items()], line)


def title(reading: Reading) -> str:
    """What it follows, and how: 'jumps: u (Restart)'."""
    return f"{WORDS[reading.letter]}: {reading.letter} ({solver_title(reading.solver)})"


def attempt(live: Live, reading: Reading, nfe: int, c: Tensor, fresh: Fresh, guide: CFG, late: float) -> Cell:
    """A sample as a cell, with its passes and time, or why there is none."""
    try:
        made = live.make(reading, nfe, c, fresh, guide, late)
        return Cell(pictures(live, made.x)[0], f"{passes_text(made.nfe)}, {seconds_text(made.seconds)}")
    except UserError as error:
        return Cell(None, f"{passes_text(nfe)}: {error}")


def interpolation(
    live: Live, what: str, seed: str, guidance: float, other: str, letter: str, nfe: int
) -> Iterator[Answer]:
    """Samples along the way from the noise of a seed to that of another. Raises UserError as `passes`, and for one."""
    c, a, b = live.conditions(what).expand(STEPS), seed_of(seed), seed_of(other)
    if a == b:
        raise UserError(f"both seeds are {a}: there is no way between them, give another one")
    noises = between(live.fresh(a), live.fresh(b), STEPS)
    made = live.make(live.reading(letter), nfe, c, noises, live.guide(guidance))
    notes = [f"seed {a}", *(f"{k}/{STEPS - 1}" for k in range(1, STEPS - 1)), f"seed {b}"]
    cells = [Cell(one, note) for one, note in zip(pictures(live, made.x), notes, strict=True)]
    cost = f"{passes_text(made.nfe)} each, {seconds_text(made.seconds)} for all."
    where = f"Noises at equal angles on the quarter circle from that of seed {a} to that of seed {b}."
    yield Answer([Row("", cells)], f"{cost} {where}")


def neighbours(live: Live, what: str, seed: str, guidance: float, letter: str, nfe: int) -> Iterator[Answer]:
    """The first samples of a seed, and below each the nearest image of the data. Raises UserError as `passes`."""
    c, noises = live.conditions(what, SAMPLES), live.fresh(seed_of(seed), SAMPLES)
    made = live.make(live.reading(letter), nfe, c, noises, live.guide(guidance))
    samples = Row("samples", [Cell(one, f"{i}") for i, one in enumerate(pictures(live, made.x))])
    try:
        (real, size), spacing = live.data, live.spacing
    except (UserError, OSError) as error:
        yield Answer([samples], f"The data are not here, so no image is compared: {error}")
        return
    far, places = nearest(real, made.x)
    found = zip(pictures(live, real[places]), far.tolist(), strict=True)
    nearests = Row("nearest", [Cell(one, f"distance {d:.2f}") for one, d in found])
    yield Answer([samples, nearests], distance_text(len(real), size, spacing))


def distance_text(rows: int, size: int | None, spacing: float) -> str:
    """What a distance is, among how many images, and how far these lie from one another."""
    among = f"all {rows:,}" if rows == size else f"{rows:,} of {size:,}" if size else f"{rows:,}"
    return (
        f"Looked for among {among} images of the data, which lie {spacing:.2f} from the nearest other one in the mean. "
        "Distances are Euclidean, between the pixels of images in [-1, 1], not between what they show: an image moved "
        "by a pixel is far from itself. A copy has distance 0."
    )


def pictures(live: Live, x: Sample) -> list[Image.Image]:
    """Samples as pictures: one each, of points one for all. Raises UserError where they are no finite numbers."""
    if not live.sampler.is_image:
        return [picture.scatter(live.data[0], {"": x})]
    return [Image.fromarray(pixels.numpy()) for pixels in picture.to_rows(x)]


def seed_of(text: str) -> int:
    """A seed as it was typed. Raises UserError for what is none."""
    word = text.strip()
    if not (word.isascii() and word.isdecimal() and len(word) <= DIGITS):
        raise UserError(f"seed '{brief(word, 40)}' is none: give a whole number from 0 on, of at most {DIGITS} digits")
    return int(word)


def seconds_text(seconds: float) -> str:
    """'12 ms', '3.4 s'."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
