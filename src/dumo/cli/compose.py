"""A run from the parts that a notebook has: data, a network, an objective, by name or as objects.

`compose` is the entrance. In this order it decides what the source names, turns the parts into plain values, decides
the folder, and puts the parts into the run of the source, or of the recipe that suits them. `plain_net` and
`plain_data` also remember a module or an array, for the code that opens the run later in this process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dumo.config import recipes
from dumo.config.change import yaml_text
from dumo.config.load import RUN_FILE, load, load_recipe, objective_of, parse
from dumo.config.source import (
    IMAGES_RECIPE,
    SHIPPED_PREFIX,
    ChosenSource,
    RunText,
    choose,
    folder_of_images,
    read,
    root_of_encoded_images,
    settings_of_images,
    without_resolved,
)
from dumo.config.spec import Run, StandaloneParts
from dumo.data import Memory
from dumo.flow.reading import taught_readings
from dumo.flow.solver import best_solver
from dumo.io.read import first_few
from dumo.nets import ModuleSpec
from dumo.plan import proposal
from dumo.plan.photolatents import place_in_memory
from dumo.run.folder import require_place
from dumo.runtime.door import goes_on_line, option, settings
from dumo.runtime.progress import Bar, line_printer
from dumo.types import Spec, UserError

# what minutes are for, and what to do where they are not
MINUTES_FIX = "for images, or to go on with a run's folder: set train.steps or train.minutes in changes"

Fields = dict[str, Any]  # by dotted path, as plain values
_TOYS = ("digits", "moons")  # kinds of data after which recipes are named, digits first
# How a module of the user's is trained: ours. Its blocks are not known, which Muon would update and torch compile; the
# rates are those of moons.
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
    minutes: float | None = None  # for which a run goes on; None: for what is left of it
    text: RunText | None = None  # of the folder's run.yaml, where it was read


def compose(
    source: str | Path | None,
    changes: Sequence[str],
    folder: Path | None,
    *,
    objective: str | Mapping[str, Any] | Spec | None,
    data: Any,  # noqa: ANN401, what a notebook has
    net: str | Mapping[str, Any] | Spec | nn.Module | None,
    minutes: float | None,
    device: str,
    bar: Bar,
) -> Composed:
    """The run to train and its folder: the run that `source` names, with the given parts instead of its own.

    Without a source the parts choose one: for images a run is proposed, as by `dumo train FOLDER`; for points it is the
    recipe moons; for an objective alone its recipe on digits, if there is one. `folder` None: that of the run that
    `source` names, else runs/NAME.

    Where `folder` holds a run, what is asked for is compared with it when it is opened, as on the command line. A run
    that was proposed, or that `source` names, is the folder's own, with the parts and changes: it would be proposed
    otherwise now.

    `minutes` are those of a run that is proposed, or those for which the run of a folder goes on.

    Raises UserError where the parts do not fit, nothing gives a name, or `minutes` are given of anything else.
    """
    # what was named: a recipe, a file or a run (`chosen`), or a place of images
    chosen: ChosenSource | None = None
    images_place: str | None = None
    if source is not None:
        chosen = choose(source, folder)
        if data is None and chosen.kind == "images":
            images_place = str(chosen.word)
            chosen = None
    elif _is_path(data):
        images_place = str(data)

    # the parts, and where they are trained
    plain_parts = {
        "objective": _plain_part("objective", objective),
        "net": plain_net(net),
        "data": None if images_place else plain_data(data, bar),
    }
    parts = {name: part for name, part in plain_parts.items() if part is not None}
    if folder is None:
        folder = _default_folder(chosen, parts, images_place)

    # the folder's own run, with the parts and changes
    if chosen is not None and chosen.kind == "run" and chosen.folder == folder:
        if not parts:
            return Composed(None, changes, folder, minutes)
        own_run = read(chosen.word)
        return Composed(None, _changes_of_own_run(parts, own_run, changes), folder, minutes, own_run)

    # what was named, else the recipe that suits the parts
    recipe = ""
    if chosen is None:
        recipe = IMAGES_RECIPE if images_place else _base_recipe(parts)
    base_source = chosen.word if chosen else f"{SHIPPED_PREFIX}{recipe}"

    # a recipe, a file or another run, with the parts in place of its own
    if recipe != IMAGES_RECIPE:
        if minutes is not None:
            raise UserError(f"minutes are {MINUTES_FIX}")
        base = read(base_source)
        memory = _images_in_memory(parts)
        has_data = memory is not None and _has_latents_of(base.tree, memory)
        all_changes = _changes_of_new_run(parts, base, net, changes, has_data=has_data)
        if chosen and not parts:
            all_changes = [*chosen.settings, *all_changes]
        return Composed(load(without_resolved(base), all_changes), all_changes, folder)

    # the run that was proposed for these images goes on
    log_line = line_printer(bar)
    if (folder / RUN_FILE).is_file():
        own_run = read(folder / RUN_FILE)
        all_changes = _changes_of_own_run(parts, own_run, changes)
        if minutes is not None:
            log_line(goes_on_line(folder, minutes))
        return Composed(None, settings_of_images(own_run.tree, all_changes, images_place), folder, text=own_run)

    require_place(folder)

    # a run is proposed for these images; of those in memory, the proposal says how they are learned
    memory = _images_in_memory(parts)
    all_changes = _changes_of_new_run(parts, read(base_source), net, changes, has_data=memory is not None)
    proposed = proposal.propose(memory or images_place, all_changes, minutes=minutes, device=device, bar=bar)
    if proposed.draft.space and "net" not in parts:  # a net of the user's reads pixels
        log_line(f"learned as {proposed.draft.space}")
    if proposed.early_end:
        log_line(f"ends early, {proposed.early_end}")
    return Composed(proposed.run, all_changes, folder)


def _changes_of_own_run(parts: Fields, own_run: RunText, changes: Sequence[str]) -> list[str]:
    """The changes of a folder's run that give it these parts, then `changes`. Raises UserError for other images."""
    memory = _images_in_memory(parts)
    if memory and _has_latents_of(own_run.tree, memory):
        parts = _without_data(parts)
    elif memory and root_of_encoded_images(own_run.tree) is not None:
        raise UserError(
            f"{own_run.name} is a run on other images than these: give the same, or begin a new run on these, with "
            f"another {option('out', 'DIR')}"
        )
    return [*_as_settings(_part_fields(parts, own_run.tree)), *changes]


