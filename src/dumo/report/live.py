"""Runs that are sampled while a person waits, by any mode, noise and guidance, and stopped where it takes long.

1. `open_runs` opens runs, checks that they fit next to each other (`require_fit`: the same data in the same shape, with
   the same classes), and samples each once.
2. `InteractiveRun` turns what was typed into conditions, noises, a guidance and a sampling mode.
3. `InteractiveRun.sample` checks that the solver can make these passes, goes through the net, which is stopped where
   the time is over, and decodes.

`dumo.report.answer` calls the second and third for every answer.
"""

import itertools
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dumo.config.code import names_code
from dumo.config.conditions import shown_data
from dumo.config.fit import why_unguided
from dumo.config.source import trained_name_of
from dumo.config.spec import Run
from dumo.data import Images
from dumo.evaluation.neighbours import nearest_other
from dumo.flow.generate import counting_passes, eval_mode, in_precision, integrate
from dumo.flow.guide import CFG
from dumo.flow.solver import Euler, Fresh, Heun, check
from dumo.io.read import brief
from dumo.io.yaml import parse_yaml
from dumo.report.gallery import TAUGHT_BY_LETTER, SamplingMode, sampling_modes
from dumo.report.page import num_data_rows
from dumo.report.sample import DATA_POINTS, guide_of, repeat_conditions
from dumo.run import shipped
from dumo.run.prompt import conditions_of_prompts, edits_images
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, open_run
from dumo.runtime.random import noise, stream
from dumo.types import Sample, UserError

ANSWER_SECONDS = 60.0  # that an answer may take: ours
MAX_PROMPT_LETTERS = 10_000  # in a prompt; encoders read far fewer: ours
MAX_ENCODED_PROMPTS = 64  # in memory; of a T5-XXL each takes 8 MB: ours
SPACING_IMAGES = 256  # images of the data whose nearest other image is looked for: ours
WARM_UP_SECONDS = 3600  # that the first pass may take, which compiles and loads: ours


@dataclass(frozen=True)
class TimedSamples:
    """Decoded samples, and what they took."""

    x: Sample  # (n, *pixels), on the CPU
    nfe: int  # passes of each row through the net
    seconds: float  # that all rows took, with decoding


