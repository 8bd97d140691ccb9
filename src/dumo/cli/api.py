"""The front door from Python: `import dumo`, then `dumo.load`, `dumo.train` and `dumo.recipe`.

Each does what the command of its name does, with Python's values instead of flags. What is wrong raises `UserError`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic_core import PydanticSerializationError
from torch import nn

from dumo.encoders.codec import Opened
from dumo.io import picture
from dumo.report import page
from dumo.run.config import load as config
from dumo.run.config.change import override, shown
from dumo.run.config.spec import Run
from dumo.run.evaluation import evaluate as evaluation
from dumo.run.folder import RunFolder, open_run
from dumo.run.prompt import prompted
from dumo.run.sample import COUNT, solver_of, turned
from dumo.run.train import train as train_run
from dumo.runtime.progress import Bar, bar, no_bar, say
from dumo.types import Reads, Sample
from dumo.types import UserError as UserError

Changes = Mapping[str, Any]  # dotted fields of a run and their values, e.g. {"train.steps": 100}


@dataclass(frozen=True)
class TrainedRun:
    """A run's folder, its net loaded: sample it, judge it, read it."""

    opened: RunFolder

    @property
    def spec(self) -> Run:
        """The run as it was trained: `run.spec.train.steps`, `run.spec.objective` ..."""
        return self.opened.run

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.opened.folder

    @property
    def net(self) -> nn.Module:
        """The network in evaluation mode, with the weights that are sampled: `net(x, c, t=t)` gives its heads."""
        return self.opened.net

    @property
    def step(self) -> int:
        """The training step of these weights."""
        return self.opened.step

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.opened.device

    @property
    def codec(self) -> Opened | None:
        """The autoencoder that decodes latents; None where the network makes images or points themselves."""
        return self.opened.sampler.codec

    @cached_property
    def reading(self) -> Reads:
        """What a solver calls, on the run's device; None for what the objective does not teach.

        `velocity(x_t, t, c)` is dx_t/dt, `endpoint(x_t, t, c)` is x_0, `flow_map(x_t, t, s, c)` is x_s. Knobs and
        guidance are those of `spec.sample`; gradients are recorded.
        """
        return self.opened.sampler.reads

    def sample(
        self,
        classes: int | str | Sequence[int | str] | None = None,
        count: int | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        nfe: int | None = None,
        seed: int | None = None,
        solver: str | None = None,
        bar: Bar = no_bar,
    ) -> Sample:
        """Make samples, float32 on the CPU: images (n, channels, height, width) in [-1, 1], or points (n, 2).

        `classes`, numbers or names, are taken in turn (None: all of them); or `prompts`, texts, of a run that was
        trained on captions. `count` is n: as many as are given, else 100. `nfe` is the number of network passes; it,
        seed and solver are the run's own unless given. Sample i depends on seed, class and i alone. Raises UserError
        for a class, solver or nfe out of range, and for prompts as `dumo.run.prompt.prompted`.
        """
        if prompts is not None and classes is not None:
            raise UserError("prompts and classes are two ways to say what to make: give one of them")
        wanted = [classes] if isinstance(classes, int | str) else classes
        index = self.spec.conditions.index
        only = None if wanted is None else [index(c if isinstance(c, str) else str(int(c))) for c in wanted]
        if only == []:
            raise UserError("classes is empty: name at least one, or leave it out for all of them")
        if prompts is not None:
            c = prompted(self.opened.sampler, [prompts] if isinstance(prompts, str) else prompts)
            c = turned(c, len(c) if count is None else count)
        else:
            c = self.spec.conditions.in_turn(count if count is not None else len(only or range(COUNT)), only)
        chosen, nfe = solver_of(self.spec.sample, solver), self.spec.sample.nfe[0] if nfe is None else nfe
        x = self.opened.sampler.sample(c, nfe=nfe, seed=seed, solver=chosen, bar=bar).x
        return x.clamp(-1, 1) if self.makes_images else x

    @property
    def makes_images(self) -> bool:
        """Whether a sample is an image, not a point."""
        return self.opened.sampler.is_image

    def pil(self, images: Sample) -> list[Image.Image]:
        """Images (n, 1 or 3, height, width) in [-1, 1] as PIL's, in RGB. Raises UserError for points."""
        if not self.makes_images:
            kind = self.spec.data.kind
            raise UserError(f"data '{kind}' has points of shape {self.spec.pixels}, not images: plot them instead")
        return [Image.fromarray(pixels.numpy()) for pixels in picture.to_rows(images)]

    def evaluate(
        self,
        nfe: int | Sequence[int] | None = None,
        *,
        seed: int | None = None,
        solver: str | None = None,
        bar: Bar = no_bar,
    ) -> dict[str, Any]:
        """Judge the run by its protocol, write the report into its folder, and return it as a dict.

        `results` has a row per number of passes; `file` says where the report is. Raises UserError as `sample`.
        """
        passes = [nfe] if isinstance(nfe, int) else nfe
        return evaluation.evaluate(self.opened, nfe=passes, seed=seed, solver=solver, bar=bar)

    def report(self, *, prompts: Sequence[str] = (), bar: Bar = no_bar) -> Path:
        """Write report.html into the run's folder; return its path. `prompts`: texts to show instead of captions."""
        return page.write(self.opened, bar, prompts)[-1]


def load(
    folder: str | Path,
    changes: Changes | None = None,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
) -> TrainedRun:
    """Open a trained run's folder. Raises UserError where it is none, or has no checkpoint yet.

    `changes` may set what sampling and evaluation read, e.g. {"sample.guide.scale": 2}. `weights` is a safetensors
    file, or a folder of shards, instead of the run's first average. `device`: auto takes the GPU where there is
    one.
    """
    file = None if weights is None else str(weights)
    return TrainedRun(open_run(str(folder), _settings(changes), weights=file, device=str(device)))


def recipe(source: str | Path | Run, changes: Changes | None = None) -> Run:
    """The complete run of a recipe's name, a YAML file or a run's folder, with these fields changed.

    A value may be a dict or a list, which replaces the field whole. Raises UserError for each wrong field, with the
    nearest valid name.
    """
    if not isinstance(source, Run):
        return config.load(str(source), _settings(changes))
    tree = source.model_dump(mode="json")
    override(tree, _settings(changes))
    return config.parse(Run, tree)


def train(
    source: str | Path | Run,
    changes: Changes | None = None,
    *,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    bar: Bar = bar,
) -> TrainedRun:
    """Train a recipe, or go on with a run's folder where it stopped; return the trained run.

    `out` is the run's folder, runs/NAME unless given; `bar` shows the progress, on stderr unless given.
    Raises UserError as `recipe` does, and where the folder holds another run.
    """
    run = recipe(source, changes)
    if out is None and isinstance(source, Run):
        raise UserError('a run without a name needs a folder: say out="runs/NAME"')
    folder = Path(out) if out is not None else config.default_folder(str(source))
    train_run(run, folder, device=str(device), bar=bar, tell=None if bar is no_bar else say)
    return load(folder, device=device)


def _settings(changes: Changes | None) -> list[str]:
    """The changes as `--set` takes them."""

    def text(name: str, value: object) -> str:
        try:
            return shown(value)
        except PydanticSerializationError as error:
            raise UserError(f"{name}: {value!r} is no number, text, list or dict") from error

    return [f"{name}={text(name, value)}" for name, value in (changes or {}).items()]
