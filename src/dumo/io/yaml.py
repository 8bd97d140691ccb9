"""Read and write YAML of plain values: null, true and false, numbers, texts, lists and mappings.

The language is YAML 1.1, as PyYAML reads it, but for three things: 1e-4 is a number, as in YAML 1.2 and JSON; a date is
a text; and a mapping with a key twice is refused, since one of its two values would be lost without a word.
"""

import re
from typing import Any, cast

import yaml
from pydantic_core import PydanticSerializationError, to_jsonable_python
from yaml.constructor import ConstructorError

from dumo.error import UserError
from dumo.io.read import brief

TAG = "tag:yaml.org,2002:"  # of YAML's own types
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")  # without a point or a sign it is text in 1.1
_EXPONENT_STARTS = list("-+0123456789")  # the first characters of what may match


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader in C, which refuses duplicate keys."""

    def construct_document(self, node: yaml.Node) -> Any:  # noqa: ANN401, any YAML value
        """Return the values of a whole text.

        All keys are compared before the first value is made: PyYAML puts what `<<` merges into the nodes themselves,
        where a key and the one that it overrides would look like a key that occurs twice.
        """
        self._require_distinct_keys(node, set())
        return super().construct_document(node)

    def _require_distinct_keys(self, node: yaml.Node, seen: set[int]) -> None:
        """Raise ConstructorError if this node or a nested mapping has a duplicate key.

        `seen` has the ids of the nodes that were visited: an alias leads to the node of its anchor.
        """
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._require_distinct_keys(item, seen)
        elif isinstance(node, yaml.MappingNode):
            keys: set[tuple[str, str]] = set()
            for key_node, value_node in node.value:
                if isinstance(key_node, yaml.ScalarNode):
                    key = (key_node.tag, key_node.value)
                    if key in keys:
                        problem = f"the key {key_node.value} stands there twice"
                        raise ConstructorError(None, None, problem, key_node.start_mark)
                    keys.add(key)
                self._require_distinct_keys(value_node, seen)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes strings that `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{TAG}float", _EXPONENT, _EXPONENT_STARTS)
_Loader.add_constructor(f"{TAG}timestamp", _Loader.construct_yaml_str)


def parse_yaml(text: str) -> Any:  # noqa: ANN401, any YAML value
    """Parse YAML. Raises yaml.YAMLError for invalid YAML."""
    try:
        return yaml.load(text, _Loader)
    # Values that contradict their tag, such as `!!int x`, raise ValueError.
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error


def parse_mapping(text: str, name: str, content: str, example: str) -> dict[str, Any]:
    """Return the mapping of names to values in the text of a file.

    Raises UserError for invalid YAML and for other values. The message begins with the file's `name`, names the
    expected `content`, such as "run", and ends with an `example`.
    """
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        one_line = " ".join(str(error).split())
        raise UserError(f"{name} is not YAML: {one_line}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} is not a {content}: it must map names to values, {example}")
    return tree


def dump_yaml(value: object, *, flow: bool = False, width: int = 120) -> str:
    """Dump plain values as YAML for `parse_yaml`, in lines of about `width` characters.

    With `flow`, use JSON-like flow style with sorted keys.
    """
    options: dict[str, Any] = {"default_flow_style": flow, "width": width, "sort_keys": flow}
    text = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, **options)
    # PyYAML would write these two as they are, and read one as the end of a line, the other not at all.
    if "\x85" in text or "\ufeff" in text:
        text = yaml.dump(value, Dumper=_Dumper, allow_unicode=False, **options)
    return text


def yaml_text(value: object) -> str:
    """Return a value as YAML, on one line; numbers of NumPy and torch are written as those of Python.

    Raises PydanticSerializationError for a value that YAML does not have.
    """
    plain_value = to_jsonable_python(value, fallback=_plain_numbers)
    return dump_yaml(plain_value, flow=True, width=10_000).removesuffix("...\n").strip()


def _plain_numbers(value: object) -> object:
    """Return a number or an array of NumPy or torch as numbers of Python.

    Raises PydanticSerializationError for all else.
    """
    plain_value = value
    if hasattr(value, "tolist") and not isinstance(value, type):
        plain_value = cast(Any, value).tolist()
    if type(plain_value) is type(value):  # nothing was made plain; a long double stays one
        raise PydanticSerializationError(f"{brief(repr(value))} cannot be written as YAML")
    return plain_value