@dataclass(frozen=True)
class InteractiveRun:
    """A run that is sampled while a person waits."""

    opened: RunFolder
    name: str = "run"  # on the page
    load_call: str = ""  # the Python that opens it: dumo.load(...)
    limit: float = ANSWER_SECONDS  # seconds that an answer may take

    @property
    def sampler(self) -> Sampler:
        """The run's net with all that its samples depend on."""
        return self.opened.sampler

    @cached_property
    def modes(self) -> dict[str, SamplingMode]:
        """The sampling modes that the run was taught, by letter: u by jumps, v by the run's own steps, else Euler's."""
        solver = self.sampler.spec.solver
        velocity_solver = solver if isinstance(solver, Euler | Heun) else None
        return sampling_modes(self.sampler, velocity_solver)

    @cached_property
    def guidance_refusal(self) -> str:
        """Why the run cannot be guided, in a clause; "" where it can."""
        run = self.opened.run
        refusal = why_unguided(self.sampler.data, self.sampler.flow.objective, run.training_guidance)
        return refusal.reason if refusal else ""

    @cached_property
    def data(self) -> tuple[Tensor, int | None]:
        """Some samples of the data (n, *pixels), and how many there are in all; None: they never end.

        They are all of the data where those are in memory. Raises UserError or OSError where the data are missing.
        """
        sampler = self.sampler
        source = sampler.data.originals()
        rows = num_data_rows(sampler) if sampler.is_image else DATA_POINTS
        x, _ = source.reference(rows, sampler.spec.seed)
        return x, source.size

    @cached_property
    def spacing(self) -> float:
        """The mean distance of an image of the data to the nearest other one, over SPACING_IMAGES of them.

        Raises UserError where there is only one image; UserError or OSError where the data are missing.
        """
        real, _ = self.data
        if len(real) < 2:
            raise UserError("there is one image alone")
        order = torch.randperm(len(real), generator=stream(self.sampler.spec.seed, "spacing"))
        return nearest_other(real, order[:SPACING_IMAGES]).mean().item()

    def mode(self, letter: str) -> SamplingMode:
        """The sampling mode of this letter. Raises UserError where the run was not taught it."""
        if letter not in self.modes:
            untaught = TAUGHT_BY_LETTER.get(letter, f"reading '{brief(letter)}'")
            raise UserError(f"objective {self.sampler.flow.objective.kind} teaches no {untaught}")
        return self.modes[letter]

    def guide(self, scale: float) -> CFG:
        """The run's guidance with another scale; 1 is none. Raises UserError where the run cannot be guided so."""
        return guide_of(self.sampler, self.opened.run.training_guidance, scale)

    def conditions(self, text: str, n: int = 1) -> Tensor:
        """The conditions c (n,) of n samples that a text asks for.

        It is a prompt where the net reads captions, else the name or number of a class; "" is all classes in turn.
        Raises UserError for an unknown class, and for a prompt that is empty, too long, or cannot be encoded.
        """
        conditions = self.sampler.conditions
        if conditions.captions is None:
            only = [conditions.index(text)] if conditions.count and text.strip() else None
            return conditions.in_turn(n, only)
        if len(text) > MAX_PROMPT_LETTERS:
            raise UserError(f"a prompt of {len(text):,} letters is too long: say it in {MAX_PROMPT_LETTERS:,} at most")
        if self.sampler.texts:
            self.sampler.texts.forget(MAX_ENCODED_PROMPTS - 1)  # one is added next
        return repeat_conditions(conditions_of_prompts(self.sampler, [text]), n)

    def noises(self, seed: int, n: int = 1) -> Fresh:
        """The draws (n, *shape) of samples 0 to n - 1 of a seed, those that `dumo sample --seed` makes."""
        shape = self.sampler.data.shape
        device = self.sampler.device
        return lambda k: noise(seed, range(n), k, shape).to(device)

    def sample(
        self,
        mode: SamplingMode,
        nfe: int,
        c: Tensor,
        noises: Fresh,
        guide: CFG | None = None,
        deadline: float | None = None,
    ) -> TimedSamples:
        """Make n samples of the conditions c (n,), from `noises` of n rows, and decode them.

        `guide` None is the run's own guidance. No pass begins after `deadline`, a time of `time.monotonic`; None is
        after the run's limit. Raises UserError where one would, and for a number of passes that the solver cannot make.
        """
        sampler = self.sampler
        net = sampler.net
        device = sampler.device
        began = time.monotonic()
        if deadline is None:
            deadline = began + self.limit
        check(mode.solver, sampler.taught, nfe)
        reads = sampler.guided(guide or sampler.spec.guide)
        with (
            eval_mode(net),
            counting_passes(net) as rows_per_pass,
            in_precision(net, sampler.precision, device),
            _stop_after(net, deadline),
        ):
            _, x = integrate(reads, sampler.flow.path, mode.solver, c.to(device), nfe, noises)
        x = sampler.decode(x.cpu())
        return TimedSamples(x, sum(rows_per_pass) // len(c), time.monotonic() - began)

    def warm_up(self) -> None:
        """Make a sample by each mode and forget it: a first pass takes longer than others, and shows what is amiss."""
        c = torch.zeros(1, dtype=torch.long)
        for mode in self.modes.values():
            deadline = time.monotonic() + WARM_UP_SECONDS
            self.sample(mode, mode.solver.passes, c, self.noises(0), deadline=deadline)

    def facts(self) -> dict[str, str | None]:
        """The facts, by name, that two runs must share to be shown next to each other; None: not known of this run."""
        data = shown_data(self.sampler.data)
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
    folders: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    weights: str | None = None,
    device: str = "auto",
    limit: float,
) -> list[InteractiveRun]:
    """Open runs that are shown next to each other, and sample each once. `overrides` are changes as --set takes them.

    Raises UserError where a folder is no run's or comes
    twice, `weights` might be of either run, a run edits images, or runs do not fit (`require_fit`).
    """
    places = [shipped.find(folder).resolve() for folder in folders]
    if weights and len(places) > 1:
        raise UserError("--weights are of one run: give one run, or two folders without --weights")
    if len(set(places)) < len(places):
        raise UserError(f"both folders are the same run, {folders[0]}: give one, or two different ones")
    runs: list[InteractiveRun] = []
    for folder, name in zip(folders, short_names(places), strict=True):
        opened = open_run(folder, overrides, weights=weights, device=device)
        run = InteractiveRun(opened, name, _load_call(opened.run, folder, overrides, weights, device), limit)
        if edits_images(run.sampler.data):
            raise UserError(f"{folder} edits images, which the page has no field for: dumo sample --source FILE")
        if runs:
            require_fit(runs[0], run)
        runs.append(run)
    for run in runs:
        run.warm_up()
    return runs


def short_names(places: Sequence[Path]) -> list[str]:
    """A name for each of several different paths: its last parts, as few as tell all of them apart."""
    for length in itertools.count(1):
        names = ["-".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("the paths are different")


def _load_call(run: Run, folder: str, overrides: Sequence[str], weights: str | None, device: str) -> str:
    """The Python that opens the run of a folder with these options: dumo.load(...).

    A run that comes with dumo has the word it was given by, another its whole path, which is read in any folder.
    """
    is_shipped = trained_name_of(folder) is not None
    arguments = [repr(folder if is_shipped else str(Path(folder).resolve()))]
    if overrides:
        fields: dict[str, object] = {}
        for text in overrides:
            name, _, value = text.partition("=")
            fields[name] = parse_yaml(value)
        arguments.append(repr(fields))
    if weights:
        arguments.append(f"weights={str(Path(weights).resolve())!r}")
    if device != "auto":
        arguments.append(f"device={device!r}")
    if names_code(run):
        arguments.append("trust_code=True")
    return f"dumo.load({', '.join(arguments)})"


def require_fit(run: InteractiveRun, other: InteractiveRun) -> None:
    """Raise UserError where two runs are of different data, shapes or classes: a seed shows nothing in common then."""
    facts = run.facts()
    for name, other_fact in other.facts().items():
        fact = facts[name]
        if fact != other_fact and None not in (fact, other_fact):
            raise UserError(
                f"{other.name} does not fit next to {run.name}, its {name}: {brief(f'{other_fact}')}, not "
                f"{brief(f'{fact}')}: give two runs of the same data, or one"
            )


@contextmanager
def _stop_after(net: nn.Module, deadline: float) -> Generator[None, None, None]:
    """Inside, a pass through the net that would begin after `deadline` raises UserError instead."""

    def check_time(*_: object) -> None:
        if time.monotonic() > deadline:
            raise UserError("stopped, it took too long: ask for fewer passes, or give dumo demo a higher --limit")

    hook = net.register_forward_pre_hook(check_time)
    try:
        yield
    finally:
        hook.remove()
