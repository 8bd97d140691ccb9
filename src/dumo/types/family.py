"""A family of specs as a table of names: a member's module is imported when its `kind` is read, and not before.

    FAMILY = SpecFamily({"dit": "dumo.nets.dit:DiT", "mlp": "dumo.nets.mlp:MLP"}, base=NetSpec)
    Net = Annotated[Spec, FAMILY]

For a field of such an annotation pydantic calls `_validate`, which reads the kind, imports that member and validates by
it. Errors are those of a tagged union, with the kind in their location. `members` imports all. `LazySpec` does so for a
field that most runs leave null, and of which there is one class.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, SchemaValidator, core_schema, to_json

from dumo.types import Spec, UserError
from dumo.types.outside import TAG, import_class, kind_of, name_of

_OUTSIDE_SCHEMA = core_schema.typed_dict_schema(  # what a JSON schema says of a class from outside
    {"kind": core_schema.typed_dict_field(core_schema.str_schema(pattern=":"))}, extra_behavior="allow"
)


def import_name(name: str) -> Any:  # noqa: ANN401, what the name says
    """Import `module:Class`."""
    module, _, class_name = name.partition(":")
    return getattr(import_module(module), class_name)


def is_instance_of(value: object, name: str) -> bool:
    """Whether a value is of class `module:Class`, without importing that: before it is imported, no value is."""
    module_name, _, class_name = name.partition(":")
    module = sys.modules.get(module_name)
    return module is not None and isinstance(value, getattr(module, class_name))


def lazy_names(package: str, names: Iterable[str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package, so that it has these classes, `module:Class`, and imports one when it is used."""
    by_class = {name.partition(":")[2]: name for name in names}

    def import_attribute(class_name: str) -> Any:  # noqa: ANN401, one of the classes
        if class_name not in by_class:
            raise AttributeError(f"module '{package}' has no attribute '{class_name}'")
        return import_name(by_class[class_name])

    return import_attribute


@dataclass(frozen=True, eq=False)
class SpecFamily:
    """In the annotation of a field: the specs that may stand there, and the base of those that users write."""

    names: Mapping[str, str]  # module:Class by kind
    base: type[Spec] | None = None  # None: no class from outside may stand there

    def load(self, kind: str) -> type[Spec]:
        """Import the member of this kind."""
        return import_name(self.names[kind])

    def members(self) -> tuple[type[Spec], ...]:
        """Import all members: each once, in the order of the table."""
        return tuple(dict.fromkeys(self.load(kind) for kind in self.names))

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by `_validate`; a spec is written as its own class says."""
        return core_schema.with_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A choice for each kind, all imported, and one for a class from outside."""
        choices = {kind: self.load(kind).__pydantic_core_schema__ for kind in self.names}
        if self.base is not None:
            choices[TAG] = _OUTSIDE_SCHEMA
        return handler(self._union(choices))

    def _validate(self, value: Any, info: ValidationInfo) -> Spec:  # noqa: ANN401, a spec or a tree
        """The spec that a tree describes, or that is given. Raises pydantic's errors of a tagged union."""
        if info.mode == "python":
            self._kind_validator.validate_python(value)
            return self._validator(kind_of(value)).validate_python(value)
        # As text again, for a list of JSON may be a tuple. dumo reads all JSON strictly (`dumo.config.load`).
        text = to_json(value, inf_nan_mode="constants")
        self._kind_validator.validate_json(text)
        return self._validator(kind_of(value)).validate_json(text, strict=True)

    @cached_property
    def _kind_validator(self) -> SchemaValidator:
        """Checks that there is a kind, and one of this family. Imports no member."""
        tags = [*self.names] if self.base is None else [*self.names, TAG]
        return SchemaValidator(self._union({tag: core_schema.any_schema() for tag in tags}))

    @cache  # noqa: B019, a family lives as long as its package
    def _validator(self, tag: str) -> SchemaValidator:
        """A tagged union of one member, so that an error's location has the tag. Imports the member."""
        if tag == TAG:
            return SchemaValidator(self._union({TAG: core_schema.no_info_plain_validator_function(self._from_outside)}))
        return SchemaValidator(self._union({tag: self.load(tag).__pydantic_core_schema__}))

    def _union(self, choices: dict[str, CoreSchema]) -> CoreSchema:
        """A union that `kind` tells apart; a kind `module:Class` is its choice TAG, where there may be one."""
        return core_schema.tagged_union_schema(choices, discriminator="kind" if self.base is None else kind_of)

    def _from_outside(self, value: Any) -> Spec:  # noqa: ANN401, a spec or a tree
        """The spec of a class from outside. Raises UserError where that does not keep the contract of `base`."""
        assert self.base is not None
        cls = type(value) if isinstance(value, Spec) else import_class(value["kind"])
        is_below_member = any(name_of(parent) in self.names.values() for parent in cls.__mro__)
        if not (is_below_member or issubclass(cls, self.base)):
            raise UserError(
                f"kind '{name_of(cls)}' is not of its family: make it a class of {name_of(self.base).replace(':', '.')}"
            )
        if isinstance(value, Spec):
            return value
        try:
            return cls.model_validate_json(to_json(value, inf_nan_mode="constants"), strict=True)
        except TypeError as error:  # it is abstract
            raise UserError(f"kind '{name_of(cls)}': {error}") from error


@dataclass(frozen=True, eq=False)
class LazySpec:
    """In the annotation of a field: one spec, `module:Class`, which is imported when a value stands there.

    Teacher = Annotated[Any, LazySpec("dumo.config.teacher:Teacher")]
    teacher: Teacher | None = None
    """

    name: str

    def load(self) -> type[Spec]:
        """Import the class."""
        return import_name(self.name)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by `_validate`; the spec is written as its own class says."""
        return core_schema.with_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The class's own, as a choice of one: pydantic gives a choice its place among the definitions."""
        return handler(core_schema.union_schema([self.load().__pydantic_core_schema__]))

    def _validate(self, value: Any, info: ValidationInfo) -> Spec:  # noqa: ANN401, a spec or a tree
        """The spec that a tree describes, or that is given. Raises pydantic's errors."""
        if info.mode == "python":
            return self.load().model_validate(value)
        return self.load().model_validate_json(to_json(value), strict=True)


def family_of(annotation: object) -> SpecFamily | None:
    """The first family that an annotation names, at any depth."""
    if isinstance(annotation, SpecFamily):
        return annotation
    for part in get_args(annotation):
        family = family_of(part)
        if family is not None:
            return family
    return None


def members(union: object) -> tuple[type[Spec], ...]:
    """The specs of a union by kind, but for the base of classes from outside; all are imported."""
    family = family_of(union)
    if family is not None:
        return family.members()
    return get_args(get_args(union)[0])
