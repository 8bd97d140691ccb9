"""Determine the run to train and its folder, for the command line, `dumo.train` and the lab.

`prepare` is the entry point. It determines the kind of the source (recipe, file, run's folder, images, or a run from
Python), replaces components, sets fields, and chooses the folder. `plain_net` and `plain_data` convert networks and
arrays from Python to plain values, and register the objects by hash for later use in the same process.
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

Fields = dict[str, Any]  # plain values by dotted path
_TOYS = ("digits", "moons")  # kinds of data that are also names of recipes; the first is the default
# Settings for a user's module, because Muon and compilation need known blocks. The learning rate is that of moons.
_MODULE_FIELDS: Fields = {
    "train.compile": "none",
    "train.optimizer": {"kind": "adamw", "lr": 0.001, "betas": [0.9, 0.99]},
}


@dataclass(frozen=True)
class Prepared:
    """The run to train and its folder. `path`, `run`, `changes` and `origin` are passed to `open_trainer`."""

    # The run's folder.
    path: Path
    # None means the run in the folder, with `changes`.
    run: Run | None
    # The user's overrides a.b=c, with short forms expanded.
    changes: Sequence[str] = ()
    # The checkpoint of another run from which this run starts.
    origin: Origin | None = None
    # A description of how the source was interpreted, "" for a recipe.
    meaning: str = ""
    # The proposal for images.
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
    """Return the run to train and its folder.

    - `source`: a recipe, a YAML file, a run's folder, images, or a run. Without a source, the recipe depends on the
      components: for images `dumo.plan.photos` chooses it, for points it is moons, otherwise digits.
    - `overrides`: fields a.b=c as typed by the user (`dumo.config.overrides`).
    - `out`: the run's folder. The default is the folder of the run `source`, or runs/NAME.
    - `step`: start a new run in `out` from the checkpoint of this step of the run `source`.
    - `objective`, `data`, `net`: components that replace those of the source.

    If the folder contains the run `source`, or a run on the same images, this run is resumed with the components and
    fields. Otherwise the run is compared with the one in the folder when it is opened.

    Raises UserError if the components are incompatible or there is no folder.
    """
    overrides = full_overrides(overrides)
    if isinstance(source, Run):
        if out is None or any(part is not None for part in (objective, data, net)):
            raise UserError('a Run object needs a folder and no other components: pass out="runs/NAME" only')
        trust.accept_object(source)
        text = parse_text(dump(source), out / RUN_FILE)
        return Prepared(out, load(without_resolved(text), overrides), overrides)

    # Determine the source: a recipe, a file or a run (`chosen`), or the path of images.
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

    # Convert the components to plain values, and choose the folder.
    plain_parts = {
        "objective": _plain_part("objective", objective),
        "net": plain_net(net),
        "data": None if images_place else plain_data(data, bar),
    }
    parts = {name: part for name, part in plain_parts.items() if part is not None}
    path = out or _default_folder(chosen, parts, images_place)

    # Start a new run from a checkpoint, or resume a run that was started this way.
    if step is not None:
        if chosen is None or chosen.kind != "run":
            raise UserError(f"--from {step} starts a new run from a checkpoint: pass the folder of a run")
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

    # Use the components in the source, or in a suitable recipe.
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
    """Return the overrides that set these components in a new run, followed by `changes`. `net` is the user's."""
    fields = _part_fields(parts, base.tree)
    if isinstance(net, nn.Module):
        fields |= _MODULE_FIELDS
    if fields:
        fields["about"] = ", ".join(f"{name} {part.get('name', part['kind'])}" for name, part in parts.items())
    return [*_as_changes(fields), *changes]


def _changes_of_array(data: Fields, changes: Sequence[str], *, on_a_cpu: bool) -> list[str]:
    """Return the overrides of `my-images` for images in memory, in pixel space at full size."""
    spec = _data_spec(data)
    fields = photos.pixel_fields(spec.shape[-1], on_a_cpu=on_a_cpu)
    if isinstance(spec, Memory):
        fields |= photos.length_fields(spec.open().size, changes, on_a_cpu=on_a_cpu)
    return _as_changes(fields)


def _as_changes(fields: Fields) -> list[str]:
    """Convert fields to overrides a.b=c."""
    return [f"{field}={yaml_text(value)}" for field, value in fields.items()]


def _is_path(data: object) -> bool:
    """Return whether `data` is a path of images, not the name of a data set."""
    return isinstance(data, Path) or (isinstance(data, str) and data not in _TOYS)


def _plain_part(name: str, part: object) -> Fields | None:
    """Convert a component, which is a kind, a mapping or a spec, to plain values. Raises UserError for other types."""
    if part is None:
        return None
    if isinstance(part, Mapping):
        if "kind" not in part:
            raise UserError(f'{name} is a dict without "kind": add "kind", or select one of several data sets')
        return dict(part)
    if isinstance(part, str):
        return {"kind": part}
    if isinstance(part, Spec):
        trust.accept_object(part)
        return part.model_dump(mode="json")
    raise UserError(f"{name} is a {type(part).__name__}: pass a kind or a spec (docs/library.md)")


def plain_net(net: object) -> Fields | None:
    """Convert a net to plain values. A torch module is registered by its hash, for later use in this process.

    Raises UserError for other types.
    """
    if isinstance(net, nn.Module):
        net = ModuleSpec.of(net)
    return _plain_part("net", net)


def plain_data(data: object, bar: Bar) -> Fields | None:
    """Convert data to plain values. A path means images; arrays and data sets are registered by their hash.

    `bar` shows the progress of reading a data set. Raises UserError for other types.
    """
    if _is_path(data):
        return {"kind": "images", "root": str(data)}
    if data is not None and not isinstance(data, str | Mapping | Spec):
        data = Memory.of(data, bar)
    return _plain_part("data", data)


def _base_recipe(parts: Fields) -> str:
    """Return the recipe for components without a source. Raises UserError if there are no components."""
    if not parts:
        raise UserError('nothing to train: pass a recipe, such as "digits", or data=, objective= or net=')
    data = parts.get("data", {"kind": _TOYS[0]})
    if data["kind"] not in _TOYS:
        return _recipe_of_data(data)
    objective = parts.get("objective", {})
    recipe_of_objective = f"{data['kind']}-{objective.get('kind')}".replace("_", "-")
    return recipe_of_objective if recipe_of_objective in recipe_files.names() else data["kind"]


def _recipe_of_data(data: Fields) -> str:
    """Return the recipe for data of this shape: the recipe for images, or moons for points."""
    return IMAGES_RECIPE if len(_data_spec(data).shape) == 3 else "moons"


def _data_spec(data: Fields) -> Data:
    """Parse plain values to a data spec."""
    spec = parse(StandaloneParts, {"data": data}).data
    assert spec is not None
    return spec


def _default_folder(chosen: ChosenSource | None, parts: Fields, images_place: str | None) -> Path:
    """Return the folder runs/NAME for the images or the source. Raises UserError if neither has a name."""
    if images_place is not None:
        return folder_of_images(images_place)
    if chosen and (chosen.kind == "run" or not parts):
        return chosen.folder
    raise UserError('a run of Python objects needs a folder: set out="runs/NAME"')


def _part_fields(parts: Fields, tree: Fields) -> Fields:
    """Return the fields that set these components in a run's tree. Other data also set the protocol of their recipe.

    A component that is only a kind is set like `objective=meanflow`. The run's own kind changes nothing.
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
    """Return the kind of a component in a run's tree, or None if the component or its kind is missing."""
    part = tree.get(name)
    return part.get("kind") if isinstance(part, dict) else None
