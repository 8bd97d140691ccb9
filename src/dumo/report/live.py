"""Runs that are sampled while a person waits, by any reading, noise and guidance, and stopped where it takes long.

Two runs stand next to each other where they fit: the same data in the same shape, with the same classes.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from dumo.config.conditions import shown
from dumo.data import Images
from dumo.evaluation.neighbours import nearest_other
from dumo.flow.generate import carried, counting, evaluating, passing
from dumo.flow.guide import CFG
from dumo.flow.solver import Euler, Fresh, Heun, check
from dumo.io.read import brief
from dumo.io.yaml import parse
from dumo.report.gallery import Reading, readings
from dumo.report.page import NEAR, POINTS
from dumo.report.sample import guide_of, turned
from dumo.run import shipped
from dumo.run.judge import real_data
from dumo.run.prompt import edits, prompted
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, open_run
from dumo.runtime.random import noise, stream
from dumo.types import Sample, UserError

LIMIT = 60.0  # seconds of an answer: ours
LONGEST = 10_000  # letters of a prompt: ours; encoders read far fewer
PROMPTS = 64  # that are kept encoded: ours; of a T5-XXL 8 MB each
SOME = 256  # images of the data with their nearest others: ours
WORDS = {"u": "jumps", "v": "velocity"}  # what a reading follows, by its letter


@dataclass(frozen=True)
class Made:
    """Samples (n, *pixels), on the CPU; the passes of each row through the net; the seconds that all took, decoded."""

    x: Sample
    nfe: int
    seconds: float


@dataclass(frozen=True)
class Live:
    """A run that is sampled while a person waits, and the seconds that an answer may take.

    `name` is what it is called on the page; `load` the Python that opens it.
    """

    opened: RunFolder
    name: str = "run"
    load: str = ""
    limit: float = LIMIT

    @property
    def sampler(self) -> Sampler:
        """The net with all that its samples depend on."""
        return self.opened.sampler

    @cached_property
    def readings(self) -> dict[str, Reading]:
        """The ways to sample the run, by letter: u by jumps, v by its own steps, or else Euler's; as far as taught."""
        own = self.sampler.spec.solver
        return readings(self.sampler, own if isinstance(own, Euler | Heun) else None)

    @cached_property
    def unguided(self) -> str:
        """Why the run cannot be guided; empty where it can."""
        try:
            self.guide(2)
        except UserError as error:
            return str(error).replace("guidance = 2 ", "guidance ", 1)
        return ""

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
        if letter not in self.readings:
            what = WORDS.get(letter, f"reading '{brief(letter)}'")
            raise UserError(f"objective {self.sampler.flow.objective.kind} teaches no {what}")
        return self.readings[letter]

    def guide(self, scale: float) -> CFG:
        """The run's guidance by this scale, 1 for none. Raises UserError as `guide_of`."""
        return guide_of(self.sampler, self.opened.run.guided, scale)

    def conditions(self, text: str, n: int = 1) -> Tensor:
        """The conditions of n samples: a prompt where the net reads captions, else a class by its name or number.

        All classes in turn where the text is empty. Raises UserError for no such class, and for a prompt as `prompted`.
        """
        conditions = self.sampler.conditions
        if conditions.captions is None:
            one = conditions.count and text.strip()
            return conditions.in_turn(n, [conditions.index(text)] if one else None)
        if len(text) > LONGEST:
            raise UserError(f"a prompt of {len(text):,} letters is too long: say it in {LONGEST:,} at most")
        if texts := self.sampler.texts:
            texts.forget(PROMPTS - 1)
        return turned(prompted(self.sampler, [text]), n)

    def fresh(self, seed: int, images: int = 1) -> Fresh:
        """The draws of the first images of a seed, as `dumo sample --seed` and `run.sample(seed=...)` make them."""
        shape, device = self.sampler.data.shape, self.sampler.device
        return lambda k: noise(seed, range(images), k, shape).to(device)

    def make(
        self, reading: Reading, nfe: int, c: Tensor, fresh: Fresh, guide: CFG | None = None, until: float | None = None
    ) -> Made:
        """A sample of each row of the noise, of its condition in c (n,), decoded; guided as the run is, if None.

        Raises UserError for a number of passes that the solver cannot make, and where they take longer than to `until`,
        a time of `time.monotonic`; None: than the limit.
        """
        sampler, net, began = self.sampler, self.sampler.net, time.monotonic()
        check(reading.solver, sampler.taught, nfe)
        reads, late = sampler.guided(guide or sampler.spec.guide), began + self.limit if until is None else until
        with evaluating(net), counting(net) as passed, passing(net, sampler.precision, sampler.device), due(net, late):
            _, x = carried(reads, sampler.flow.path, reading.solver, c.to(sampler.device), nfe, fresh)
        x = sampler.decode(x.cpu())
        return Made(x, sum(passed) // len(c), time.monotonic() - began)

    def warm(self) -> None:
        """Make a sample and forget it: the first pass takes longer than the others, and shows what is amiss."""
        for reading in self.readings.values():
            c = torch.zeros(1, dtype=torch.long)
            self.make(reading, reading.solver.passes, c, self.fresh(0), until=time.monotonic() + 3600)

    def facts(self) -> dict[str, str | None]:
        """What two runs must share to be shown next to each other; None: not known."""
        data, conditions = shown(self.sampler.data), self.sampler.conditions
        plain = isinstance(self.sampler.data, Images)  # the fingerprint of latents is that of their cache
        return {
            "data": data.kind,
            "shape": " x ".join(map(str, data.shape)),
            "classes": "captions" if conditions.captions else f"{conditions.count}",
            "names of classes": None if conditions.captions else ", ".join(conditions.names),
            "fingerprint of the images": self.opened.data_fingerprint if plain else None,
        }


def open_lives(
    folders: Sequence[str], sets: Sequence[str] = (), *, weights: str | None = None, device: str = "auto", limit: float
) -> list[Live]:
    """Runs that stand next to each other, each sampled once.

    Raises UserError as `open_run`, for the same folder twice, weights of which run is not said, a run that edits
    images, and as `require_fit`.
    """
    places = [shipped.find(folder).resolve() for folder in folders]
    if len(set(places)) < len(places) or (weights and len(places) > 1):
        wrong = "--weights are of one run" if weights else f"both runs are {folders[0]}"
        raise UserError(f"{wrong}: give one run, or two folders without --weights")
    lives = list[Live]()
    for folder, place, name in zip(folders, places, short(places), strict=True):
        live = Live(
            open_run(folder, sets, weights=weights, device=device), name, load_call(place, sets, weights, device), limit
        )
        if edits(live.sampler.data):
            raise UserError(f"{folder} edits images, which the page has no field for: dumo sample --source FILE")
        if lives:
            require_fit(lives[0], live)
        lives.append(live)
    for live in lives:
        live.warm()
    return lives


def short(places: Sequence[Path]) -> list[str]:
    """The last parts of different paths, as few as tell them apart."""
    names = (["-".join(place.parts[-n:]) for place in places] for n in count(1))
    return next(some for some in names if len(set(some)) == len(some))


def load_call(place: Path, sets: Sequence[str], weights: str | None, device: str) -> str:
    """The Python that opens a run as it is open here."""
    words = [repr(str(place))]
    if sets:
        words.append(repr({name: parse(value) for name, _, value in (text.partition("=") for text in sets)}))
    if weights:
        words.append(f"weights={str(Path(weights).resolve())!r}")
    if device != "auto":
        words.append(f"device={device!r}")
    return f"dumo.load({', '.join(words)})"


def require_fit(live: Live, other: Live) -> None:
    """Raise UserError where two runs are of other data, shapes or classes: then nothing is the same in both."""
    facts = live.facts()
    for name, there in other.facts().items():
        if (here := facts[name]) != there and None not in (here, there):
            raise UserError(
                f"{other.name} does not fit next to {live.name}, its {name}: {brief(f'{there}')}, not "
                f"{brief(f'{here}')}: give two runs of the same data, or one"
            )


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
