"""The Python API: `dumo.train`, `load`, `recipe`, `recipes` and `compare`.

Each function corresponds to a command, and its arguments to the options. `train` and `load` return a `LoadedRun`, and
`recipe` returns the spec of a run.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from pydantic_core import PydanticSerializationError
from torch import nn

from dumo.cli.train_callback import Callback, called_back
from dumo.config import recipe_files as shipped_recipes
from dumo.config import trust
from dumo.config.load import load as load_spec
from dumo.config.load import run_of
from dumo.config.place import EVALUATION_FILE
from dumo.config.source import RunText
from dumo.config.spec import Run
from dumo.config.trust import trusting
from dumo.evaluation.user_metrics import UserMetric
from dumo.flow.solver import Solver
from dumo.io.read import user_path
from dumo.io.yaml import yaml_text
from dumo.plan.prepare import plain_data, plain_net, prepare
from dumo.report import comparison as comparison
from dumo.report import evaluation as evaluation
from dumo.report import page
from dumo.report.tracker import require_tracker, tracked
from dumo.run.trained import TrainedRun, as_several
from dumo.run.trainer import open_trainer
from dumo.run.weights import load_run
from dumo.runtime import dist
from dumo.runtime.progress import Bar, bar, ignore_line, no_bar, print_line
from dumo.types import Spec
from dumo.types import UserError as UserError
from dumo.types.outside import name_of

# Values by field, such as {"train.steps": 100}, which is train.steps=100 on the command line.
Overrides = Mapping[str, Any]


@dataclass(frozen=True, repr=False, eq=False)
class LoadedRun(TrainedRun):
    """A trained run that can also be evaluated, reported and exported."""

    def evaluate(
        self,
        nfe: SupportsIndex | Sequence[SupportsIndex] | None = None,
        *,
        seed: int | None = None,
        solver: Solver | str | None = None,
        metrics: Mapping[str, UserMetric] | None = None,
        bar: Bar = no_bar,
    ) -> dict[str, Any]:
        """Evaluate the run with its protocol, write the evaluation to the run's folder, and return it as a dict.

        `results` contains a row per NFE, and `file` is the path of the evaluation. `metrics` are functions by name that
        map all samples of a row, images (n, channels, height, width) in [-1, 1], to a number. Their values are returned
        but not written to the file. Raises UserError like `sample`.
        """
        passes = None if nfe is None else [operator.index(n) for n in as_several(nfe)]
        return evaluation.evaluate(self, nfe=passes, seed=seed, solver=solver, metrics=metrics, bar=bar)

    def report(self, *, prompts: str | Sequence[str] = (), bar: Bar = no_bar) -> Path:
        """Write report.html to the run's folder and return its path. `prompts` replace the captions that are shown."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        return page.write(self, bar, texts)

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
        """Export the run to `out`, which must not exist, for `dumo.load` or stock programs. Return the path.

            to="diffusers"      a folder for DiffusionPipeline.from_pretrained and, for dumo's networks, dumo.load
            to="lora"           a folder for load_lora_weights
            to="comfyui"        a LoRA as one file
            to="safetensors"    all weights as one file

        `dumo.export.write.export` documents `head`, `parts`, `dtype`, `nfe` and `alone`. `push`, OWNER/NAME, also
        uploads the export to the Hugging Face Hub. Raises UserError if no stock program reproduces the run's samples.
        """
        from dumo.export import upload, write  # slow to import

        dist.require_one_process("an export")
        place = _path(out, "out")
        if push is not None:
            upload.require_uploadable(push, parts)
        passes = [operator.index(n) for n in as_several(nfe)]
        write.export(self, place, to=to, head=head, parts=parts, dtype=dtype, name=push, nfe=passes, alone=alone)
        if push is not None:
            upload.push(place, push)
        return place


def _path(path: str | Path, argument: str) -> Path:
    """Return an argument as a path. In strings, ~ and $VARIABLES are expanded.

    Raises UserError for a variable that is not set.
    """
    return path if isinstance(path, Path) else user_path(path, argument)


def load(
    folder: str | Path,
    overrides: Overrides | None = None,
    *,
    data: Any = None,  # noqa: ANN401
    net: nn.Module | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
    trust_code: bool = False,
) -> LoadedRun:
    """Open the folder of a trained run, or the bundled digits-trained or cifar10-trained.

    `overrides` may set fields of sampling and evaluation, such as {"sample.guide.scale": 2}. `data` and `net` are the
    objects that were passed to `train`: in another process, sampling needs the net and evaluation the data. `weights`
    is a safetensors file or a folder of shards, by default the run's first EMA. `device="auto"` selects the GPU if
    there is one. `trust_code` consents to code that the run refers to (`dumo.config.trust`).

    Raises UserError if the folder is not a run's, or has no checkpoint yet.
    """
    # Register both under the hash by which run.yaml refers to them.
    plain_data(data, bar)
    plain_net(net)
    file = None if weights is None else str(_path(weights, "weights"))
    with trusting(trust_code):
        return LoadedRun(**vars(load_run(folder, _words(overrides), weights=file, device=str(device))))


