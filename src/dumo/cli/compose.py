"""Make the run of `dumo.train` from what a notebook has: data, a network, an objective, by name or as objects.

`compose` is the entry point. It decides what the source names, turns the parts into plain values, decides the folder,
and puts the parts into the run of the source, or into the recipe that suits them. `plain_net` and `plain_data` also
remember a module or an array, for the code that opens the run later in this process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dumo.config import recipes
from dumo.config.change import yaml_text
from dumo.config.load import RUN_FILE, load, load_recipe, parse
from dumo.config.source import (
    IMAGES_RECIPE,
    SHIPPED_PREFIX,
    ChosenSource,
    RunText,
    choose,
    folder_of_images,
    read,
    settings_of_images,
    without_resolved,
)
from dumo.config.spec import Run, StandaloneParts
from dumo.data import Data, Memory
from dumo.flow.reading import available_readings
from dumo.flow.solver import best_solver
from dumo.nets import ModuleSpec
from dumo.plan import photos
from dumo.run.folder import require_free
from dumo.runtime.device import choose_device
from dumo.runtime.progress import Bar
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
class Composed:
    """What to train, and where: `dumo.run.job.open_job` takes all of it."""

    run: Run | None  # None: the run that the folder holds, with `changes`
    changes: Sequence[str]  # each a.b=c
    folder: Path


def compose(
    source: str | Path | None,
    changes: Sequence[str],
    folder: Path | None,
    *,
    objective: str | Mapping[str, Any] | Spec | None,
    data: Any,  # noqa: ANN401, what a notebook has
    net: str | Mapping[str, Any] | Spec | nn.Module | None,
    device: str,
    bar: Bar,
) -> Composed:
    """The run to train and its folder: the run that `source` names, with the given parts instead of its own.

    Without a source the parts choose one: for images it is the recipe that `dumo.plan.photos` chooses, for points
    moons, for anything else digits. `folder` None: that of the run that `source` names, else runs/NAME.

    If `source` names the folder's own run, that run is continued, with the parts and changes; and so is the run that
    was begun on a folder of images. Any other run is compared with the one in `folder` when it is opened, as on the
    command line.

    Raises UserError if the parts do not fit, or nothing gives a name.
    """
    # Find out what was named: a recipe, a file or a run (`chosen`), or a place of images.
    chosen: ChosenSource | None = None
    images_place: str | None = None
    if source is not None:
        chosen = choose(source, folder)
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
    if folder is None:
        folder = _default_folder(chosen, parts, images_place)

    # Continue the folder's own run.
    if chosen is not None and chosen.kind == "run" and chosen.folder == folder:
        if not parts:
            return Composed(None, changes, folder)
        own_run = read(chosen.word)
        own_changes = [*_as_changes(_part_fields(parts, own_run.tree)), *changes]
        return Composed(None, own_changes, folder)
    if images_place is not None and (folder / RUN_FILE).is_file():
        own_run = read(folder / RUN_FILE)
        own_changes = [*_as_changes(_part_fields(parts, own_run.tree)), *changes]
        return Composed(None, settings_of_images(own_run.tree, own_changes, images_place), folder)

    # Propose a run on a folder of images.
    if images_place is not None:
        require_free(folder)
        base = read(f"{SHIPPED_PREFIX}{IMAGES_RECIPE}")
        new_changes = _changes_of_new_run(parts, base, net, changes)
        run = photos.propose(images_place, new_changes, device=device).run
        return Composed(run, new_changes, folder)

    # Put the parts into what was named, or into the recipe that suits them.
    recipe = "" if chosen else _base_recipe(parts)
    base = read(chosen.word if chosen else f"{SHIPPED_PREFIX}{recipe}")
    new_changes = _changes_of_new_run(parts, base, net, changes)
    if recipe == IMAGES_RECIPE:
        on_a_cpu = choose_device(device).type == "cpu"
        new_changes = [*_changes_of_array(parts["data"], changes, on_a_cpu=on_a_cpu), *new_changes]
    if chosen and not parts:
        new_changes = [*chosen.settings, *new_changes]
    return Composed(load(without_resolved(base), new_changes), new_changes, folder)


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
    objective_recipe = _objective_recipe(data["kind"], parts.get("objective", {}))
    return objective_recipe if objective_recipe in recipes.names() else data["kind"]


def _recipe_of_data(data: Fields) -> str:
    """The recipe whose settings suit data of this shape: that of images, or moons, that of points."""
    return IMAGES_RECIPE if len(_data_spec(data).shape) == 3 else "moons"


def _data_spec(data: Fields) -> Data:
    """The spec of data that are given as plain values."""
    spec = parse(StandaloneParts, {"data": data}).data
    assert spec is not None
    return spec


def _objective_recipe(data: str, objective: Fields) -> str:
    """The name that a recipe of this objective on toy data has; there may be none."""
    return f"{data}-{objective.get('kind')}".replace("_", "-")


def _default_folder(chosen: ChosenSource | None, parts: Fields, images_place: str | None) -> Path:
    """The folder runs/NAME, by the place of images or the source. Raises UserError if neither gives a name."""
    if images_place is not None:
        return folder_of_images(images_place)
    if chosen and (chosen.kind == "run" or not parts):
        return chosen.folder
    raise UserError('a run of your own parts needs a folder: say out="runs/NAME"')


def _part_fields(parts: Fields, tree: Fields) -> Fields:
    """The fields to set in the run of a tree so that it has these parts.

    Other data bring the protocol that judges them, and another objective brings a solver. A part given by the name of
    the run's own kind changes nothing. An objective given by name alone has the fields of its recipe on digits, if
    there is one.
    """
    fields: Fields = {}
    for name, part in parts.items():
        is_own_kind_by_name = part == {"kind": _kind_in(tree, name)}
        if not is_own_kind_by_name:
            fields[name] = part
    if "data" in fields and fields["data"]["kind"] != _kind_in(tree, "data"):
        recipe = _recipe_of_data(fields["data"])
        fields["evaluate"] = load_recipe(recipe).evaluate.model_dump(mode="json")
    if "objective" in fields:
        fields["objective"] = _objective_fields(fields["objective"])
        objective = parse(StandaloneParts, {"objective": fields["objective"]}).objective
        assert objective is not None
        solver = best_solver(available_readings(objective))
        fields["sample.solver"] = {"kind": solver.kind}
    return fields


def _kind_in(tree: Fields, name: str) -> object:
    """The kind of the part of this name in a run's tree; None: the run has no such part, or it says no kind."""
    part = tree.get(name)
    return part.get("kind") if isinstance(part, dict) else None


def _objective_fields(objective: Fields) -> Fields:
    """The fields of an objective: if it is given by name alone, those of its recipe on digits, if there is one."""
    recipe = _objective_recipe(_TOYS[0], objective)
    is_name_alone = objective.keys() == {"kind"}
    if is_name_alone and recipe in recipes.names():
        return load_recipe(recipe).model_dump(mode="json")["objective"]
    return objective
