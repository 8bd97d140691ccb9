"""Runs that are sampled while a person waits, by any mode, noise and guidance, and stopped where it takes long.

`open_runs` opens runs, checks that they fit next to each other (the same data in the same shape, with the same classes)
and samples each once. `InteractiveRun.make` then makes samples: it checks that the solver can make these passes, goes
through the net, which is stopped where the time is over, and decodes.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from dumo.config.conditions import shown
from dumo.data import Images
from dumo.evaluation.neighbours import nearest_other
from dumo.flow.generate import counting_passes, eval_mode, in_precision, integrate
from dumo.flow.guide import CFG
from dumo.flow.solver import Euler, Fresh, Heun, check
from dumo.io.read import brief
from dumo.io.yaml import parse
from dumo.report.gallery import TAUGHT_BY_LETTER, SamplingMode, sampling_modes
from dumo.report.page import data_rows
from dumo.report.sample import DATA_POINTS, guide_of, repeat_conditions
from dumo.run import shipped
from dumo.run.judge import training_data
from dumo.run.prompt import edits, prompted
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, open_run
from dumo.runtime.random import noise, stream
from dumo.types import Sample, UserError

LIMIT = 60.0  # seconds of an answer: ours
MAX_PROMPT_LETTERS = 10_000  # ours; encoders read far fewer
KEPT_PROMPTS = 64  # encoded: ours; of a T5-XXL 8 MB each
SPACING_IMAGES = 256  # of the data, with their nearest others: ours
WARM_UP_SECONDS = 3600  # that the first pass may take


@dataclass(frozen=True)
class TimedSamples:
    """Samples (n, *pixels), on the CPU; the passes of each row through the net; the seconds that all took, decoded."""

    x: Sample
    nfe: int
    seconds: float


@dataclass(frozen=True)
class InteractiveRun:
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
    def modes(self) -> dict[str, SamplingMode]:
        """The ways to sample the run, by letter: u by jumps, v by its own steps, or else Euler's; as far as taught."""
        solver = self.sampler.spec.solver
        return sampling_modes(self.sampler, along=solver if isinstance(solver, Euler | Heun) else None)

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
        sampler = self.sampler
        source = training_data(sampler.data)
        rows = data_rows(sampler) if sampler.is_image else DATA_POINTS
        x, _ = source.reference(rows, sampler.spec.seed)
        return x, source.size

    @cached_property
    def spacing(self) -> float:
        """How far an image of the data lies from the nearest other one, in the mean of some.

        Raises as `data`, and UserError where there is one alone.
        """
        real, _ = self.data
        if len(real) < 2:
            raise UserError("there is one image alone")
        order = torch.randperm(len(real), generator=stream(self.sampler.spec.seed, "spacing"))
        return nearest_other(real, order[:SPACING_IMAGES]).mean().item()

    def mode(self, letter: str) -> SamplingMode:
        """The way to sample of this letter. Raises UserError where it was not taught."""
        if letter not in self.modes:
            untaught = TAUGHT_BY_LETTER.get(letter, f"reading '{brief(letter)}'")
            raise UserError(f"objective {self.sampler.flow.objective.kind} teaches no {untaught}")
        return self.modes[letter]

    def guide(self, scale: float) -> CFG:
        """The run's guidance by this scale, 1 for none. Raises UserError as `guide_of`."""
        return guide_of(self.sampler, self.opened.run.guided, scale)

    def conditions(self, text: str, n: int = 1) -> Tensor:
        """The conditions of n samples: a prompt where the net reads captions, else a class by its name or number.

        All classes in turn where the text is empty. Raises UserError for no such class, and for a prompt as `prompted`.
        """
        conditions = self.sampler.conditions
        if conditions.captions is None:
            only = [conditions.index(text)] if conditions.count and text.strip() else None
            return conditions.in_turn(n, only)
        if len(text) > MAX_PROMPT_LETTERS:
            raise UserError(f"a prompt of {len(text):,} letters is too long: say it in {MAX_PROMPT_LETTERS:,} at most")
        if self.sampler.texts:
            self.sampler.texts.forget(KEPT_PROMPTS - 1)
        return repeat_conditions(prompted(self.sampler, [text]), n)

    def fresh(self, seed: int, images: int = 1) -> Fresh:
        """The draws of the first images of a seed, as `dumo sample --seed` and `run.sample(seed=...)` make them."""
        shape = self.sampler.data.shape
        device = self.sampler.device
        return lambda k: noise(seed, range(images), k, shape).to(device)

    def make(
        self,
        mode: SamplingMode,
        nfe: int,
        c: Tensor,
        fresh: Fresh,
        guide: CFG | None = None,
        until: float | None = None,
    ) -> TimedSamples:
        """A sample of each row of the noise, of its condition in c (n,), decoded; guided as the run is, if None.

        Raises UserError for a number of passes that the solver cannot make, and where they take longer than to `until`,
        a time of `time.monotonic`; None: than the limit.
        """
        sampler = self.sampler
        net = sampler.net
        device = sampler.device
        began = time.monotonic()
        if until is None:
            until = began + self.limit
        check(mode.solver, sampler.taught, nfe)
        reads = sampler.guided(guide or sampler.spec.guide)
        with (
            eval_mode(net),
            counting_passes(net) as rows_per_pass,
            in_precision(net, sampler.precision, device),
            _stop_after(net, until),
        ):
            _, x = integrate(reads, sampler.flow.path, mode.solver, c.to(device), nfe, fresh)
        x = sampler.decode(x.cpu())
        return TimedSamples(x, sum(rows_per_pass) // len(c), time.monotonic() - began)

    def warm(self) -> None:
        """Make a sample and forget it: the first pass takes longer than the others, and shows what is amiss."""
        c = torch.zeros(1, dtype=torch.long)
        for mode in self.modes.values():
            self.make(mode, mode.solver.passes, c, self.fresh(0), until=time.monotonic() + WARM_UP_SECONDS)

    def facts(self) -> dict[str, str | None]:
        """What two runs must share to be shown next to each other; None: not known."""
        data = shown(self.sampler.data)
        conditions = self.sampler.conditions
        fingerprint = None
        if isinstance(self.sampler.data, Images):  # that of latents is of their cache
            fingerprint = self.opened.data_fingerprint
        return {
            "data": data.kind,
            "shape": " x ".join(map(str, data.shape)),
            "classes": "captions" if conditions.captions else f"{conditions.count}",
            "names of classes": None if conditions.captions else ", ".join(conditions.names),
            "fingerprint of the images": fingerprint,
        }


def open_runs(
    folders: Sequence[str], sets: Sequence[str] = (), *, weights: str | None = None, device: str = "auto", limit: float
) -> list[InteractiveRun]:
    """Runs that stand next to each other, each sampled once.

    Raises UserError as `open_run`, for the same folder twice, weights of which run is not said, a run that edits
    images, and as `require_fit`.
    """
    places = [shipped.find(folder).resolve() for folder in folders]
    if weights and len(places) > 1:
        raise UserError("--weights are of one run: give one run, or two folders without --weights")
    if len(set(places)) < len(places):
        raise UserError(f"both runs are {folders[0]}: give one run, or two folders without --weights")
    lives: list[InteractiveRun] = []
    for folder, place, name in zip(folders, places, short_names(places), strict=True):
        opened = open_run(folder, sets, weights=weights, device=device)
        live = InteractiveRun(opened, name, _load_call(place, sets, weights, device), limit)
        if edits(live.sampler.data):
            raise UserError(f"{folder} edits images, which the page has no field for: dumo sample --source FILE")
        if lives:
            require_fit(lives[0], live)
        lives.append(live)
    for live in lives:
        live.warm()
    return lives


def short_names(places: Sequence[Path]) -> list[str]:
    """The last parts of different paths, as few as tell them apart."""
    for length in count(1):
        names = ["-".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the paths are different")


def _load_call(place: Path, sets: Sequence[str], weights: str | None, device: str) -> str:
    """The Python that opens a run as it is open here."""
    arguments = [repr(str(place))]
    if sets:
        fields: dict[str, object] = {}
        for text in sets:
            name, _, value = text.partition("=")
            fields[name] = parse(value)
        arguments.append(repr(fields))
    if weights:
        arguments.append(f"weights={str(Path(weights).resolve())!r}")
    if device != "auto":
        arguments.append(f"device={device!r}")
    return f"dumo.load({', '.join(arguments)})"


def require_fit(live: InteractiveRun, other: InteractiveRun) -> None:
    """Raise UserError where two runs are of other data, shapes or classes: then nothing is the same in both."""
    facts = live.facts()
    for name, other_fact in other.facts().items():
        fact = facts[name]
        if fact != other_fact and None not in (fact, other_fact):
            raise UserError(
                f"{other.name} does not fit next to {live.name}, its {name}: {brief(f'{other_fact}')}, not "
                f"{brief(f'{fact}')}: give two runs of the same data, or one"
            )


@contextmanager
def _stop_after(net: nn.Module, until: float) -> Generator[None, None, None]:
    """Raise UserError before a pass through the net that begins later than this."""

    def check_time(*_: object) -> None:
        if time.monotonic() > until:
            raise UserError("stopped, it took too long: ask for fewer passes, or give dumo demo a higher --limit")

    hook = net.register_forward_pre_hook(check_time)
    try:
        yield
    finally:
        hook.remove()
