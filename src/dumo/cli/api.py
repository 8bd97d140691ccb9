"""The functions of `import dumo`: `train`, `load`, `recipe`, `recipes` and `compare`.

Each does what the command of its name does, with Python's values instead of options, whose names the arguments have.
`train` and `load` return a `TrainedRun`; `recipe` returns the spec of a run, trained or not.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex, get_args

import torch
from PIL import Image
from pydantic_core import PydanticSerializationError
from torch import Generator, Tensor, nn

from dumo.cli.callback import Callback, called_back
from dumo.config import recipes as shipped_recipes
from dumo.config.change import override, yaml_text
from dumo.config.load import load as load_run
from dumo.config.load import parse
from dumo.config.place import EVALUATION_FILE
from dumo.config.spec import Run
from dumo.config.trust import trusting
from dumo.encoders.codec import LoadedCodec
from dumo.evaluation.own import OwnMetric
from dumo.flow.solver import Solver
from dumo.io import picture
from dumo.io.read import user_path
from dumo.plan.prepare import plain_data, plain_net, prepare
from dumo.report import compare as comparison
from dumo.report import evaluate as evaluation
from dumo.report import page
from dumo.report.sample import (
    DEFAULT_COUNT,
    chosen_solver,
    guide_of,
    repeat_conditions,
    require_count,
    size_of,
)
from dumo.report.tracker import require_tracker, tracked
from dumo.run.prompt import conditions_of_prompts
from dumo.run.trainer import open_trainer
from dumo.run.weights import OpenedRun, open_run
from dumo.runtime import dist
from dumo.runtime.progress import Bar, bar, ignore_line, no_bar, print_line
from dumo.types import Readings, Sample, Spec
from dumo.types import UserError as UserError
from dumo.types.outside import name_of

Changes = Mapping[str, Any]  # dotted fields of a run and their values, e.g. {"train.steps": 100}
Labels = SupportsIndex | str | Iterable[SupportsIndex | str] | Tensor  # of classes: their numbers, or texts
Output = Literal["pt", "np", "pil"]
_OUTPUTS: tuple[Output, ...] = get_args(Output)


@dataclass(frozen=True, repr=False)
class TrainedRun:
    """A run's folder, its net loaded: sample it, judge it, read it."""

    opened: OpenedRun

    @property
    def spec(self) -> Run:
        """The run as it was trained: `run.spec.train.steps`, `run.spec.objective` ..."""
        return self.opened.run

    @property
    def folder(self) -> Path:
        """The run's folder; of a run that comes with dumo, the one in the current folder where files are written."""
        return self.opened.output_folder

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
    def codec(self) -> LoadedCodec | None:
        """The autoencoder that decodes latents; None where the network makes images or points themselves."""
        return self.opened.sampler.codec

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by number, as `labels` of `sample` takes them; () where the run has none.

        Of a run by captions they are the captions.
        """
        conditions = self.spec.conditions
        return conditions.words or tuple(str(number) for number in range(conditions.count))

    @cached_property
    def readings(self) -> Readings:
        """What a solver calls, on the run's device; None for what the objective does not teach.

        `velocity(x_t, t, c)` is dx_t/dt, `endpoint(x_t, t, c)` is x_0, `flow_map(x_t, t, s, c)` is x_s, all in units
        of `spec.path.sd`. Knobs and guidance are those of `spec.sample`; gradients are recorded.
        """
        return self.opened.sampler.flow.readings()

    def sample(
        self,
        labels: Labels | None = None,
        count: SupportsIndex | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        source: str | Path | None = None,
        nfe: SupportsIndex | None = None,
        seed: SupportsIndex | None = None,
        solver: Solver | str | None = None,
        guidance: float | None = None,
        noise: Tensor | None = None,
        generator: Generator | None = None,
        size: str | None = None,
        output: Output = "pt",
        bar: Bar = no_bar,
    ) -> Any:  # noqa: ANN401, by `output`
        """Make `count` samples: images, or points.

        `labels` are classes, taken in turn (None: all of them): an int is a class's number, a text its name, or its
        number if no class has that name. Or give `prompts`, texts, to a run that was trained on captions, and the image
        file `source` that they edit, to a run that was trained on edits. `count` is as many as are given, else 100.
        `nfe` is the number of function evaluations, `guidance` the scale w, 1 for none; they, the seed and the solver
        are the run's own unless given. Sample i depends on seed, class and i alone. `noise` (n, *shape of the data) is
        what samples start from instead, and a `generator` draws a seed. `size`, "320x192", width x height, is one of
        the buckets that the run was trained on; None: the square. Under several ranks each must call it, and rank 0
        alone gets the samples.

            output="pt"     float32 on the CPU: images (n, channels, height, width) in [-1, 1], or points (n, d)
            output="np"     a numpy array: images (n, height, width, channels) in [0, 1], or points
            output="pil"    a list of PIL images

        Raises UserError for arguments that contradict each other or the run.
        """
        sampler = self.opened.sampler
        if size is not None:
            sampler = replace(sampler, size=size_of(sampler.data, size))
        if output not in _OUTPUTS:
            raise UserError(f"output '{output}': there is {', '.join(_OUTPUTS)}")
        if generator is not None:
            if seed is not None or noise is not None:
                raise UserError("a generator draws the seed: give it, or seed and noise")
            seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
        c = self._conditions(
            labels=labels,
            count=None if count is None else operator.index(count),
            prompts=prompts,
            source=source,
            noise=noise,
            shape=sampler.shape,
        )
        guide = None if guidance is None else guide_of(sampler, self.spec.training_guidance, guidance)
        x = sampler.sample(
            c,
            nfe=operator.index(self.spec.sample.nfe[0] if nfe is None else nfe),
            seed=None if seed is None else operator.index(seed),
            solver=chosen_solver(self.spec.sample, solver),
            guide=guide,
            z=None if noise is None else noise.float().cpu(),
            bar=bar,
        ).x
        if self.makes_images:
            x = x.clamp(-1, 1)
        if output == "pil":
            return self.pil(x)
        if output == "np":
            return ((x.permute(0, 2, 3, 1) + 1) / 2).numpy() if self.makes_images else x.numpy()
        return x

    def _conditions(
        self,
        *,
        labels: Labels | None,
        count: int | None,
        prompts: str | Sequence[str] | None,
        source: str | Path | None,
        noise: Tensor | None,
        shape: tuple[int, ...],
    ) -> Tensor:
        """The condition (n,) of every sample, from the arguments of `sample`; `shape` is that of a sample."""
        if prompts is not None and labels is not None:
            raise UserError("prompts and labels exclude each other: give one of them")
        if source is not None and prompts is None:
            raise UserError("source is edited by a text: give prompts, too")
        conditions = self.spec.conditions
        # The conditions to take in turn; None takes all.
        chosen: list[int] | None = None
        if prompts is not None:
            texts = [prompts] if isinstance(prompts, str) else prompts
            source_file = None if source is None else _path(source, "source")
            chosen = conditions_of_prompts(self.opened.sampler, texts, source_file).tolist()
        elif labels is not None:
            chosen = []
            for label in _as_several(labels):
                chosen.append(conditions.index(label) if isinstance(label, str) else operator.index(label))
        if chosen == []:
            raise UserError("labels is empty: name at least one, or leave it out for all of them")
        if noise is not None:
            if noise.shape[1:] != shape or not len(noise):
                raise UserError(f"noise has shape {tuple(noise.shape)}: it must be (n, {', '.join(map(str, shape))})")
            if count not in (None, len(noise)):
                raise UserError(f"count = {count}, and noise has {len(noise)} rows: leave out count")
            count = len(noise)
        if count is None:
            count = len(chosen) if chosen else DEFAULT_COUNT
        require_count(count, chosen or (), "labels" if prompts is None else "prompts")
        if prompts is not None:
            return repeat_conditions(torch.tensor(chosen), count)
        return conditions.in_turn(count, chosen)

    @property
    def makes_images(self) -> bool:
        """Whether a sample is an image, not a point."""
        return self.opened.sampler.is_image

    def pil(self, images: Sample) -> list[Image.Image]:
        """Images (n, 1 or 3, height, width) in [-1, 1] as PIL's, grey or RGB. Raises UserError for anything else."""
        if not self.makes_images:
            kind = self.spec.data.kind
            raise UserError(f"data '{kind}' has points of shape {self.spec.shown_shape}, not images: plot them instead")
        is_grey = images.ndim == 4 and images.shape[1] == 1
        pictures = [Image.fromarray(pixels.numpy()) for pixels in picture.to_rows(images)]
        if is_grey:
            return [image.convert("L") for image in pictures]
        return pictures

    def evaluate(
        self,
        nfe: SupportsIndex | Sequence[SupportsIndex] | None = None,
        *,
        seed: int | None = None,
        solver: Solver | str | None = None,
        metrics: Mapping[str, OwnMetric] | None = None,
        bar: Bar = no_bar,
    ) -> dict[str, Any]:
        """Judge the run by its protocol, write the report into its folder, and return it as a dict.

        `results` has a row per number of passes; `file` says where the report is. `metrics` are your own, by name:
        f(samples) of all samples of a row, images (n, channels, height, width) in [-1, 1], gives a number. They stand
        in the rows that are returned, and not in the file. Raises UserError as `sample`.
        """
        passes = None if nfe is None else [operator.index(n) for n in _as_several(nfe)]
        return evaluation.evaluate(self.opened, nfe=passes, seed=seed, solver=solver, metrics=metrics, bar=bar)

    def export(
        self,
        out: str | Path,
        to: str = "diffusers",
        *,
        head: str | None = None,
        parts: str = "copy",
        dtype: str = "float32",
        nfe: SupportsIndex | Sequence[SupportsIndex] = (),
        alone: bool = False,
        push: str | None = None,
    ) -> Path:
        """Write the run for `dumo.load` or stock programs, as `dumo export`, to `out`, which must not exist; return it.

            to="diffusers"      a folder for dumo.load (a network of dumo's own) and DiffusionPipeline.from_pretrained
            to="lora"           a folder for load_lora_weights
            to="comfyui"        a LoRA as one file
            to="safetensors"    all weights as one file

        `head`, `parts`, `dtype`, `nfe` and `alone` as `dumo.export.write.export`. `push`, OWNER/NAME, uploads it to the
        Hugging Face Hub, too. Raises UserError if no stock program samples as the run does.
        """
        from dumo.export import hub, write  # slow to import

        dist.require_one_process("an export")
        place = _path(out, "out")
        write.require_vacant(place)
        if push is not None:
            hub.require_uploadable(push, parts)
        opened = open_run(self.opened.source, self.opened.overrides, weights=self.opened.given_weights, device="cpu")
        passes = [operator.index(n) for n in _as_several(nfe)]
        write.export(opened, place, to=to, head=head, parts=parts, dtype=dtype, name=push, nfe=passes, alone=alone)
        if push is not None:
            hub.push(place, push)
        return place

    def __repr__(self) -> str:
        """One line."""
        run = self.spec
        parts = f"{run.objective.kind} on {run.data.kind}, net {run.net.kind}"
        return f"<dumo run {self.folder}: {parts}, step {self.step:,}, on {self.device}>"

    def report(self, *, prompts: str | Sequence[str] = (), bar: Bar = no_bar) -> Path:
        """Write report.html into the run's folder; return its path. `prompts`: texts to show instead of captions."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        return page.write(self.opened, bar, texts)


def _as_several(values: Any) -> Iterable[Any]:  # noqa: ANN401, one of what it holds, or many
    """Several values as they are, and one as the only one of a list: a text, too, and a tensor of one number."""
    is_one_number = getattr(values, "ndim", None) == 0  # iterable by its class, though it cannot be iterated over
    if isinstance(values, str) or is_one_number or not isinstance(values, Iterable):
        return [values]
    return values


def _path(path: str | Path, argument: str) -> Path:
    """The path that an argument names; in a text ~ and $NAMES are expanded. Raises UserError for a variable not set."""
    return path if isinstance(path, Path) else user_path(path, argument)


def load(
    folder: str | Path,
    changes: Changes | None = None,
    *,
    data: Any = None,  # noqa: ANN401
    net: nn.Module | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
    trust_code: bool = False,
) -> TrainedRun:
    """Open a trained run's folder, or digits-trained or cifar10-trained, which come with dumo.

    Raises UserError where it is none, or has no checkpoint yet.

    `changes` may set what sampling and evaluation read, e.g. {"sample.guide.scale": 2}. `data` and `net` are the
    objects that `train` was given: another process needs the net to sample, and the data to evaluate. `weights` is a
    safetensors file, or a folder of shards, instead of the run's first average. `device`: auto takes the GPU where
    there is one. `trust_code`: run the code that the folder names (`dumo.config.trust`).
    """
    # both are remembered under their hash, by which run.yaml names them
    plain_data(data, bar)
    plain_net(net)
    file = None if weights is None else str(_path(weights, "weights"))
    with trusting(trust_code):
        return TrainedRun(open_run(folder, _settings(changes), weights=file, device=str(device)))


def recipe(source: str | Path | Run, changes: Changes | None = None, *, trust_code: bool = False) -> Run:
    """The complete run of a recipe's name, a YAML file or a run's folder, with these fields changed.

    A value may be a dict or a list, which replaces the field whole. `trust_code` as in `load`. Raises UserError for
    each wrong field, with the nearest valid name.
    """
    if not isinstance(source, Run):
        with trusting(trust_code):
            return load_run(source, _settings(changes))
    tree = source.model_dump(mode="json")
    override(tree, _settings(changes))
    return parse(Run, tree)


def recipes() -> list[dict[str, str | None]]:
    """The recipes that dumo ships, a row for each, by purpose: `name`, `about`, `group` and `base`."""
    return shipped_recipes.rows()


def compare(runs: Sequence[str | Path | TrainedRun], *, anyway: bool = False) -> dict[str, Any]:
    """The evaluations of several runs side by side: `rows`, the scores of `perfect` samplers, and what `differs`.

    `runs` are runs, their folders, or files of evaluations; each was judged by `evaluate`. A run that was loaded with
    other weights or settings is compared by its own evaluation. Raises UserError where one was not judged, or they were
    measured otherwise; with `anyway` what differs has columns instead.
    """
    sources = [_evaluation_source(run) if isinstance(run, TrainedRun) else str(run) for run in runs]
    return comparison.compare(sources, anyway=anyway)


def _evaluation_source(run: TrainedRun) -> str:
    """The run's folder, or, where it was loaded otherwise than its spec says, the file of its own evaluation.

    Raises UserError where that is missing.
    """
    file = evaluation.report_path(run.opened)
    if file.name == EVALUATION_FILE:
        return str(run.opened.source)
    if not file.is_file():
        raise UserError(f"{file} is not there: call evaluate() of this run first")
    return str(file)


def train(
    source: str | Path | Run | Any = None,  # noqa: ANN401, a notebook's data
    changes: Changes | None = None,
    *,
    objective: str | Mapping[str, Any] | Spec | None = None,
    data: Any = None,  # noqa: ANN401, what a notebook has
    net: str | Mapping[str, Any] | Spec | nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
    minutes: float | None = None,
    out: str | Path | None = None,
    step: int | None = None,
    device: str | torch.device = "auto",
    bar: Bar = bar,
    track: str | None = None,
    trust_code: bool = False,
) -> TrainedRun:
    """Train a recipe, a folder of images or parts of your own, or resume a run. Return the run.

        train("digits")                                 a recipe, a YAML file, or a run's folder, which is resumed
        train("photos", minutes=10)                     a folder of images: a recipe is chosen
        train("runs/photos", minutes=30)                resumes a run until it has trained for 30 minutes
        train((array, labels), out="runs/mine")         images in memory
        train("digits", objective="meanflow", out="runs/mine")
        train(data=array, net=module, objective=Mine(), callbacks=[f], out="runs/mine")

    `objective`, `data` and `net` are names of kinds, specs, or dicts as YAML has them. `data` may also be a folder, an
    array, a pair (array, labels), or a data set (`dumo.data.memory.Memory.of`); `net` a module, called as
    `net(x, c, t=t)` for a tuple of heads. run.yaml keeps the name and a hash of such objects, and resuming needs the
    same ones.

    A callback is f(state, metrics), called after every step (`dumo.training.state.State`,
    `dumo.training.metrics.StepMetrics`). `raise dumo.Stop` in it ends the training; what it returns is ignored.

    - `minutes`: how long to train in all, as `train.minutes` in `changes`
    - `out`: the run's folder; None: that of the run that `source` names, else runs/NAME. A run in it is compared with
      the one that is asked for, and resumed
    - `step`: begin a new run in `out` from the checkpoint of this step of the run in the folder `source`
    - `bar`: shows the progress, on stderr by default
    - `track`: tensorboard, wandb or trackio gets the rows of the log
    - `trust_code`: run the code that a file or folder names; objects and `changes` do not need it

    Raises UserError as `recipe` does, and if the folder holds another run.
    """
    folder = None if out is None else _path(out, "out")
    if not isinstance(source, str | Path | Run | None):
        if data is not None:
            raise UserError(f"data are given twice: as {name_of(type(source))}, and by data=")
        data = source
        source = None
    settings = _settings(changes)
    if minutes is not None:
        settings.append(f"train.minutes={minutes:g}")
    if track is not None:
        require_tracker(track)
    with trusting(trust_code):
        prepared = prepare(
            source,
            settings,
            folder,
            step=step,
            objective=objective,
            data=data,
            net=net,
            device=str(device),
            bar=bar,
        )
        opened = open_trainer(
            prepared.path,
            prepared.run,
            changes=prepared.changes,
            origin=prepared.origin,
            device=str(device),
            print_line=ignore_line if bar is no_bar else print_line,
            bar=bar,
        )
        with opened as trainer, tracked(trainer, track), called_back(trainer, callbacks):
            trainer.train()
        # Free the network and the optimizer before the trained weights are loaded.
        del trainer
        return load(prepared.path, device=device)


def _settings(changes: Changes | None) -> list[str]:
    """Changes as texts `a.b=c`, as `--set` takes them. Raises UserError for a value that YAML does not have."""
    settings: list[str] = []
    for field, value in (changes or {}).items():
        try:
            settings.append(f"{field}={yaml_text(value)}")
        except (PydanticSerializationError, UnicodeEncodeError) as error:
            raise UserError(f"{field}: {value!r} is no number, text, list or dict") from error
    return settings