def recipe(source: str | Path | Run, overrides: Overrides | None = None, *, trust_code: bool = False) -> Run:
    """Return the spec of a recipe, a YAML file or a run's folder, with these overrides.

    A dict or list in `overrides` replaces the whole field. `trust_code` is documented in `load`. Raises UserError for
    an unknown field, with the closest valid name.
    """
    if not isinstance(source, Run):
        with trusting(trust_code):
            return load_spec(source, _words(overrides))
    trust.accept_object(source)
    return run_of(RunText(source.model_dump(mode="json"), ""), _words(overrides))


def recipes() -> list[dict[str, str | None]]:
    """Return the bundled recipes, grouped by purpose, as dicts with `name`, `about`, `group` and `base`."""
    return shipped_recipes.rows()


def compare(runs: Sequence[str | Path | TrainedRun], *, anyway: bool = False) -> dict[str, Any]:
    """Compare evaluations: return their `rows`, the scores of `perfect` samplers, and what `differs`.

    `runs` are evaluated runs, their folders, or files of evaluations. A run that was loaded with other weights or
    settings is represented by the evaluation with these. Raises UserError if an evaluation is missing or was measured
    differently; with `anyway`, differences become columns instead.
    """
    sources = [_evaluation_source(run) if isinstance(run, TrainedRun) else str(run) for run in runs]
    return comparison.compare(sources, anyway=anyway)


def _evaluation_source(run: TrainedRun) -> str:
    """Return the run's folder, or the evaluation file of a run that was loaded with other weights or settings.

    Raises UserError if this file is missing.
    """
    file = evaluation.report_path(run, run.spec)
    if file.name == EVALUATION_FILE:
        return str(run.source)
    if not file.is_file():
        raise UserError(f"{file} does not exist: call evaluate() on this run first")
    return str(file)


def train(
    source: str | Path | Run | Any = None,  # noqa: ANN401, a notebook's data
    overrides: Overrides | None = None,
    *,
    steps: int | None = None,
    lr: float | None = None,
    batch: int | None = None,
    seed: int | None = None,
    minutes: float | None = None,
    objective: str | Mapping[str, Any] | Spec | None = None,
    data: Any = None,  # noqa: ANN401, what a notebook has
    net: str | Mapping[str, Any] | Spec | nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
    out: str | Path | None = None,
    step: int | None = None,
    device: str | torch.device = "auto",
    bar: Bar = bar,
    track: str | None = None,
    trust_code: bool = False,
) -> LoadedRun:
    """Train a recipe, a folder of images or your own data and network, or resume a run. Return the run.

        train("digits")                                 a recipe, a YAML file, or a run's folder, which is resumed
        train("photos", minutes=10)                     a folder of images: a recipe is chosen
        train("runs/photos", minutes=30)                resumes a run until it has trained for 30 minutes
        train((array, labels), out="runs/mine")         images in memory
        train("digits", steps=500, objective="meanflow", overrides={"net.width": 96}, out="runs/mine")
        train(data=array, net=module, objective=Mine(), callbacks=[f], out="runs/mine")

    `steps`, `lr`, `batch`, `seed` and `minutes` set fields of `train`; steps and minutes are totals. `overrides` sets
    any field, with the names of the command line.

    `objective`, `data` and `net` are kinds, specs, or dicts as in YAML. `data` may also be a folder, an array, a pair
    (array, labels), or a data set (`dumo.data.in_memory.Memory.of`), and `net` a module whose `net(x, c, t=t)` returns
    a tuple of heads. run.yaml stores the name and hash of such objects, and resuming needs the same objects.

    A callback f(state, metrics) is called after every step (`dumo.training.state.State`,
    `dumo.training.metrics.StepMetrics`). If it raises `dumo.Stop`, training ends.

    - `out`: the run's folder. The default is the folder of the run `source`, or runs/NAME. If it contains the same run,
      this run is resumed
    - `step`: start a new run in `out` from the checkpoint of this step of the run in the folder `source`
    - `bar`: the progress bar, by default on stderr
    - `track`: send the rows of the log to tensorboard, wandb or trackio
    - `trust_code`: consent to code that a file or folder refers to. Objects and `overrides` do not need it

    Raises UserError like `recipe`, and if the folder contains a different run.
    """
    folder = None if out is None else _path(out, "out")
    if not isinstance(source, str | Path | Run | None):
        if data is not None:
            raise UserError(f"data are passed twice, as {name_of(type(source))} and as data=: remove one")
        data = source
        source = None
    short_forms = {"steps": steps, "lr": lr, "batch": batch, "seed": seed, "minutes": minutes}
    given = {name: value for name, value in short_forms.items() if value is not None}
    words = _words({**(overrides or {}), **given})
    if track is not None:
        require_tracker(track)
    with trusting(trust_code):
        prepared = prepare(
            source,
            words,
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


def _words(overrides: Overrides | None) -> list[str]:
    """Convert overrides to the form `a.b=c`. Raises UserError for a value that YAML does not support."""
    words: list[str] = []
    for field, value in (overrides or {}).items():
        try:
            words.append(f"{field}={yaml_text(value)}")
        except (PydanticSerializationError, UnicodeEncodeError) as error:
            raise UserError(f"{field}: {value!r} must be a number, a string, a list or a dict") from error
    return words
