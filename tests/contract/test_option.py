"""An option lives only if a packaged recipe or a documented example sets it to other than its default.

An example is a command in the documentation (`dumo ... RECIPE ... FIELD=VALUE`). A field that nobody sets is code
that nobody runs. The constants of the machine and of a run's bookkeeping are exempt, for they are the user's.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dumo.config import recipe_files
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.data import Memory
from dumo.nets import ModuleSpec
from dumo.objectives import Objective
from dumo.objectives.base import ObjectiveSpec
from dumo.types import PINNED, Spec
from dumo.types.outside import DataSpec, NetSpec, SolverSpec, members
from recipe import recipe

OBJECTIVES = members(Objective)
ROOT = Path(__file__).parents[2]
OVERRIDE = re.compile(r"[a-z][\w.]*=")
TUTORIAL = "own-objective.md"  # its kind is not in the union
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != TUTORIAL)]
EXEMPT = {  # by class: fields of the run and of the machine, and an optimizer's constants
    "Run": ("resolved",),  # what was found when a run was opened
    "EncoderTexts": ("identity",),
    "PipelineTexts": ("identity", "memory", "budget"),
    "SdVae": ("variant",),  # of older runs and caches: there is one
    # minutes: a folder of images is proposed with it (`dumo.plan.photos`)
    "Train": (
        "minutes",
        "seed",
        "sheets",
        "save_minutes",
        "keep",
        "max_skips",
        "milestones",
        "share",
        "reshard",
        "log_every",
    ),
    "Sampling": ("seed", "precision"),
    "Evaluation": ("seed",),
    "Images": ("memory", "count"),  # GB of this machine; the first images alone, as a plan in docs/compare.md has them
    "Latents": ("memory",),
    # counted when the run is made, and kept in run.yaml; of a pipeline that edits, of which no config is packaged
    "CaptionFiles": ("digest", "source"),
    "UNet": ("precondition",),  # which two arms of the plan tab2 have
    "Adam": ("weight_decay", "eps", "fake_lr"),
    "AdamW": ("weight_decay", "eps"),
    "AdamW8bit": ("weight_decay", "eps", "fake_lr"),
    "Muon": ("momentum", "weight_decay", "eps"),
}
PYTHON = (
    Memory,
    ModuleSpec,
    ObjectiveSpec,
    NetSpec,
    DataSpec,
    SolverSpec,
)  # what Python gives, and bases of classes there
# Fields of objectives that all have in common and users choose.
SHARED = ("times", "drop", "slope")


@cache
def classes() -> tuple[type[BaseModel], ...]:
    """Every spec that a run may hold."""
    found = dict.fromkeys((Spec, *PYTHON))

    def walk(annotation: Any) -> None:  # noqa: ANN401, a type
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in found:
            found[annotation] = None
            for field in annotation.model_fields.values():
                if field.json_schema_extra != PINNED:
                    walk(field.rebuild_annotation())
        for part in get_args(annotation):
            walk(part)

    walk(Run)
    return tuple(one for one in found if one not in (Spec, *PYTHON))


def examples() -> Iterator[tuple[str, Run]]:
    """Every packaged recipe, and every command of the documentation that sets a field of one."""
    names = recipe_files.names()
    yield from ((name, recipe(name)) for name in names)
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if "dumo " in line and "=" in line:
                    words, sets = command(line)
                    if name := next((name for word in words if (name := word.removeprefix("runs/")) in names), None):
                        yield f"{page.name}: {line.strip()}", load(name, sets)


def command(line: str) -> tuple[list[str], list[str]]:
    """The words of a command line, and what it sets."""
    words = shlex.split(line, comments=True)
    sets = [word for word in words if OVERRIDE.match(word)]
    return words, [one for one in sets if "$" not in one and "mine:" not in one]  # a folder, or code, of the reader


def away(part: object) -> Iterator[tuple[str, str]]:
    """The class and name of each field, at any depth, that is other than its default."""
    if isinstance(part, BaseModel):
        for name, field in type(part).model_fields.items():
            value, default = getattr(part, name), field.get_default(call_default_factory=True)
            yield type(part).__name__, ""
            if default is PydanticUndefined or value != default:
                yield type(part).__name__, name
            yield from away(value)
    elif isinstance(part, tuple | list | dict):
        for one in part.values() if isinstance(part, dict) else part:
            yield from away(one)


def idle() -> list[str]:
    """The fields, as Class.field, that no example sets; Class alone where no example holds one."""
    users: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for name, run in examples():
        for found in away(run):
            users[found].add(name)
    lines: list[str] = []
    for spec in classes():
        kind = spec.__name__
        if not users[kind, ""]:
            lines.append(kind)
            continue
        exempt = ("kind", *EXEMPT.get(kind, ()), *(SHARED if spec in OBJECTIVES else ()))
        found = spec.model_fields.items()  # what is pinned is found, and set by nobody
        fields = [name for name, field in found if name not in exempt and field.json_schema_extra != PINNED]
        lines += [f"{kind}.{name}" for name in fields if not users[kind, name]]
    return sorted(lines)


@pytest.mark.slow
def test_every_option_is_set_by_a_recipe_or_a_documented_example() -> None:
    """But for those still to be judged, a list that only gets shorter."""
    pending = Path(__file__).with_name("idle.txt").read_text(encoding="utf-8").split()
    assert idle() == pending


if __name__ == "__main__":
    print("\n".join(idle()))
