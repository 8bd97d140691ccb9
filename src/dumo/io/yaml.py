"""Read and write YAML of plain values: null, true and false, numbers, texts, lists and mappings.

`parse_yaml` reads a text, `parse_mapping` the text of a file of settings, and `dump_yaml` writes one. The texts are
files and overrides that anybody may have written, and a short text can ask for much: aliases of aliases (a billion
laughs), brackets in brackets, numbers of a million digits. So `parse_yaml`

1. counts the parser's events, and refuses a text whose values would be too deep or too large (`_check_size`);
2. compares the keys of each mapping, and refuses a key that occurs twice, for one of its two values would be lost;
3. makes the values.

The language is YAML 1.1, as PyYAML reads it, but for two things: 1e-4 is a number, as in YAML 1.2 and JSON, and a date
is a text.
"""

import re
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from dumo.error import UserError
from dumo.io.read import brief

if TYPE_CHECKING:
    FastLoader = yaml.SafeLoader
else:
    FastLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may be built without it

# All ours
MAX_DEPTH = 64  # lists and mappings inside one another; a run has 8
MAX_DIGITS = 400  # characters of a number; a double needs 24, and at most 308 digits before the point
_MAX_EXPANSION = 100_000  # characters that aliases may make of a text, beyond four times its own
MAX_SLOW_CHARACTERS = 100_000  # of a text that the Python reader reads, which is slow
_MAX_ERROR_CHARACTERS = 1000  # of PyYAML's message that is shown

TAG = "tag:yaml.org,2002:"  # of YAML's own types
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")  # without a point or a sign it is text in 1.1
_EXPONENT_STARTS = list("-+0123456789")  # the first characters of what may match


def parse_yaml(text: str) -> Any:  # noqa: ANN401, whatever stands there
    """The values in a text. Raises yaml.YAMLError for what is not YAML, or asks for too much.

    The C reader comes first. What it refuses goes to the Python reader, which knows more escapes.
    """
    try:
        return _construct(text, _FastReader)
    except yaml.YAMLError:
        if len(text) > MAX_SLOW_CHARACTERS:
            raise
        return _construct(text, _SlowReader)


def parse_mapping(text: str, name: str, content: str, example: str) -> dict[str, Any]:
    """The mapping of names to values in the text of a file, whose `name` begins an error.

    Raises UserError for what is not YAML, and for other values, which are no `content`, such as "run"; `example` ends
    this message, such as "as docs/compare.md has them".
    """
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        one_line = " ".join(str(error).split())
        raise UserError(f"{name} is not YAML: {brief(one_line, _MAX_ERROR_CHARACTERS)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name} holds no {content}: it must map names to values, {example}")
    return tree


def dump_yaml(value: object, *, flow: bool = False, width: int = 120) -> str:
    """Plain values as a text that `parse_yaml` reads back, in lines of about `width` characters.

    `flow`: lists in brackets and mappings in braces, as in JSON, with keys sorted.
    """
    return yaml.dump(value, Dumper=_Writer, default_flow_style=flow, width=width, sort_keys=flow, allow_unicode=True)


def _construct(text: str, reader: "type[_FastReader | _SlowReader]") -> Any:  # noqa: ANN401
    """The values in a text, by one of the two readers. Raises yaml.YAMLError."""
    try:
        _check_size(text, reader)
        return yaml.load(text, reader)
    except ValueError as error:  # no number, or no text that has an encoding
        raise yaml.YAMLError(str(error)) from error


def _check_size(text: str, reader: "type[_FastReader | _SlowReader]") -> None:
    """Raise yaml.YAMLError where the values would be deeper or larger than anyone means.

    The size of a value is about the characters that it takes with each alias written out. Nothing is written out here:
    an alias adds the size of its anchor.
    """
    max_size = 4 * len(text) + _MAX_EXPANSION
    size_by_anchor: dict[str, int] = {}
    open_sizes = [0]  # so far: of the whole text, then of each list or mapping that has not ended
    open_anchors: list[str | None] = []  # of each list or mapping that has not ended; None: it has none
    for event in yaml.parse(text, reader):
        if isinstance(event, yaml.AliasEvent):
            open_sizes[-1] += size_by_anchor.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            size = 1 + len(event.value)
            open_sizes[-1] += size
            if event.anchor:
                size_by_anchor[event.anchor] = size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_sizes.append(1)
            open_anchors.append(event.anchor)
            if event.anchor:
                size_by_anchor[event.anchor] = max_size + 1  # an alias inside its own anchor has no end
        elif isinstance(event, yaml.CollectionEndEvent):
            size = open_sizes.pop()
            open_sizes[-1] += size
            anchor = open_anchors.pop()
            if anchor:
                size_by_anchor[anchor] = size
        if len(open_anchors) > MAX_DEPTH:
            raise yaml.YAMLError(f"lists and mappings lie more than {MAX_DEPTH} deep")
        if open_sizes[-1] > max_size:
            raise yaml.YAMLError("its aliases would make far more of it than stands there: write the values out")