def _changes_of_new_run(
    parts: Fields,
    base: RunText,
    net: object,
    changes: Sequence[str],
    *,
    has_data: bool,
) -> list[str]:
    """The changes of a base that make a new run with these parts, then `changes`.

    `net` is that of the parts as it was given; with `has_data`, the run learns the data of the parts anyway.
    """
    fields = _part_fields(_without_data(parts) if has_data else parts, base.tree)
    if isinstance(net, nn.Module):
        fields |= _MODULE_FIELDS
    if fields or _images_in_memory(parts):
        fields["about"] = ", ".join(f"{name} {part.get('name', part['kind'])}" for name, part in parts.items())
    return [*_as_settings(fields), *changes]


def _without_data(parts: Fields) -> Fields:
    """The parts but for their data."""
    return {name: part for name, part in parts.items() if name != "data"}


def _as_settings(fields: Fields) -> list[str]:
    """Fields as settings, each a.b=c."""
    return [f"{field}={yaml_text(value)}" for field, value in fields.items()]


def _is_path(data: object) -> bool:
    """Whether data are given as a path of images, not as the name of a data set."""
    return isinstance(data, Path) or (isinstance(data, str) and data not in _TOYS)


def _plain_part(name: str, part: object) -> Fields | None:
    """A part as plain values, from the name of its kind, a mapping, or a spec. Raises UserError for anything else."""
    if part is None:
        return None
    if isinstance(part, Mapping):
        fields = dict(part)
        _require_kind(name, fields)
        return fields
    if isinstance(part, str):
        return {"kind": part}
    if isinstance(part, Spec):
        return part.model_dump(mode="json")
    raise UserError(f"{name} is a {type(part).__name__}: give the name of a kind, or a spec (docs/library.md)")


def _require_kind(name: str, fields: Fields) -> None:
    """Raise UserError, with the way out, for a mapping without a kind: several data sets by name, or fields alone."""
    if "kind" in fields:
        return
    keys = [str(key) for key in fields]
    if name == "data" and fields and all(_has_rows(value) for value in fields.values()):
        raise UserError(
            f"data has {first_few(keys)}, each with rows: give one of them, as data=DATA[{keys[0]!r}], or a pair "
            "(array, labels)"
        )
    field = keys[0] if keys else "kind"
    change = settings(f"{name}.{field}=...")
    raise UserError(f'{name} is a dict without "kind": add it, or set fields alone by {change}')


def _has_rows(value: object) -> bool:
    """Whether a value is a data set or an array, by what it offers."""
    return not isinstance(value, str | Mapping) and hasattr(value, "__len__") and hasattr(value, "__getitem__")


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
    objective_recipe = _objective_recipe(data["kind"], parts.get("objective", {"kind": ""}))
    return objective_recipe if objective_recipe in recipes.names() else data["kind"]


def _recipe_of_data(data: Fields) -> str:
    """The recipe whose settings suit data of this shape: that of images, or moons, that of points."""
    return IMAGES_RECIPE if _are_images(data) else "moons"


def _are_images(data: Fields) -> bool:
    """Whether data are images, by the shape of a sample; else they are points."""
    parsed = parse(StandaloneParts, {"data": data}).data
    assert parsed is not None
    return len(parsed.shape) == 3


def _images_in_memory(parts: Fields) -> Memory | None:
    """The images that Python gave; None where the data are others, or points."""
    if "data" not in parts or not _are_images(parts["data"]):
        return None
    data = parse(StandaloneParts, {"data": parts["data"]}).data
    return data if isinstance(data, Memory) else None


def _has_latents_of(tree: Fields, images: Memory) -> bool:
    """Whether the run of a tree learns latents of some images in memory. Their file may have moved with the run."""
    root = root_of_encoded_images(tree)
    return root is not None and root.name == Path(place_in_memory(images)).name


def _objective_recipe(data: str, objective: Fields) -> str:
    """The name that a recipe of this objective on toy data has; there may be none."""
    return f"{data}-{objective['kind']}".replace("_", "-")


def _default_folder(chosen: ChosenSource | None, parts: Fields, images_place: str | None) -> Path:
    """The folder runs/NAME, where no folder is given: by the place of images, the source, or an objective's recipe.

    A run's folder is its own. Raises UserError where none of these gives a name.
    """
    if images_place is not None:
        return folder_of_images(images_place)
    if chosen and (chosen.kind == "run" or not parts):
        return chosen.folder
    if chosen is None and parts.keys() == {"objective"}:
        recipe = _base_recipe(parts)
        if recipe not in _TOYS:
            return choose(f"{SHIPPED_PREFIX}{recipe}").folder
    raise UserError('a run of your own parts needs a folder: say out="runs/NAME"')


def _part_fields(parts: Fields, tree: Fields) -> Fields:
    """The fields to set in the run of a tree so that it has these parts.

    Other data bring the protocol that judges them, and another objective brings a solver. A part given by the name of
    the run's own kind changes nothing. An objective given by name alone is as its recipe on digits has it, unguided,
    where there is one.
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
        solver = best_solver(taught_readings(objective_of(fields["objective"])))
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
