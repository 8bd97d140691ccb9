"""A run that is sampled while a person waits: by any reading and noise, timed, and stopped where it takes too long."""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import cos, pi, prod, sin

import torch
from torch import Tensor, nn

from dumo.evaluation.neighbours import nearest_other
from dumo.flow.generate import carried, counting, evaluating, passing
from dumo.flow.solver import Euler, Fresh, Heun, check
from dumo.io.read import brief
from dumo.report.page import NEAR, POINTS
from dumo.run.folder import RunFolder
from dumo.run.gallery import Reading, readings
from dumo.run.prompt import prompted
from dumo.run.sample import real_data
from dumo.runtime.random import noise, stream
from dumo.types import Sample, UserError

LIMIT = 60.0  # seconds of an answer: ours
LONGEST = 10_000  # letters of a prompt: ours; encoders read far fewer
SOME = 256  # images of the data whose nearest others are looked for: ours


@dataclass(frozen=True)
class Made:
    """Samples (n, *pixels), on the CPU; the passes of each row through the net; the seconds that all took, decoded."""

    x: Sample
    nfe: int
    seconds: float


@dataclass(frozen=True)
class Sampler:
    """A run, opened, and the seconds that an answer may take."""

    opened: RunFolder
    limit: float = LIMIT

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """The ways to sample the run, by letter: u by jumps, v by its own steps, or else Euler's; as far as taught."""
        own = self.opened.run.sample.solver
        return readings(self.opened.sampler, own if isinstance(own, Euler | Heun) else None)

    @cached_property
    def data(self) -> tuple[Tensor, int | None]:
        """Samples of the data, as they are shown, and how many there are in all (None: they never end).

        All where they are in memory, else some. Raises UserError or OSError where the data are not there.
        """
        run = self.opened.run
        source = real_data(run.data)
        few = min(POINTS, NEAR // prod(run.pixels[1:])) if self.opened.sampler.is_image else 2 * POINTS
        return source.reference(few, run.sample.seed)[0], source.size

    @cached_property
    def spacing(self) -> float:
        """How far an image of the data lies from the nearest other one, in the mean of some.

        Raises as `data`, and UserError where there is one alone.
        """
        real, _ = self.data
        if len(real) < 2:
            raise UserError("there is one image alone")
        some = torch.randperm(len(real), generator=stream(self.opened.run.sample.seed, "spacing"))[:SOME]
        return nearest_other(real, some).mean().item()

    def reading(self, letter: str) -> Reading:
        """The way to sample of this letter. Raises UserError where it was not taught."""
        if letter not in self.readings:
            raise UserError(f"there is no reading '{brief(letter)}' of this run: take {' or '.join(self.readings)}")
        return self.readings[letter]

    def condition(self, text: str) -> int:
        """The number of what is asked for: a prompt where the run reads captions, else a class's name or number.

        0 of data without classes. Raises UserError for no such class, and for a prompt as `prompted`.
        """
        run = self.opened.run
        if run.conditions.captions is None:
            return run.conditions.index(text) if run.data.classes else 0
        if len(text) > LONGEST:
            raise UserError(f"a prompt of {len(text):,} letters is too long: say it in {LONGEST:,} at most")
        return int(prompted(self.opened.sampler, [text]))

    def fresh(self, seeds: Sequence[int], images: int = 1) -> Fresh:
        """The draws of the first images of each seed, as `dumo sample --seed` makes them."""
        shape, device = self.opened.run.data.shape, self.opened.device
        return lambda k: torch.cat([noise(seed, range(images), k, shape) for seed in seeds]).to(device)

    def make(self, reading: Reading, nfe: int, c: int, fresh: Fresh, until: float | None = None) -> Made:
        """A sample of condition c for each row of the noise, decoded.

        Raises UserError where the solver cannot make so many passes, and where they take longer than to `until`, a time
        of `time.monotonic`; None: than the limit.
        """
        opened, run, began = self.opened, self.opened.run, time.monotonic()
        check(reading.solver, opened.sampler.taught, nfe)
        net, late = opened.net, began + self.limit if until is None else until
        rows = torch.full((len(fresh(0)),), c, device=opened.device)
        with evaluating(net), counting(net) as passed, passing(net, run.precision, opened.device), due(net, late):
            _, x = carried(opened.sampler.reads, run.path, reading.solver, rows, nfe, fresh)
        x = opened.sampler.decode(x).cpu()
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
