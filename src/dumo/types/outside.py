"""Classes of a user's own in a run: where a `kind` may stand, `module:Class` names any class that Python can import.

It keeps the contract of its family: a frozen `Spec`, whose `kind` is that name, with the parts that the family lists.
A module is sought on Python's path alone, which holds the current folder for `python -m dumo`, not for `dumo`: a run's
folder that came from somebody else brings no code.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from typing import Any, ClassVar, get_args

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema, to_json

from dumo.types import Spec, UserError

TAG = "module:Class"


@dataclass(frozen=True)
class OpenTo:
    """In the annotation of a union of specs: a member by its `kind`, or a class from outside that has these parts."""

    family: str  # objective, net ...
    parts: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:  # noqa: ANN401
        """The union by kind, and one choice more."""
        members = {
            kind: handler.generate_schema(member)
            for member in get_args(source)
            for kind in get_args(member.model_fields["kind"].annotation)
        }
        takes = core_schema.typed_dict_schema(
            {"kind": core_schema.typed_dict_field(core_schema.str_schema(pattern=":"))}, extra_behavior="allow"
        )
        outside = core_schema.no_info_plain_validator_function(self.read, json_schema_input_schema=takes)
        return core_schema.tagged_union_schema({**members, TAG: outside}, discriminator=kind_of)

    def read(self, value: Any) -> Spec:  # noqa: ANN401, a spec or a tree
        """The spec that a tree describes, or that is given. Raises UserError where it does not keep the contract."""
        if isinstance(value, Spec):
            found = value
        else:
            name = value["kind"]
            found = imported(name).model_validate_json(to_json(value, inf_nan_mode="constants"), strict=True)
        if missing := [part for part in self.parts if not hasattr(found, part)]:
            raise UserError(
                f"{name_of(type(found))} is no {self.family}: it lacks {', '.join(missing)}; see docs/library.md"
            )
        return found


def kind_of(value: object) -> str | None:
    """Which choice of a union a tree or a spec is; None: it does not say."""
    kind: object = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return None if not isinstance(kind, str) else TAG if ":" in kind else kind


def name_of(cls: type) -> str:
    """`module:Class`."""
    return f"{cls.__module__}:{cls.__qualname__}"


def imported(name: str) -> type[Spec]:
    """The class of a name. Raises UserError where there is none, or it is no spec of this name."""
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module of somebody else may raise anything
        way = "where its file is in this folder, put PYTHONPATH=. before the command"
        if module == "__main__":
            way = "a class of a notebook or script is there while that runs: move it to a file"
        raise UserError(f"kind '{name}' cannot be imported ({type(error).__name__}: {error}): {way}") from error
    if not (isinstance(found, type) and issubclass(found, Spec)):
        raise UserError(f"kind '{name}' is no dumo.types.Spec: make it a class of that base")
    field = found.model_fields.get("kind")
    if field is None or field.default != name:
        raise UserError(f'kind \'{name}\': the class must say so, kind: Literal["{name}"] = "{name}"')
    return found


def code(spec: Spec) -> str | None:
    """A hash of a spec's module, comments and layout aside; of the class alone in a notebook. None: no source is there.

    A class of a package is known by the module that defines it, not by what that imports.
    """
    cls = type(spec)
    try:
        whole = cls if cls.__module__ == "__main__" else sys.modules[cls.__module__]
        tree = ast.parse(textwrap.dedent(inspect.getsource(whole)))
    except (OSError, TypeError, SyntaxError):
        return None
    return sha256(ast.dump(tree).encode()).hexdigest()[:16]


class NetSpec(Spec):
    """The base of a net from outside: a spec with a `kind` and `build`. What is set here dumo's own nets may choose."""

    build: ClassVar[Callable[..., Any]]  # (needs, shape, classes) -> nn.Module, called as net(x, c, t=t ...)
    precondition: ClassVar[str] = "none"
    texts: ClassVar[None] = None
    augment: ClassVar[int] = 0
    lora: ClassVar[None] = None
    checkpoint: ClassVar[None] = None
    time_scale: float = Field(default=1.0, gt=0)  # radians per unit of t of its quickest wave (`dumo.nets.embed`)


class DataSpec(Spec):
    """The base of data from outside: a spec with a `kind`, `shape`, `classes` and `open`, which gives a `Source`."""

    shape: ClassVar[tuple[int, ...]]
    open: ClassVar[Callable[..., Any]]
    captions: ClassVar[None] = None
    augment: ClassVar[None] = None
    names: ClassVar[tuple[str, ...]] = ()
    classes: ClassVar[int] = 0

    @property
    def labels(self) -> int:
        """How many classes there are: they have no captions."""
        return self.classes

    def originals(self) -> Any:  # noqa: ANN401, a source
        """The images or points themselves."""
        return self.open()
