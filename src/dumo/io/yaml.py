"""YAML as plain values: null, true and false, numbers, texts, lists and mappings; of files and overrides by anybody.

`parse` reads a text, `dump` writes one. A short text can ask for much: aliases of aliases (a billion laughs), brackets
in brackets, numbers of a million digits. So `parse` counts the events of a text before it makes any value of it.

It is YAML 1.1, which PyYAML reads, but for three things: 1e-4 is a number, as in YAML 1.2 and JSON; a date is a text;
and a key that occurs twice in one mapping is refused, for one of the two would be lost without a word.
"""

import re
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from dumo.io.read import brief

if TYPE_CHECKING:
    FastLoader = yaml.SafeLoader
else:
    FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may be built without it

# All ours
MAX_DEPTH = 64  # lists and mappings inside one another; a run has 8
MAX_DIGITS = 400  # characters of a number; a double needs 24, and at most 308 digits before the point
MAX_EXPANSION = 100_000  # characters that aliases may make of a text, beyond four times its own
MAX_SLOW_CHARACTERS = 100_000  # of a text that the Python reader reads, which is slow

TAG = "tag:yaml.org,2002:"  # of YAML's own types
EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")  # without a point or a sign it is text in 1.1


def parse(text: str) -> Any:  # noqa: ANN401, whatever stands there
    """The values in a text. Raises yaml.YAMLError for what is not YAML, or asks for too much.

    The C reader comes first. What it refuses goes to the Python reader, which knows more escapes.
    """
    try:
        return _construct(text, _FastReader)
    except yaml.YAMLError:
        if len(text) > MAX_SLOW_CHARACTERS:
            raise
        return _construct(text, _SlowReader)


def dump(value: object, *, flow: bool = False, width: int = 120) -> str:
    """Plain values as a text that `parse` reads back; `flow`: in brackets and braces, with keys sorted."""
    return yaml.dump(value, Dumper=_Writer, default_flow_style=flow, width=width, sort_keys=flow, allow_unicode=True)


def _construct(text: str, reader: "type[_FastReader | _SlowReader]") -> Any:  # noqa: ANN401
    """The values in a text, by one of the two readers. Raises yaml.YAMLError."""
    try:
        _check_size(text, reader)
        return yaml.load(text, reader)
    except ValueError as error:  # no number, or no text that has an encoding
        raise yaml.YAMLError(str(error)) from error


def _check_size(text: str, reader: "type[_FastReader | _SlowReader]") -> None:
    """Raise yaml.YAMLError where the values would be deeper or larger than anyone means."""
    sizes: dict[str | None, float] = {}  # characters of what has an anchor; infinite while that is open
    anchors: list[str | None] = []  # of each list or mapping that is open
    counts = [0.0]  # characters so far: of the whole, then of each list or mapping that is open
    max_characters = 4 * len(text) + MAX_EXPANSION
    for event in yaml.parse(text, reader):
        if isinstance(event, yaml.AliasEvent):
            counts[-1] += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor] = 1 + len(event.value)
            counts[-1] += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            anchors.append(event.anchor)
            sizes[event.anchor] = float("inf")
            counts.append(1)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = counts.pop()
            sizes[anchors.pop()] = size
            counts[-1] += size
        if len(anchors) > MAX_DEPTH:
            raise yaml.YAMLError(f"lists and mappings lie more than {MAX_DEPTH} deep")
        if counts[-1] > max_characters:
            raise yaml.YAMLError("its aliases would make far more of it than stands there: write the values out")


class _PlainConstructor(SafeConstructor):
    """How both readers make values of nodes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are all different; what `<<` merges into it may repeat a key."""
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in keys:
                raise _error_at(f"the key {brief(key.value)} stands there twice", key)
            keys.add(name)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """A text; two halves of a character, as JSON writes them, are put together, and one half is refused."""
        text = str(super().construct_scalar(node))
        if text.isascii():
            return text
        return text.encode("utf-16", "surrogatepass").decode("utf-16")

    def number(self, node: yaml.ScalarNode) -> int | float:
        """An integer or a float of at most MAX_DIGITS characters."""
        if len(node.value) > MAX_DIGITS:
            raise _error_at(f"a number of {len(node.value)} characters", node)
        construct = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        try:
            return construct(node)
        except (ValueError, IndexError) as error:
            raise _error_at(f"'{node.value}' is no number", node) from error

    def truth(self, node: yaml.ScalarNode) -> bool:
        """A boolean."""
        if str(node.value).lower() not in self.bool_values:
            raise _error_at(f"'{brief(node.value)}' is neither true nor false", node)
        return self.construct_yaml_bool(node)

    yaml_constructors: ClassVar[dict[str, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride], PyYAML's
        **SafeConstructor.yaml_constructors,
        **dict.fromkeys((f"{TAG}int", f"{TAG}float"), number),
        f"{TAG}bool": truth,
        f"{TAG}timestamp": SafeConstructor.construct_yaml_str,
        **dict.fromkeys(  # what is no plain value
            (f"{TAG}binary", f"{TAG}omap", f"{TAG}pairs", f"{TAG}set"),
            SafeConstructor.construct_undefined,
        ),
    }


class _FastReader(_PlainConstructor, FastLoader):
    """The reader of the C library, where there is one: ten times as fast."""


class _SlowReader(_PlainConstructor, yaml.SafeLoader):
    """The reader in Python."""


class _Writer(yaml.SafeDumper):
    """The writer: puts a text in quotes that would be read as a number."""


def _error_at(what: str, node: yaml.Node) -> yaml.YAMLError:
    """An error with the line and column of a node."""
    return ConstructorError(None, None, what, node.start_mark)


# in both readers an exponent makes a number, so the writer quotes such a text
for _class in (_FastReader, _SlowReader, _Writer):
    _class.add_implicit_resolver(f"{TAG}float", EXPONENT, list("-+0123456789"))
