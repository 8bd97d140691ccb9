"""What the demo answers: a run sampled while a person waits, as rows of pictures with their words.

A sample is made by any reading and noise, timed, and stopped where it takes too long. What takes long is answered in
parts: each answer holds what there was before, and more. Nothing here knows a browser or a server.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import cos, pi, prod, sin

import torch
from PIL import Image
from torch import Tensor, nn

from dumo.evaluation.neighbours import nearest, nearest_other
from dumo.flow.generate import carried, counting, evaluating, passing
from dumo.flow.solver import Euler, Fresh, Heun, check
from dumo.io import picture
from dumo.io.read import brief
from dumo.report.page import NEAR, POINTS
from dumo.run.config.error import require_known
from dumo.run.evaluation.score import passes_text
from dumo.run.gallery import POINTS as SCATTERED
from dumo.run.gallery import Reading, readings
from dumo.run.prompt import prompted
from dumo.run.sample import real_data
from dumo.run.sampler import Sampler
from dumo.runtime.random import noise, stream
from dumo.types import Sample, UserError

LIMIT = 60.0  # seconds of an answer: ours
LONGEST = 10_000  # letters of a prompt: ours; encoders read far fewer
SOME = 256  # images of the data with their nearest others: ours
PASSES = (1, 2, 4, 50)  # side by side: what few-step models take, and what flow models do
SEEDS = 4  # rows of the grid
STEPS = 9  # from one noise to another, both ends among them
SAMPLES = 8  # with their nearest images
DIGITS = 18  # of a seed, at most: ours


@dataclass(frozen=True)
class Made:
    """Samples (n, *pixels), on the CPU; the passes of each row through the net; the seconds that all took, decoded."""

    x: Sample
    nfe: int
    seconds: float


@dataclass(frozen=True)
class Live:
    """A net that is sampled while a person waits, and the seconds that an answer may take."""

    sampler: Sampler
    limit: float = LIMIT

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """The ways to sample the run, by letter: u by jumps, v by its own steps, or else Euler's; as far as taught."""
        own = self.sampler.spec.solver
        return readings(self.sampler, own if isinstance(own, Euler | Heun) else None)

    @cached_property
    def data(self) -> tuple[Tensor, int | None]:
        """Samples of the data, as they are shown, and how many there are in all (None: they never end).

        All where they are in memory, else some. Raises UserError or OSError where the data are not there.
        """
        sampler, source = self.sampler, real_data(self.sampler.data)
        few = min(POINTS, NEAR // prod(sampler.pixels[1:])) if sampler.is_image else 2 * POINTS
        return source.reference(few, sampler.spec.seed)[0], source.size

    @cached_property
    def spacing(self) -> float:
        """How far an image of the data lies from the nearest other one, in the mean of some.

        Raises as `data`, and UserError where there is one alone.
        """
        real, _ = self.data
        if len(real) < 2:
            raise UserError("there is one image alone")
        some = torch.randperm(len(real), generator=stream(self.sampler.spec.seed, "spacing"))[:SOME]
        return nearest_other(real, some).mean().item()

    def reading(self, letter: str) -> Reading:
        """The way to sample of this letter. Raises UserError where it was not taught."""
        require_known("reading", brief(letter), self.readings)
        return self.readings[letter]

    def condition(self, text: str) -> int:
        """The number of a prompt where the net reads captions, else of a class by its name or number.

        0 of data without classes. Raises UserError for no such class, and for a prompt as `prompted`.
        """
        conditions = self.sampler.conditions
        if conditions.captions is None:
            return conditions.index(text) if conditions.count else 0
        if len(text) > LONGEST:
            raise UserError(f"a prompt of {len(text):,} letters is too long: say it in {LONGEST:,} at most")
        return int(prompted(self.sampler, [text]))

    def fresh(self, seeds: Sequence[int], images: int = 1) -> Fresh:
        """The draws of the first images of each seed, as `dumo sample --seed` makes them."""
        shape, device = self.sampler.data.shape, self.sampler.device
        return lambda k: torch.cat([noise(seed, range(images), k, shape) for seed in seeds]).to(device)

    def make(self, reading: Reading, nfe: int, c: int, fresh: Fresh, until: float | None = None) -> Made:
        """A sample of condition c for each row of the noise, decoded.

        Raises UserError for a number of passes that the solver cannot make, and where they take longer than to `until`,
        a time of `time.monotonic`; None: than the limit.
        """
        sampler, net, began = self.sampler, self.sampler.net, time.monotonic()
        check(reading.solver, sampler.taught, nfe)
        late = began + self.limit if until is None else until
        rows = torch.full((len(fresh(0)),), c, device=sampler.device)
        with evaluating(net), counting(net) as passed, passing(net, sampler.precision, sampler.device), due(net, late):
            _, x = carried(sampler.reads, sampler.path, reading.solver, rows, nfe, fresh)
        x = sampler.decode(x).cpu()
        return Made(x, sum(passed) // len(rows), time.monotonic() - began)

    def warm(self) -> None:
        """Make a sample and forget it: the first pass takes longer than the others, and shows what is amiss."""
        for reading in self.readings.values():
            self.make(reading, reading.solver.passes, 0, self.fresh([0]), time.monotonic() + 3600)


@contextmanager
def due(net: nn.Module, until: float) -> Generator[None, None, None]:
    """Raise UserError before a pass through the net that begins later than this."""

    def look(*_: object) -> None:
        if time.monotonic() > until:
            raise UserError("stopped, it took too long: ask for fewer passes, or give dumo demo a higher --limit")

    hook = net.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


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
    """Pictures side by side, and what they have in common."""

    title: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Answer:
    """Rows of pictures, and a line about all of them."""

    rows: Sequence[Row]
    line: str = ""


def passes(live: Live, what: str, seed: str) -> Iterator[Answer]:
    """The same noise by 1, 2, 4 and 50 passes, a row for each reading; of points, many in a scatter.

    What a reading cannot make says why. Raises UserError for a class or seed that is none.
    """
    c, late = live.condition(what), time.monotonic() + live.limit
    images = 1 if live.sampler.is_image else SCATTERED
    fresh = live.fresh([seed_of(seed)], images)
    cells = {letter: [Cell(None)] * len(PASSES) for letter in live.readings}
    kind = live.sampler.objective.kind
    lacks = [what for letter, what in {"u": "jumps", "v": "velocity"}.items() if letter not in cells]
    line = f"Objective {kind} teaches no {' and no '.join(lacks)}." if lacks else ""
    for letter, reading in live.readings.items():
        for i, nfe in enumerate(PASSES):
            cells[letter][i] = attempt(live, reading, nfe, c, fresh, late)
            yield Answer([Row(live.readings[name].title, [*row]) for name, row in cells.items()], line)


def attempt(live: Live, reading: Reading, nfe: int, c: int, fresh: Fresh, late: float) -> Cell:
    """A sample as a cell, with its passes and time, or why there is none."""
    try:
        made = live.make(reading, nfe, c, fresh, late)
        return Cell(pictures(live, made.x)[0], f"{passes_text(made.nfe)}, {seconds_text(made.seconds)}")
    except UserError as error:
        return Cell(None, f"{passes_text(nfe)}: {error}")


def seeds(live: Live, what: str, seed: str, letter: str) -> Iterator[Answer]:
    """A grid: a row for each of some seeds, a column for each number of passes. Raises as `passes`."""
    c, first, reading = live.condition(what), seed_of(seed), live.reading(letter)
    some, late = range(first, first + SEEDS), time.monotonic() + live.limit
    columns: list[list[Cell]] = []
    for nfe in PASSES:
        try:
            made = live.make(reading, nfe, c, live.fresh(some), late)
            columns.append([Cell(one, passes_text(made.nfe)) for one in pictures(live, made.x)])
        except UserError as error:
            columns.append([Cell(None, f"{passes_text(nfe)}: {error}")] * SEEDS)
        rows = zip(some, zip(*columns, strict=True), strict=True)
        yield Answer([Row(f"seed {n}", cells) for n, cells in rows])


def interpolation(live: Live, what: str, seed: str, other: str, letter: str, nfe: int) -> Iterator[Answer]:
    """Samples along the way from the noise of a seed to that of another. Raises UserError as `passes`, and for one."""
    c, a, b = live.condition(what), seed_of(seed), seed_of(other)
    if a == b:
        raise UserError(f"both seeds are {a}: there is no way between them, give another one")
    made = live.make(live.reading(letter), nfe, c, between(live.fresh([a]), live.fresh([b]), STEPS))
    notes = [f"seed {a}", *(f"{k}/{STEPS - 1}" for k in range(1, STEPS - 1)), f"seed {b}"]
    cells = [Cell(one, note) for one, note in zip(pictures(live, made.x), notes, strict=True)]
    cost = f"{passes_text(made.nfe)} each, {seconds_text(made.seconds)} for all."
    where = f"Noises at equal angles on the quarter circle from that of seed {a} to that of seed {b}."
    yield Answer([Row("", cells)], f"{cost} {where}")


def neighbours(live: Live, what: str, seed: str, letter: str, nfe: int) -> Iterator[Answer]:
    """Samples of some seeds, and below each the nearest image of the data. Raises UserError as `passes`."""
    c, first, reading = live.condition(what), seed_of(seed), live.reading(letter)
    some = range(first, first + SAMPLES)
    made = live.make(reading, nfe, c, live.fresh(some))
    samples = Row("samples", [Cell(one, f"seed {n}") for n, one in zip(some, pictures(live, made.x), strict=True)])
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
