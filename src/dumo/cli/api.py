"""The functions of `import dumo`: `train`, `load`, `recipe`, `recipes` and `compare`.

Each does what the command of its name does, with Python's values instead of options, whose names the arguments have.
`train` and `load` return a `LoadedRun`; `recipe` returns the spec of a run, trained or not.
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

# Fields of a run and their values, e.g. {"train.steps": 100}: what the command line takes as field=value.
Overrides = Mapping[str, Any]


@dataclass(frozen=True, repr=False, eq=False)
class LoadedRun(TrainedRun):
    """A trained run in Python: what `TrainedRun` does, and what the commands evaluate, report and export do."""

    def evaluate(
        self,
        nfe: SupportsIndex | Sequence[SupportsIndex] | None = None,
        *,
        seed: int | None = None,
        solver: Solver | str | None = None,
        metrics: Mapping[str, UserMetric] | None = None,
        bar: Bar = no_bar,
    ) -> dict[str, Any]:
        """Judge the run by its protocol, write the report into its folder, and return it as a dict.

        `results` has a row per number of passes; `file` says where the report is. `metrics` are your own, by name:
        f(samples) of all samples of a row, images (n, channels, height, width) in [-1, 1], gives a number. They stand
        in the rows that are returned, and not in the file. Raises UserError as `sample`.
        """
        passes = None if nfe is None else [operator.index(n) for n in as_several(nfe)]
        return evaluation.evaluate(self, nfe=passes, seed=seed, solver=solver, metrics=metrics, bar=bar)

    def report(self, *, prompts: str | Sequence[str] = (), bar: Bar = no_bar) -> Path:
        """Write report.html into the run's folder; return its path. `prompts`: texts to show instead of captions."""
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
        """Write the run for `dumo.load` or stock programs, as `dumo export`, to `out`, which must not exist; return it.

            to="diffusers"      a folder for dumo.load (a network of dumo's own) and DiffusionPipeline.from_pretrained
            to="lora"           a folder for load_lora_weights
            to="comfyui"        a LoRA as one file
            to="safetensors"    all weights as one file

        `head`, `parts`, `dtype`, `nfe` and `alone` as `dumo.export.write.export`. `push`, OWNER/NAME, uploads it to the
        Hugging Face Hub, too. Raises UserError if no stock program samples as the run does.
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
    """Return the path that an argument names; in a text ~ and $NAMES are expanded.

    Raises UserError for a variable not set.
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
    """Open a trained run's folder, or digits-trained or cifar10-trained, which come with dumo.

    Raises UserError where it is none, or has no checkpoint yet.

    `overrides` may set what sampling and evaluation read, e.g. {"sample.guide.scale": 2}. `data` and `net` are the
    objects that `train` was given: another process needs the net to sample, and the data to evaluate. `weights` is a
    safetensors file, or a folder of shards, instead of the run's first average. `device`: auto takes the GPU where
    there is one. `trust_code`: run the code that the folder names (`dumo.config.trust`).
    """
    # both are remembered under their hash, by which run.yaml names them
    plain_data(data, bar)
    plain_net(net)
    file = None if weights is None else str(_path(weights, "weights"))
    with trusting(trust_code):
        return LoadedRun(**vars(load_run(folder, _words(overrides), weights=file, device=str(device))))


def recipe(source: str | Path | Run, overrides: Overrides | None = None, *, trust_code: bool = False) -> Run:
    """The complete run of a recipe's name, a YAML file or a run's folder, with these fields set.

    `overrides` as in `train`. A value may be a dict or a list, which replaces the field whole. `trust_code` as in
    `load`. Raises UserError for each wrong field, with the nearest valid name.
    """
    if not isinstance(source, Run):
        with trusting(trust_code):
            return load_spec(source, _words(overrides))
    trust.accept_object(source)
    return run_of(RunText(source.model_dump(mode="json"), ""), _words(overrides))


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
    """Return the run's folder, or, where it was loaded otherwise than its spec says, the file of its own evaluation.

    Raises UserError where that is missing.
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
    """Train a recipe, a folder of images or parts of your own, or resume a run. Return the run.

        train("digits")                                 a recipe, a YAML file, or a run's folder, which is resumed
        train("photos", minutes=10)                     a folder of images: a recipe is chosen
        train("runs/photos", minutes=30)                resumes a run until it has trained for 30 minutes
        train((array, labels), out="runs/mine")         images in memory
        train("digits", steps=500, objective="meanflow", overrides={"net.width": 96}, out="runs/mine")
        train(data=array, net=module, objective=Mine(), callbacks=[f], out="runs/mine")

    `steps`, `lr`, `batch`, `seed` and `minutes` set fields of `train`: steps and minutes are totals. `overrides` sets
    any field of the run, by the names that the command line has.

    `objective`, `data` and `net` are names of kinds, specs, or dicts as YAML has them. `data` may also be a folder, an
    array, a pair (array, labels), or a data set (`dumo.data.in_memory.Memory.of`); `net` a module, called as
    `net(x, c, t=t)` for a tuple of heads. run.yaml keeps the name and a hash of such objects, and resuming needs the
    same ones.

    A callback is f(state, metrics), called after every step (`dumo.training.state.State`,
    `dumo.training.metrics.StepMetrics`). `raise dumo.Stop` in it ends the training; what it returns is ignored.

    - `out`: the run's folder; None: that of the run that `source` names, else runs/NAME. A run in it is compared with
      the one that is asked for, and resumed
    - `step`: begin a new run in `out` from the checkpoint of this step of the run in the folder `source`
    - `bar`: shows the progress, on stderr by default
    - `track`: tensorboard, wandb or trackio gets the rows of the log
    - `trust_code`: run the code that a file or folder names; objects and `overrides` do not need it

    Raises UserError as `recipe` does, and if the folder holds another run.
    """
    folder = None if out is None else _path(out, "out")
    if not isinstance(source, str | Path | Run | None):
        if data is not None:
            raise UserError(f"data are given twice: as {name_of(type(source))}, and by data=")
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
    """Overrides as the command line has them, `a.b=c`. Raises UserError for a value that YAML does not have."""
    words: list[str] = []
    for field, value in (overrides or {}).items():
        try:
            words.append(f"{field}={yaml_text(value)}")
        except (PydanticSerializationError, UnicodeEncodeError) as error:
            raise UserError(f"{field}: {value!r} must be a number, a string, a list or a dict") from error
    return words