class _PlainConstructor(SafeConstructor):
    """How both readers make values of PyYAML's nodes.

    PyYAML calls the methods `construct_...`. Those it does not look up by name are in the table `yaml_constructors`.
    """

    def construct_document(self, node: yaml.Node) -> Any:  # noqa: ANN401
        """The values of a whole text. Raises ConstructorError where a mapping has a key twice.

        All keys are compared before the first value is made. Later it would be too late: PyYAML puts what `<<` merges
        into the nodes themselves, where a key and the one that it overrides look like a key that occurs twice.
        """
        self._require_distinct_keys(node)
        return super().construct_document(node)

    def _require_distinct_keys(self, node: yaml.Node) -> None:
        """Raise ConstructorError where a mapping, which is this node or lies in it, has a key twice.

        A node is visited once for each of its aliases: `_check_size` has bounded how often that is.
        """
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._require_distinct_keys(item)
        elif isinstance(node, yaml.MappingNode):
            keys: set[Hashable] = set()
            for key_node, value_node in node.value:
                key = self._comparable_key(key_node)
                if key is not None and key in keys:
                    raise _error_at(f"the key {brief(key_node.value)} stands there twice", key_node)
                keys.add(key)
                self._require_distinct_keys(value_node)

    def _comparable_key(self, node: yaml.Node) -> tuple[Hashable, ...] | None:
        """What is equal for equal keys, as 1 and 0x1 are; None for a key that PyYAML will refuse, such as a list."""
        if not isinstance(node, yaml.ScalarNode):
            return None
        if node.tag == f"{TAG}merge":
            return ("merge", node.value)  # `<<` is no key: its value is merged
        if node.tag == f"{TAG}value":
            return ("key", node.value)  # `=` as a key is a text
        key = self.construct_object(node)
        return ("key", key) if isinstance(key, Hashable) else None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """A text; two halves of a character, as JSON writes them, are put together, and one half is refused."""
        text = str(super().construct_scalar(node))
        if text.isascii():
            return text
        return text.encode("utf-16", "surrogatepass").decode("utf-16")

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """An integer or a float of at most MAX_DIGITS characters. Raises ConstructorError for any other text."""
        if len(node.value) > MAX_DIGITS:
            raise _error_at(f"a number of {len(node.value)} characters", node)
        construct = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        try:
            return construct(node)
        except (ValueError, IndexError) as error:
            raise _error_at(f"'{node.value}' is no number", node) from error

    def construct_truth_value(self, node: yaml.ScalarNode) -> bool:
        """True or False. Raises ConstructorError for a text that is neither."""
        if str(node.value).lower() not in self.bool_values:
            raise _error_at(f"'{brief(node.value)}' is neither true nor false", node)
        return self.construct_yaml_bool(node)

    yaml_constructors: ClassVar[dict[str, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride], PyYAML's
        **SafeConstructor.yaml_constructors,
        f"{TAG}int": construct_number,
        f"{TAG}float": construct_number,
        f"{TAG}bool": construct_truth_value,
        f"{TAG}timestamp": SafeConstructor.construct_yaml_str,
        # no plain values
        f"{TAG}binary": SafeConstructor.construct_undefined,
        f"{TAG}omap": SafeConstructor.construct_undefined,
        f"{TAG}pairs": SafeConstructor.construct_undefined,
        f"{TAG}set": SafeConstructor.construct_undefined,
    }


class _FastReader(_PlainConstructor, FastLoader):
    """The reader of the C library, where there is one: ten times as fast."""


class _SlowReader(_PlainConstructor, yaml.SafeLoader):
    """The reader in Python."""


class _Writer(yaml.SafeDumper):
    """The writer: puts a text in quotes that would be read as a number."""


def _error_at(problem: str, node: yaml.Node) -> yaml.YAMLError:
    """An error with the line and column of a node."""
    return ConstructorError(None, None, problem, node.start_mark)


# An exponent makes a number for both readers, so the writer must quote a text that looks like one.
_FastReader.add_implicit_resolver(f"{TAG}float", _EXPONENT, _EXPONENT_STARTS)
_SlowReader.add_implicit_resolver(f"{TAG}float", _EXPONENT, _EXPONENT_STARTS)
_Writer.add_implicit_resolver(f"{TAG}float", _EXPONENT, _EXPONENT_STARTS)
