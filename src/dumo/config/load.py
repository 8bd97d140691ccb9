"""Load a run from a recipe's name, a file or a folder, with overrides `field=value`, and write it as YAML.

`load` reads the text (`dumo.config.source`), applies the overrides, fills in the values found when the run was first
opened (`resolved`), and validates the tree (`parse`), in this order. `load_recipe` loads a shipped recipe by name, and
`run_of` a run from a text that has been read already.

`dump` is the inverse of `load`, and `summary` returns a shorter tree for display. `dumo.config.difference` compares two
runs.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from dumo.config import trust
from dumo.config.overrides import field_of, override
from dumo.config.source import (
    CODE_KEY,
    DATA_KEY,
    FORMAT,
    FORMAT_KEY,
    RESOLVED_KEY,
    SHIPPED_PREFIX,
    RunText,
    read,
)
from dumo.config.source import RUN_FILE as RUN_FILE
from dumo.config.spec import Run, StandaloneParts
from dumo.flow.reading import available_readings
from dumo.flow.solver import best_solver
from dumo.io.yaml import dump_yaml
from dumo.types import Spec, UserError, marks_of

S = TypeVar("S", bound=Spec)


def load(source: str | Path | RunText, overrides: Sequence[str] = ()) -> Run:
    """Load a run from a recipe's name, a YAML file, a folder with a run.yaml, or a text that has been read already.

    An existing `Path` is never a recipe's name. Raises UserError with one line per mistake, each with its dotted path
    and the nearest valid name.
    """
    # Classes in the user's own overrides may be imported.
    trust.accept(overrides)
    text = source if isinstance(source, RunText) else read(source)
    return run_of(text, overrides)


def run_of(text: RunText, overrides: Sequence[str] = ()) -> Run:
    """Return the run that a text describes, with `overrides` applied. Raises UserError with one line per mistake.

    If they set an objective of another kind and no solver, the solver becomes the best one for this objective.
    """
    tree = deepcopy(text.tree)
    kind_before = _objective_kind(tree)
    override(tree, overrides)
    has_other_objective = _objective_kind(tree) not in (None, kind_before)
    if has_other_objective and not any(field_of(word).startswith("sample.solver") for word in overrides):
        objective = parse(StandaloneParts, {"objective": tree["objective"]}).objective
        assert objective is not None
        override(tree, [f"sample.solver={{kind: {best_solver(available_readings(objective)).kind}}}"])
    resolved = tree.get(RESOLVED_KEY)
    # Validation reports any other type.
    if isinstance(resolved, dict):
        _fill(tree, resolved)
    return parse(Run, tree, text.name)


def _objective_kind(tree: dict[str, Any]) -> object:
    """Return the kind of the objective in a tree. If it is missing, return None; validation reports it."""
    objective = tree.get("objective")
    return objective.get("kind") if isinstance(objective, dict) else None


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Run:
    """Load the shipped recipe of this name, even if a local file or folder has this name. Raises UserError."""
    return load(f"{SHIPPED_PREFIX}{name}", overrides)


def parse(spec: type[S], tree: object, name: str = "") -> S:
    """Validate a tree of plain values as a spec. Types are strict as in JSON: "2" is not a number, 2.0 not an integer.

    Raises UserError with one line per mistake, prefixed by `name` if it is a file, and, before any import, for user
    code without consent (`dumo.config.trust`).
    """
    trust.require(trust.named_classes(tree), name)
    try:
        return spec.model_validate_json(to_json(tree, inf_nan_mode="constants"), strict=True)
    # A field's name contains a lone surrogate. YAML rejects it in values.
    except PydanticSerializationError as error:
        raise UserError(f"a field's name contains a lone surrogate, which is not valid Unicode: {error}") from error
    except ValidationError as error:
        from dumo.config.messages import explain

        prefix = f"{name}: " if Path(name).suffix else ""
        raise UserError("\n".join(prefix + line for line in explain(error, spec))) from error


def _fill(tree: dict[str, Any], resolved: dict[str, Any]) -> None:
    """Fill missing or null fields of a tree, in place, with the values found when the run was first opened.

    `resolved` has these values by dotted path.
    """
    for field, value in resolved.items():
        # These are records of the run, not fields.
        if field in (CODE_KEY, DATA_KEY):
            continue
        *parents, name = str(field).split(".")
        part = _part_at(tree, parents)
        if part is not None and part.get(name) is None:
            part[name] = value


def _part_at(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    """Return the mapping at a path of names in a tree, or None."""
    part: Any = tree
    for name in path:
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else None


def dump(run: Run, header: Mapping[str, object] | None = None, *, short: bool = False) -> str:
    """Return the complete run as YAML, which `load` accepts: its format, `header`, the fields, and `resolved`.

    With `short`, write its `summary` without `resolved`.
    """
    written: dict[str, Any] = {FORMAT_KEY: FORMAT, **(header or {})}
    tree = summary(run) if short else run.model_dump(mode="json")
    resolved = tree.pop(RESOLVED_KEY, {})
    for field, value in [*resolved.items()]:
        if field in (CODE_KEY, DATA_KEY):
            continue
        *parents, name = field.split(".")
        part = _part_at(tree, parents)
        if part is None or name not in part:
            continue
        # Write a found value only under `resolved`, unless the field has been set to another value since.
        if part[name] in (None, value):
            del part[name]
        else:
            del resolved[field]
    written |= tree
    if resolved and not short:
        written[RESOLVED_KEY] = resolved
    return dump_yaml(written)


def summary(part: BaseModel) -> dict[str, Any]:
    """Return a spec as plain values, without fields whose value is a default that is null, empty or marked quiet.

    `parse` returns the same spec again.
    """
    tree = part.model_dump(mode="json")
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        is_not_worth_showing = marks_of(field).get("quiet") or value in (None, "", (), {})
        if is_not_worth_showing and value == field.get_default(call_default_factory=True):
            tree.pop(name, None)
        elif name in tree and isinstance(value, BaseModel):
            tree[name] = summary(value)
        elif name in tree and isinstance(value, tuple):
            for i, item in enumerate(cast(tuple[object, ...], value)):
                if isinstance(item, BaseModel):
                    tree[name][i] = summary(item)
    return tree
