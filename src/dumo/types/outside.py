"""Classes of a user's own in a run: a `kind` may be `module:Class`, the name of any class that Python can import.

The class derives from a base (`NetSpec`, `DataSpec`, `SolverSpec` below, `dumo.objectives.base.ObjectiveSpec`) or from
a spec of dumo's, and its `kind` is its name. A field that takes such classes is a union of two branches, which `branch`
tells apart:

    BundledNet = Annotated[DiT | MLP, Field(discriminator="kind"), Tag(BUNDLED)]
    OutsideNet = Annotated[NetSpec, Outside(NetSpec, BundledNet), Tag(OUTSIDE)]
    Net = Annotated[BundledNet | OutsideNet, Discriminator(branch)]

`members` lists the specs of a union, `import_class` imports a class from outside, and `code_hash` hashes its code.
`make_objective` makes an objective of dumo's own by its kind.

A module is sought on Python's path alone, which holds the current folder for `python -m dumo`, not for `dumo`: a run's
folder that came from somebody else brings no code.
"""

import ast
import inspect
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema, to_json
from torch import nn

from dumo.types import Cond, Needs, Objective, Path, Readings, Sample, Spec, UserError

# The branches of a union, which stand in the location of an error
BUNDLED = "bundled"
OUTSIDE = "module:Class"


def branch(value: object) -> str:
    """Return the branch of a union that a tree or spec belongs to: OUTSIDE if its kind is `module:Class`."""
    kind: object = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return OUTSIDE if isinstance(kind, str) and ":" in kind else BUNDLED


@dataclass(frozen=True)
class Outside:
    """In the annotation of a field: classes from outside that derive from `base`, or from a spec of a union."""

    base: type[Spec]
    union: object

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by `_validate`. A spec is serialized as its own class says."""
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return a kind with a colon, and any other fields."""
        return {"type": "object", "properties": {"kind": {"type": "string", "pattern": ":"}}, "required": ["kind"]}

    def _validate(self, value: Any) -> Spec:  # noqa: ANN401, a spec or a tree
        """Return the spec that a tree describes, or that is given. Raises UserError for a class of another family."""
        cls = type(value) if isinstance(value, Spec) else import_class(value["kind"])
        if not issubclass(cls, (self.base, *members(self.union))):
            raise UserError(
                f"kind '{name_of(cls)}' does not belong to this field: derive its class from "
                f"{name_of(self.base).replace(':', '.')}"
            )
        if isinstance(value, Spec):
            return value
        return cls.model_validate_json(to_json(value, inf_nan_mode="constants"), strict=True)


def members(union: object) -> tuple[type[Spec], ...]:
    """Return the specs of a union, in its order, without the bases of classes from outside."""
    if isinstance(union, type):
        return (union,) if issubclass(union, Spec) else ()
    if any(isinstance(mark, Outside) for mark in getattr(union, "__metadata__", ())):
        return ()
    specs: list[type[Spec]] = []
    for part in get_args(union):
        specs += members(part)
    return tuple(specs)


def name_of(cls: type) -> str:
    """Return the name of a class as a `kind` writes it, `module:Class`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def import_class(name: str) -> type[Spec]:
    """Import the class `module:Class`. Raises UserError if it is missing or not a spec with this name as its `kind`."""
    module, _, attributes = name.partition(":")
    try:
        cls: Any = import_module(module)
        for attribute in attributes.split("."):
            cls = getattr(cls, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "if its file is in this folder, put PYTHONPATH=. before the command"
        if module == "__main__":
            fix = "a class of a notebook or script is there while that runs: move it to a file"
        raise UserError(f"kind '{name}' cannot be imported ({type(error).__name__}: {error}): {fix}") from error
    if not (isinstance(cls, type) and issubclass(cls, Spec)):
        raise UserError(f"kind '{name}' is not a dumo.types.Spec: derive its class from it")
    field = cls.model_fields.get("kind")
    if field is None or (field.default, *get_args(field.annotation)) != (name, name):
        raise UserError(f'kind \'{name}\': its class must declare kind: Literal["{name}"] = "{name}"')
    return cls


def code_hash(spec: Spec | Objective) -> str | None:
    """Return the first 16 digits of the SHA-256 of the code of a spec's module, without comments and layout.

    In a notebook it is of the class alone. It does not cover what the module imports. None where there is no source.
    """
    cls = type(spec)
    try:
        source_object = cls if cls.__module__ == "__main__" else sys.modules[cls.__module__]
        tree = ast.parse(textwrap.dedent(inspect.getsource(source_object)))
    except (OSError, TypeError, SyntaxError):
        return None
    return sha256(ast.dump(tree).encode()).hexdigest()[:16]


def make_objective(objective: str | Mapping[str, Any] | Objective) -> Objective:
    """Make the objective of a kind, or of a dict of fields with its `kind`; an instance is returned as it is.

    Only kinds that ship with dumo are known: a class from outside is given as an instance. Raises pydantic's
    ValidationError for an unknown kind, and for fields that do not fit.
    """
    if not isinstance(objective, str | Mapping):
        return objective
    fields = {"kind": objective} if isinstance(objective, str) else dict(objective)
    return _objective_adapter().validate_json(to_json(fields, inf_nan_mode="constants"), strict=True)


@cache
def _objective_adapter() -> TypeAdapter[Objective]:
    """Return the union of all objectives that ship with dumo.

    They are imported by name, because they build on this module.
    """
    return TypeAdapter(import_module("dumo.objectives").BundledObjective)


class NetSpec(Spec, ABC):
    """The base of a net from outside. The class variables are options that dumo's own nets have and these have not."""

    kind: str
    precondition: ClassVar[str] = "none"
    texts: ClassVar[None] = None
    augment: ClassVar[int] = 0
    lora: ClassVar[None] = None
    checkpoint: ClassVar[None] = None
    time_scale: float = Field(default=1.0, gt=0)  # radians per unit of t of its quickest wave (`dumo.nets.embed`)

    @abstractmethod
    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A module called as `net(x, c, t=t ...)`, with the inputs and heads of `needs`; c is `classes` for none."""


class DataSpec(Spec, ABC):
    """The base of data from outside."""

    kind: str
    shape: ClassVar[tuple[int, ...]]  # of a sample
    classes: ClassVar[int] = 0
    names: ClassVar[tuple[str, ...]] = ()
    captions: ClassVar[None] = None
    augment: ClassVar[None] = None

    @property
    def labels(self) -> int:
        """The number of classes of the labels: all classes, since these data have no captions."""
        return self.classes

    @abstractmethod
    def open(self) -> Any:  # noqa: ANN401
        """A source (`dumo.io.data_source.DataSource`), such as a `TensorData` of rows in memory."""

    def originals(self) -> Any:  # noqa: ANN401
        """All samples with their classes, as `open` gives them: they have no captions."""
        return self.open()


class SolverSpec(Spec, ABC):
    """The base of a solver from outside."""

    kind: str
    uses: ClassVar[Literal["velocity", "endpoint", "flow_map", "both"]]  # the reading that it calls
    passes: ClassVar[int] = 1  # through the net, in a step

    @abstractmethod
    def __call__(
        self, readings: Readings, path: Path, x: Sample, c: Cond, nfe: int, fresh: Callable[[int], Sample]
    ) -> Sample:
        """Carry noise x (b, ...) to data in nfe passes; `fresh(k)` is the k-th further draw of noise, shaped as x."""
