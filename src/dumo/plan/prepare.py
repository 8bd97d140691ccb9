"""Decide what to train, and where: for the command line, `dumo.train` and the lab.

`prepare` is the entry point. It finds out what the source is (a recipe, a file, a run's folder, images, a run that
Python gives), puts other parts and fields into it, and decides the folder. A network or an array that a notebook gives
becomes plain values by `plain_net` and `plain_data`, which remember it under its hash for the code that opens the run
later in this process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dumo.config import recipe_files, trust
from dumo.config.load import dump, load, load_recipe, parse
from dumo.config.overrides import full_overrides
from dumo.config.place import RUN_FILE
from dumo.config.source import (
    IMAGES_RECIPE,
    SHIPPED_PREFIX,
    ChosenSource,
    Origin,
    RunText,
    choose,
    folder_of_images,
    parse_text,
    read,
    settings_of_images,
    without_resolved,
)
from dumo.config.spec import Run, StandaloneParts
from dumo.data import Data, Memory
from dumo.io.yaml import yaml_text
from dumo.nets import ModuleSpec
from dumo.plan import photos
from dumo.plan.photos import Proposal
from dumo.run.folder import RunFolder
from dumo.runtime import shell_path
from dumo.runtime.device import choose_device
from dumo.runtime.progress import Bar, no_bar
from dumo.types import Spec, UserError

Fields = dict[str, Any]  # by dotted path, as plain values
_TOYS = ("digits", "moons")  # kinds of data after which recipes are named, digits first
# How a module of the user's is trained: Muon and compilation need a network whose blocks are known. The learning rate
# is that of moons.
_MODULE_FIELDS: Fields = {
    "train.compile": "none",
    "train.optimizer": {"kind": "adamw", "lr": 0.001, "betas": [0.9, 0.99]},
}


@dataclass(frozen=True)
class Prepared:
    """What to train, and where. `dumo.run.trainer.open_trainer` takes path, run, changes and origin."""

    # The run's folder.
    path: Path
    # None: the run that the folder holds, with `changes`.
    run: Run | None
    # Fields of the user's, each a.b=c, short forms written out.
    changes: Sequence[str] = ()
    # The checkpoint of another run that this one begins from.
    origin: Origin | None = None
    # What the source was taken for, in words; "" if that is plain.
    meaning: str = ""
    # The run as it is proposed for images.
    proposal: Proposal | None = None


def prepare(
    source: str | Path | Run | None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    *,
    step: int | None = None,
    objective: str | Mapping[str, Any] | Spec | None = None,
    data: Any = None,  # noqa: ANN401, what a notebook has
    net: str | Mapping[str, Any] | Spec | nn.Module | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> Prepared:
    """The run to train and its folder: the run that `source` names, with the given parts and fields.

    - `source`: a recipe, a YAML file, a run's folder, images, or a run. Without one the parts choose a recipe: for
      images the one that `dumo.plan.photos` chooses, for points moons, for anything else digits.
    - `overrides`: fields, each a.b=c, as they are typed (`dumo.config.overrides`).
    - `out`: the run's folder; None: that of the run that `source` names, else runs/NAME.
    - `step`: begin a new run in `out` from the checkpoint of this step of the run that `source` names.
    - `objective`, `data`, `net`: parts instead of the run's own.

    If the folder holds the run that `source` names, or a run on the same images, that run is resumed, with the parts
    and fields. Any other run is compared with the one in the folder when it is opened.

    Raises UserError if the parts do not fit, or nothing names a folder.
    """
    overrides = full_overrides(overrides)
    if isinstance(source, Run):
        if out is None or any(part is not None for part in (objective, data, net)):
            raise UserError('a run that has its parts needs a folder: say out="runs/NAME", and no other parts')
        trust.accept_object(source)
        text = parse_text(dump(source), out / RUN_FILE)
        return Prepared(out, load(without_resolved(text), overrides), overrides)

    # Find out what was named: a recipe, a file or a run (`chosen`), or a place of images.
    chosen: ChosenSource | None = None
    images_place: str | None = None
    meaning = ""
    if source is not None:
        chosen = choose(source, out)
        meaning = "" if chosen.kind == "recipe" else chosen.meaning
        if data is None and chosen.kind == "images":
            images_place = str(chosen.word)
            chosen = None
    elif _is_path(data):
        images_place = str(data)

    # Make the parts plain, and choose the folder.
    plain_parts = {
        "objective": _plain_part("objective", objective),
        "net": plain_net(net),
        "data": None if images_place else plain_data(data, bar),
    }
    parts = {name: part for name, part in plain_parts.items() if part is not None}
    path = out or _default_folder(chosen, parts, images_place)

    # Begin a new run from a checkpoint, or resume the one that began so.
    if step is not None:
        if chosen is None or chosen.kind != "run":
            raise UserError(f"--from {step} starts a new run from a checkpoint: give the folder of a run")
        source_folder = chosen.folder
        meaning = f"the checkpoint of step {step} in {source_folder}, for a new run in {path}"
        if out is None or out.absolute() == source_folder.absolute():
            raise UserError(
                f"--from {step} starts a new run, which needs a folder: dumo train {shell_path(source_folder)} --from "
                f"{step} --out NEW"
            )
        origin = Origin(run=str(source_folder.absolute()), step=step)
        if RunFolder(path).origin == origin:
            own_run = read(path / RUN_FILE)
            own_changes = [*_as_changes(_part_fields(parts, own_run.tree)), *overrides]
            return Prepared(path, None, own_changes, origin, meaning)
        checkpoint = RunFolder(source_folder).checkpoint_at(step)
        base = without_resolved(parse_text(checkpoint.run_text, checkpoint.path / RUN_FILE))
        new_changes = _changes_of_new_run(parts, base, net, overrides)
        return Prepared(path, load(base, new_changes), new_changes, origin, meaning)

    # Resume the folder's own run.
    is_own_run = chosen is not None and chosen.kind == "run" and chosen.folder == path
    if is_own_run and not parts:
        return Prepared(path, None, overrides, meaning=meaning)
    if is_own_run or (images_place is not None and (path / RUN_FILE).is_file()):
        own_run = read(path / RUN_FILE)
        own_changes = [*_as_changes(_part_fields(parts, own_run.tree)), *overrides]
        if images_place is not None:
            own_changes = settings_of_images(own_run.tree, own_changes, images_place)
        return Prepared(path, None, own_changes, meaning=meaning)

    # Propose a run on images.
    if images_place is not None:
        RunFolder(path).require_free()
        base = read(f"{SHIPPED_PREFIX}{IMAGES_RECIPE}")
        new_changes = _changes_of_new_run(parts, base, net, overrides)
        proposal = photos.propose(images_place, new_changes, device=device)
        return Prepared(path, proposal.run, new_changes, meaning=meaning, proposal=proposal)

    # Put the parts into what was named, or into the recipe that suits them.
    recipe = "" if chosen else _base_recipe(parts)
    base = read(chosen.word if chosen else f"{SHIPPED_PREFIX}{recipe}")
    new_changes = _changes_of_new_run(parts, base, net, overrides)
    if recipe == IMAGES_RECIPE:
        on_a_cpu = choose_device(device).type == "cpu"
        new_changes = [*_changes_of_array(parts["data"], overrides, on_a_cpu=on_a_cpu), *new_changes]
    if chosen and not parts:
        new_changes = [*chosen.settings, *new_changes]
    return Prepared(path, load(without_resolved(base), new_changes), new_changes, meaning=meaning)


def _changes_of_new_run(parts: Fields, base: RunText, net: object, changes: Sequence[str]) -> list[str]:
    """The changes of a base that make a new run with these parts, then `changes`. `net` is the net as it was given."""
    fields = _part_fields(parts, base.tree)
    if isinstance(net, nn.Module):
        fields |= _MODULE_FIELDS
    if fields:
        fields["about"] = ", ".join(f"{name} {part.get('name', part['kind'])}" for name, part in parts.items())
    return [*_as_changes(fields), *changes]


def _changes_of_array(data: Fields, changes: Sequence[str], *, on_a_cpu: bool) -> list[str]:
    """The changes of `my-images` for images in memory, which are trained on in pixels at their full size."""
    spec = _data_spec(data)
    fields = photos.pixel_fields(spec.shape[-1], on_a_cpu=on_a_cpu)
    if isinstance(spec, Memory):
        fields |= photos.length_fields(spec.open().size, changes, on_a_cpu=on_a_cpu)
    return _as_changes(fields)


def _as_changes(fields: Fields) -> list[str]:
    """Fields as changes, each a.b=c."""
    return [f"{field}={yaml_text(value)}" for field, value in fields.items()]


def _is_path(data: object) -> bool:
    """Whether data are given as a path of images, not as the name of a data set."""
    return isinstance(data, Path) or (isinstance(data, str) and data not in _TOYS)


def _plain_part(name: str, part: object) -> Fields | None:
    """A part as plain values, from the name of its kind, a mapping, or a spec. Raises UserError for anything else."""
    if part is None:
        return None
    if isinstance(part, Mapping):
        if "kind" not in part:
            raise UserError(f'{name} is a dict without "kind": add it, or of several data sets give one')
        return dict(part)
    if isinstance(part, str):
        return {"kind": part}
    if isinstance(part, Spec):
        trust.accept_object(part)
        return part.model_dump(mode="json")
    raise UserError(f"{name} is a {type(part).__name__}: give the name of a kind, or a spec (docs/library.md)")


def plain_net(net: object) -> Fields | None:
    """A net as plain values. A module of torch is remembered under its hash, for who opens the run in this process.

    Raises UserError for what is no net.
    """
    if isinstance(net, nn.Module):
        net = ModuleSpec.of(net)
    return _plain_part("net", net)


def plain_data(data: object, bar: Bar) -> Fields | None:
    """Data as plain values. A path is a place of images; arrays and data sets are remembered under their hash.

    `bar` shows how far a data set is read. Raises UserError for what is no data.
    """
    if _is_path(data):
        return {"kind": "images", "root": str(data)}
    if data is not None and not isinstance(data, str | Mapping | Spec):
        data = Memory.of(data, bar)
    return _plain_part("data", data)


def _base_recipe(parts: Fields) -> str:
    """The name of the recipe that parts are put into without a source. Raises UserError if there are no parts."""
    if not parts:
        raise UserError('nothing to train: give a recipe, such as "digits", or data=, objective= or net=')
    data = parts.get("data", {"kind": _TOYS[0]})
    if data["kind"] not in _TOYS:
        return _recipe_of_data(data)
    objective = parts.get("objective", {})
    recipe_of_objective = f"{data['kind']}-{objective.get('kind')}".replace("_", "-")
    return recipe_of_objective if recipe_of_objective in recipe_files.names() else data["kind"]


def _recipe_of_data(data: Fields) -> str:
    """The recipe whose settings suit data of this shape: that of images, or moons, that of points."""
    return IMAGES_RECIPE if len(_data_spec(data).shape) == 3 else "moons"


def _data_spec(data: Fields) -> Data:
    """The spec of data that are given as plain values."""
    spec = parse(StandaloneParts, {"data": data}).data
    assert spec is not None
    return spec


def _default_folder(chosen: ChosenSource | None, parts: Fields, images_place: str | None) -> Path:
    """The folder runs/NAME, by the place of images or the source. Raises UserError if neither gives a name."""
    if images_place is not None:
        return folder_of_images(images_place)
    if chosen and (chosen.kind == "run" or not parts):
        return chosen.folder
    raise UserError('a run of Python objects needs a folder: set out="runs/NAME"')


def _part_fields(parts: Fields, tree: Fields) -> Fields:
    """The fields to set in the run of a tree so that it has these parts. Other data bring the protocol of their recipe.

    A part given by its kind alone is set as `objective=meanflow` sets it; the run's own kind changes nothing.
    """
    fields: Fields = {}
    for name, part in parts.items():
        if part == {"kind": _kind_in(tree, name)}:
            continue
        if part.keys() == {"kind"}:
            fields[f"{name}.kind"] = part["kind"]
        else:
            fields[name] = part
    if "data" in parts and parts["data"]["kind"] != _kind_in(tree, "data"):
        recipe = _recipe_of_data(parts["data"])
        fields["evaluate"] = load_recipe(recipe).evaluate.model_dump(mode="json")
    return fields


def _kind_in(tree: Fields, name: str) -> object:
    """The kind of the part of this name in a run's tree; None: the run has no such part, or it says no kind."""
    part = tree.get(name)
    return part.get("kind") if isinstance(part, dict) else None
