"""A run from the parts that a notebook has: data, a network, an objective, by name or as objects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dumo.config import recipes
from dumo.config.change import shown
from dumo.config.load import FILE, load, load_recipe, parse
from dumo.config.source import SHIPPED_PREFIX, choose, folder_of_images
from dumo.config.spec import Run
from dumo.config.tree import Parts
from dumo.data import Memory
from dumo.flow.reading import taught
from dumo.flow.solver import best
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


def compose(
    source: str | Path | None,
    sets: Sequence[str],
    folder: Path | None,
    *,
    objective: str | Mapping[str, Any] | Spec | None,
    data: Any,  # noqa: ANN401, what a notebook has
    net: str | Mapping[str, Any] | Spec | nn.Module | None,
    minutes: float | None,
    device: str,
    bar: Bar,
) -> tuple[Run, Path]:
    """A run and its folder: a recipe, or what the folder holds, with these parts instead of its own.

    Without a source the data say what it is based on: for images a run is proposed, as by `dumo train FOLDER`; points
    are trained on as moons are; an objective's name finds its recipe. Raises UserError.
    """
    if source is not None:
        chosen = choose(source, folder)
        source = chosen.word
        if data is None and chosen.kind == "images":
            data = str(source)
            source = None
    place = str(data) if source is None and is_path(data) else None
    parts: Fields = {"objective": plain("objective", objective), "net": plain_net(net)}
    parts |= {} if place else {"data": plain_data(data)}
    parts = {name: part for name, part in parts.items() if part is not None}
    folder = folder or default_folder(source, parts, place)
    if source is None:
        recipe = proposal.RECIPE if place else base(parts)
        based_on = f"{SHIPPED_PREFIX}{recipe}"
    else:
        recipe = None
        based_on = source
    fields = fitting(parts, load(based_on))
    if isinstance(net, nn.Module):
        fields |= OF_A_MODULE
    if fields:
        fields["about"] = ", ".join(f"{name} {part.get('name', part['kind'])}" for name, part in parts.items())
    sets = [*(f"{field}={shown(value)}" for field, value in fields.items()), *sets]
    if (folder / FILE).is_file():
        return load(folder, [*([f"data.root={place}"] if place else []), *sets]), folder
    if recipe == proposal.RECIPE:
        return proposal.propose(place, sets, minutes=minutes, device=device, bar=bar).run, folder
    return load(based_on, sets), folder


def is_path(data: object) -> bool:
    """Whether this is where images lie, not the name of a data set."""
    return isinstance(data, Path) or (isinstance(data, str) and data not in TOYS)


def plain(name: str, part: object) -> Fields | None:
    """A part as plain values: of the name of its kind, of a mapping, or of a spec. Raises UserError for another."""
    if part is None or isinstance(part, Mapping):
        return None if part is None else dict(part)
    if isinstance(part, str):
        return {"kind": part}
    if isinstance(part, Spec):
        return part.model_dump(mode="json")
    raise UserError(f"{name} is a {type(part).__name__}: give the name of a kind, or a spec (docs/library.md)")


def plain_net(net: object) -> Fields | None:
    """The same; a module of torch is remembered."""
    return plain("net", Module.of(net) if isinstance(net, nn.Module) else net)


def plain_data(data: object) -> Fields | None:
    """The same; a place of images is read from there, and rows of Python are remembered."""
    if is_path(data):
        return {"kind": "images", "root": str(data)}
    return plain("data", data if data is None or isinstance(data, str | Mapping | Spec) else Memory.of(data))


def base(parts: Fields) -> str:
    """The recipe that parts are put into. Raises UserError where nothing says which."""
    if not parts:
        raise UserError('nothing to train: give a recipe, such as "digits", or data=, objective= or net=')
    data = parts.get("data", {"kind": TOYS[0]})
    if data["kind"] not in TOYS:
        return proposal.RECIPE if are_images(data) else "moons"
    twin = twin_of(data["kind"], parts.get("objective", {"kind": ""}))
    return twin if twin in recipes.names() else data["kind"]


def are_images(data: Fields) -> bool:
    """Whether data are images, not points."""
    found = parse(Parts, {"data": data}).data
    assert found is not None
    return len(found.shape) == 3


def twin_of(data: str, objective: Fields) -> str:
    """The name of the recipe for this objective on toy data, if there is one."""
    return f"{data}-{objective['kind']}".replace("_", "-")


def default_folder(source: str | Path | None, parts: Fields, place: str | None) -> Path:
    """runs/NAME. Raises UserError where nothing gives a name."""
    if place is not None:
        return folder_of_images(place)
    if source is not None and not parts:
        return choose(source).folder
    if source is None and parts.keys() == {"objective"}:
        name = base(parts)
        if name not in TOYS:
            return choose(f"{SHIPPED_PREFIX}{name}").folder
    raise UserError('a run of your own parts needs a folder: say out="runs/NAME"')


def fitting(parts: Fields, run: Run) -> Fields:
    """The fields that put parts into a run: with other data how these are judged, with another objective a solver.

    A part of the run's own kind that is given by name alone stays as the run has it; another objective is as its recipe
    on digits has it, unguided, where there is one.
    """
    fields = {name: part for name, part in parts.items() if part != {"kind": getattr(run, name).kind}}
    if "data" in fields and fields["data"]["kind"] != run.data.kind:
        judged = load_recipe(proposal.RECIPE if are_images(fields["data"]) else "moons").evaluate
        fields["evaluate"] = judged.model_dump(mode="json")
    if "objective" in fields:
        twin = twin_of(TOYS[0], fields["objective"])
        if fields["objective"].keys() == {"kind"} and twin in recipes.names():
            fields["objective"] = load_recipe(twin).objective.model_dump(mode="json")
        objective = parse(Parts, {"objective": fields["objective"]}).objective
        assert objective is not None
        fields["sample.solver"] = {"kind": best(taught(objective)).kind}
    return fields
