"""From a recipe's name, a file or a run's folder, and `a.b=c` overrides, to a run; and back to YAML."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from dumo.config.change import override, shown
from dumo.config.error import explain
from dumo.config.format import FORMAT, KEY
from dumo.config.source import FILE as FILE
from dumo.config.source import read
from dumo.config.spec import Run
from dumo.io import yaml
from dumo.types import Spec, UserError

S = TypeVar("S", bound=Spec)


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


def dump(run: Run) -> str:
    """The complete run as YAML, its format first, which `load` reads back."""
    return yaml.dump({KEY: FORMAT, **run.model_dump(mode="json")})


def difference(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    """A line per field that differs and may not, when a run is resumed."""
    for name, field in type(old).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            continue
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and type(before) is type(after):
            yield from difference(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}: {shown(before)} there, {shown(after)} asked"
