"""The format of a run.yaml, and how one of an older format is read as one of this (ADR 0032).

A run.yaml, which training writes complete, says its format; one that says none is of format 1. Files that people write
need none. What is renamed here is renamed nowhere else.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dumo.io.text import brief
from dumo.types import UserError

KEY = "format"  # of a run.yaml, its first
CHANGED = "changed"  # of a run.yaml, where something was: what, from which step on (`Noted`)
FORMAT = 2  # what `dumo.config.load.dump` writes
RENAMED = {  # fields of format 1: what they are called now, and what else that asks
    "train.accumulate": ("micro_batch", ", the rows of a pass: train.batch over what accumulate was, null for 1"),
    "objective.schedule": ("discretization", ""),
}


class Noted(BaseModel):
    """A field of a run that was changed while it trained: the steps after `step` have it as it is now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    field: str  # its dotted path, or data: their fingerprint
    was: Any
    now: Any


def take(tree: dict[str, Any], name: str, *, recorded: bool) -> int:
    """Take the format out of a tree, and return it: where none is said, 1 if `recorded` by a training, else this one.

    Raises UserError where it is no number, or that of a newer dumo.
    """
    said = tree.pop(KEY, 1 if recorded and "base" not in tree else FORMAT)
    if not isinstance(said, int) or isinstance(said, bool) or said < 1:
        raise UserError(
            f"{name}: format is {brief(repr(said))}: it is a number from 1 to {FORMAT}; leave it out in your own file"
        )
    if said > FORMAT:
        raise UserError(f"{name}: format is {said}, and this dumo reads up to {FORMAT}: take a newer dumo")
    return said


def take_changed(tree: dict[str, Any], name: str) -> list[Noted]:
    """Take what was changed out of a tree, and return it. Raises UserError where it is none of that."""
    try:
        return TypeAdapter(list[Noted]).validate_python(tree.pop(CHANGED, []))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (CHANGED, *first["loc"])))
        raise UserError(
            f"{name}: {where}: {first['msg']}: it lists step, field, was and now of each change; mend or remove it"
        ) from error


def upgrade(tree: dict[str, Any]) -> None:
    """Rename in place what format 1 called otherwise; what it never wrote is left for the validation to judge."""
    train, objective = tree.get("train"), tree.get("objective")
    if isinstance(train, dict) and "accumulate" in train and "micro_batch" not in train:
        pieces, batch = train["accumulate"], train.get("batch")
        if isinstance(pieces, int) and isinstance(batch, int) and pieces > 0:
            train["micro_batch"] = None if pieces == 1 else -(-batch // pieces)
            del train["accumulate"]
    if isinstance(objective, dict) and objective.get("kind") == "consistency" and "discretization" not in objective:
        objective |= {"discretization": objective.pop("schedule")} if "schedule" in objective else {}


def hint(path: str, fields: list[str]) -> str:
    """Of an unknown key that format 1 had, its name now, where that is one of `fields`; else ''."""
    name, rest = RENAMED.get(path, ("", ""))
    return f"it is {name} now{rest}" if name in fields else ""
