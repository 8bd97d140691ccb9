"""From a recipe's name, a file or a run's folder, and `a.b=c` overrides, to a run; and back to YAML."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json, to_jsonable_python

from dumo.config.change import override, shown
from dumo.config.error import explain
from dumo.config.format import CHANGED, FORMAT, KEY, Noted
from dumo.config.source import FILE as FILE
from dumo.config.source import noted, read
from dumo.config.spec import Run
from dumo.io import yaml
from dumo.types import Spec, UserError

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Difference:
    """A field in which two runs differ."""

    field: str  # its dotted path
    was: object  # as JSON has it
    now: object
    may: bool  # whether it may change when a run is resumed

    def __str__(self) -> str:
        return f"{self.field}: {shown(self.was)} there, {shown(self.now)} asked"


def load(source: str, overrides: Sequence[str] = ()) -> Run:
    """Read a run: a recipe's name, a YAML file, or a folder with a run.yaml.

    Raises UserError, one line per mistake, each with its dotted path and the nearest valid name.
    """
    tree, name = read(source)
    override(tree, overrides)
    return parse(Run, tree, name)


def parse(spec: type[S], tree: object, name: str = "") -> S:
    """A tree of plain values as a spec. Raises UserError, one line per mistake, each after the name of a file.

    As JSON has them: nothing but a number is a number, neither true nor a text, and 2.0 is no integer.
    """
    try:
        return spec.model_validate_json(to_json(tree, inf_nan_mode="constants"), strict=True)
    except ValidationError as error:
        where = f"{name}: " if Path(name).suffix else ""
        raise UserError("\n".join(where + line for line in explain(error, spec).splitlines())) from error


def default_folder(source: str) -> Path:
    """The folder of a run where none is named: runs/NAME, or that of the run.yaml that `source` is or holds."""
    path = Path(source)
    if path.name == FILE:
        return path.parent
    return path if (path / FILE).is_file() else Path("runs") / path.stem


def dump(run: Run, changed: Sequence[Noted] = ()) -> str:
    """The complete run as YAML, its format first, then what was changed in it, which `load` reads back."""
    head = {KEY: FORMAT} | ({CHANGED: [one.model_dump(mode="json") for one in changed]} if changed else {})
    return yaml.dump({**head, **run.model_dump(mode="json")})


def difference(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    """A line per field that differs and is not free."""
    return map(str, differences(old, new, prefix))


def differences(old: BaseModel, new: BaseModel, prefix: str = "", *, may: bool = False) -> Iterator[Difference]:
    """The fields that differ and are not free, those of parts of one kind one by one."""
    for name, field in type(old).model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if extra.get("free"):
            continue
        before, after, here = getattr(old, name), getattr(new, name), may or bool(extra.get("changes"))
        if isinstance(before, BaseModel) and type(before) is type(after):
            yield from differences(before, after, f"{prefix}{name}.", may=here)
        elif before != after:
            yield Difference(f"{prefix}{name}", to_jsonable_python(before), to_jsonable_python(after), here)


def changes(folder: Path, run: Run, step: int) -> list[Noted]:
    """What was changed in a folder's run while it trained, if it goes on after `step` as `run`.

    What was noted of later steps is noted of this one: they are made anew. Before the first step nothing is changed.
    Raises UserError where the folder's run.yaml is damaged.
    """
    if not (folder / FILE).is_file() or step == 0:
        return []
    past = noted(folder)
    undone, last = dict[str, object](), dict[str, object]()
    for one in [one for one in past if one.step >= step]:
        undone.setdefault(one.field, one.was)
        last[one.field] = one.now
    for one in differences(load(str(folder)), run):
        undone.setdefault(one.field, one.was)
        last[one.field] = one.now
    fresh = [Noted(step=step, field=name, was=was, now=last[name]) for name, was in undone.items() if was != last[name]]
    return [*(one for one in past if one.step < step), *fresh]
