"""A run from the parts that a notebook has: data, a network, an objective, by name or as objects.

`compose` decides what a source names, turns the parts into plain values, and puts them into the run of the source, or
of the recipe that suits them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dumo.config import recipes
from dumo.config.change import shown
from dumo.config.load import FILE, load, load_recipe, parse
from dumo.config.objective import objective_of
from dumo.config.source import SHIPPED_PREFIX, ChosenSource, choose, folder_of_images
from dumo.config.spec import Run
from dumo.config.tree import Parts
from dumo.data import Memory
from dumo.flow.reading import taught_readings
from dumo.flow.solver import best_solver
from dumo.nets import Module
from dumo.plan import proposal
from dumo.runtime.progress import Bar
from dumo.types import Spec, UserError

Fields = dict[str, Any]  # by dotted path, as plain values
TOYS = ("digits", "moons")  # data that recipes are named after
# Ours: of a module no blocks are known, which are what Muon updates and what is compiled; the rates are those of moons.
OF_A_MODULE: Fields = {
    "train.compile": "none",
    "train.optimizer": {"kind": "adamw", "lr": 0.001, "betas": [0.9, 0.99]},
}


@dataclass(frozen=True)
class Composed:
    """What to train, and where: `dumo.run.job.open_job` takes all three."""

    run: Run | None  # None: the one that the folder holds, with the changes
    changes: Sequence[str]  # a.b=c
    folder: Path


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
    """A run and its folder: a recipe, or what the folder holds, with these parts instead of its own.

    Without a source the data say what it is based on: for images a run is proposed, as by `dumo train FOLDER`; points
    are trained on as moons are; an objective's name finds its recipe. Raises UserError.
    """
    # what was named: a recipe, a file or a run (`chosen`), or a place of images
    chosen: ChosenSource | None = None
    place: str | None = None
    if source is not None:
        chosen = choose(source, folder)
        if data is None and chosen.kind == "images":
            place = str(chosen.word)
            chosen = None
    elif _is_path(data):
        place = str(data)

    # the parts, and where they are trained
    plain_parts = {
        "objective": _plain_part("objective", objective),
        "net": plain_net(net),
        "data": None if place else plain_data(data),
    }
    parts = {name: part for name, part in plain_parts.items() if part is not None}
    if folder is None:
        folder = _default_folder(chosen, parts, place)
    if chosen and chosen.kind == "run" and chosen.folder == folder and not parts:
        return Composed(None, changes, folder)

    # the run that they are put into
    recipe = ""
    base_source: str | Path
    if chosen:
        base_source = chosen.word
    else:
        recipe = proposal.RECIPE if place else _base_recipe(parts)
        base_source = f"{SHIPPED_PREFIX}{recipe}"
    base_run = load(base_source)
    fields = _part_fields(parts, base_run)
    if isinstance(net, nn.Module):
        fields |= OF_A_MODULE
    if fields:
        fields["about"] = ", ".join(f"{name} {part.get('name', part['kind'])}" for name, part in parts.items())
    changes = [*(f"{field}={shown(value)}" for field, value in fields.items()), *changes]

    if (folder / FILE).is_file():
        if place:
            changes = [f"data.root={place}", *changes]
        return Composed(None, changes, folder)
    if recipe == proposal.RECIPE:
        proposed = proposal.propose(place, changes, minutes=minutes, device=device, bar=bar)
        return Composed(proposed.run, changes, folder)
    return Composed(load(base_source, changes) if changes else base_run, changes, folder)


def _is_path(data: object) -> bool:
    """Whether this is where images lie, not the name of a data set."""
    return isinstance(data, Path) or (isinstance(data, str) and data not in TOYS)


def _plain_part(name: str, part: object) -> Fields | None:
    """A part as plain values: of the name of its kind, of a mapping, or of a spec. Raises UserError for another."""
    if part is None:
        return None
    if isinstance(part, Mapping):
        return dict(part)
    if isinstance(part, str):
        return {"kind": part}
    if isinstance(part, Spec):
        return part.model_dump(mode="json")
    raise UserError(f"{name} is a {type(part).__name__}: give the name of a kind, or a spec (docs/library.md)")


def plain_net(net: object) -> Fields | None:
    """As `_plain_part`; a module of torch is remembered."""
    if isinstance(net, nn.Module):
        net = Module.of(net)
    return _plain_part("net", net)


def plain_data(data: object) -> Fields | None:
    """As `_plain_part`; a place of images is read from there, and rows of Python are remembered."""
    if _is_path(data):
        return {"kind": "images", "root": str(data)}
    if data is not None and not isinstance(data, str | Mapping | Spec):
        data = Memory.of(data)
    return _plain_part("data", data)


def _base_recipe(parts: Fields) -> str:
    """The recipe that parts are put into. Raises UserError where nothing says which."""
    if not parts:
        raise UserError('nothing to train: give a recipe, such as "digits", or data=, objective= or net=')
    data = parts.get("data", {"kind": TOYS[0]})
    if data["kind"] not in TOYS:
        return proposal.RECIPE if _are_images(data) else "moons"
    twin = _twin_recipe(data["kind"], parts.get("objective", {"kind": ""}))
    return twin if twin in recipes.names() else data["kind"]


def _are_images(data: Fields) -> bool:
    """Whether data are images, not points."""
    parsed = parse(Parts, {"data": data}).data
    assert parsed is not None
    return len(parsed.shape) == 3


def _twin_recipe(data: str, objective: Fields) -> str:
    """The name of the recipe for this objective on toy data, if there is one."""
    return f"{data}-{objective['kind']}".replace("_", "-")


def _default_folder(chosen: ChosenSource | None, parts: Fields, place: str | None) -> Path:
    """runs/NAME. Raises UserError where nothing gives a name."""
    if place is not None:
        return folder_of_images(place)
    if chosen and not parts:
        return chosen.folder
    if chosen is None and parts.keys() == {"objective"}:
        recipe = _base_recipe(parts)
        if recipe not in TOYS:
            return choose(f"{SHIPPED_PREFIX}{recipe}").folder
    raise UserError('a run of your own parts needs a folder: say out="runs/NAME"')


def _part_fields(parts: Fields, run: Run) -> Fields:
    """The fields that put parts into a run: with other data how these are judged, with another objective a solver.

    A part of the run's own kind that is given by name alone stays as the run has it; another objective is as its recipe
    on digits has it, unguided, where there is one.
    """
    fields = {name: part for name, part in parts.items() if part != {"kind": getattr(run, name).kind}}
    if "data" in fields and fields["data"]["kind"] != run.data.kind:
        recipe = proposal.RECIPE if _are_images(fields["data"]) else "moons"
        fields["evaluate"] = load_recipe(recipe).evaluate.model_dump(mode="json")
    if "objective" in fields:
        twin = _twin_recipe(TOYS[0], fields["objective"])
        if fields["objective"].keys() == {"kind"} and twin in recipes.names():
            fields["objective"] = load_recipe(twin).model_dump(mode="json")["objective"]
        solver = best_solver(taught_readings(objective_of(fields["objective"])))
        fields["sample.solver"] = {"kind": solver.kind}
    return fields
