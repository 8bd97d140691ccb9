"""The lines that refuse a field of a run: unknown, of an unknown kind, a text for a part, or a wrong value.

`dumo.config.outline` finds such fields without torch, and `dumo.config.error` in what pydantic refuses. Both write
their lines here, so that a mistake reads alike wherever it is found.
"""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from pydantic_core import ErrorDetails

from dumo.config import outline
from dumo.config.suggestion import nearest
from dumo.io.read import brief

_REMOVED = {  # by dotted path: what to write instead of a field of older runs
    "net.source": "pipeline names the folder now, of the model, its autoencoder, texts and scheduler: pipeline=DIR",
    "net.config": "pipeline has the hashes of its parts now: remove it",
}
_MAX_LINES = 20  # of a message: ours
# What pydantic says of JSON, in YAML's words.
_PLAIN_WORDS = {"a valid array": "a list", "an object": "a mapping of names to values"}


def lines_of(faults: Sequence[str], name: str) -> str:
    """The message of these lines, up to _MAX_LINES, each after the `name` of their source if that is a file's."""
    shown = [*faults[:_MAX_LINES]]
    if len(faults) > _MAX_LINES:
        shown.append(f"and {len(faults) - _MAX_LINES:,} more mistakes")
    prefix = f"{name}: " if Path(name).suffix else ""
    return "\n".join(prefix + text for text in "\n".join(shown).splitlines())


def unknown_key(path: str, name: str, valid: Iterable[str]) -> str:
    """Refuse a key `name`, the last of its dotted path, where `valid` ones stand."""
    if path in _REMOVED:
        return f"{path}: {_REMOVED[path]}"
    from dumo.config.foreign import ours

    hint = ours(name)
    if hint is None and path == name:  # at the top, where a person leaves out the part
        hint = _places_hint(name)
    return f"{path}: unknown key; {hint or nearest(name, sorted(valid))}"


def _places_hint(name: str) -> str:
    """Where a field of this name stands in a part; "": in none."""
    paths = outline.paths_of(name)
    return f"here it is {' or '.join(paths)}" if paths else ""


def unknown_kind(path: str, kind: str, kinds: Iterable[str]) -> str:
    """Refuse a kind of the part at a dotted path."""
    return f"{path}.kind: there is no '{brief(kind)}'; {nearest(kind, [*kinds])}"


def no_mapping(path: str, value: object, fields: Collection[str] = ()) -> str:
    """Refuse a value for the part at a dotted path. A text is taken for its source, if `fields` has one, else kind."""
    message = f"{path}: input should be a mapping of names to values; got {brief(repr(value))}"
    if isinstance(value, str):
        message += f"; write {_field_of_text(path, fields)}={brief(value)}"
    return message


def wrong_value(path: str, error: ErrorDetails, *, fields: Collection[str] | None = None) -> str:
    """Refuse a value as pydantic does; `fields` are those of the part that should stand there (None: no part)."""
    value = error["input"]
    message = error["msg"][0].lower() + error["msg"][1:]
    for json_word, plain_word in _PLAIN_WORDS.items():
        message = message.replace(json_word, plain_word)
    message = f"{path}: {message}; got {brief(repr(value))}"
    if isinstance(value, str) and fields is not None:
        message += f"; write {_field_of_text(path, fields)}={brief(value)}"
    elif isinstance(value, float) and error["type"] == "int_type" and value.is_integer():
        message += f"; write {value:.0f}"
    return message


def _field_of_text(path: str, fields: Collection[str]) -> str:
    """The dotted path of the field that a text for a whole part is meant for."""
    return f"{path}.source" if "source" in fields else f"{path}.kind"
