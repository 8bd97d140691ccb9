"""Changes to what a program reads: of bytes, as disks and lines make them; of values, as people and enemies do.

`change_bytes` changes a file's bytes, by one of the functions in BYTE_CHANGES or several. `change_values` replaces or
drops a value anywhere in a tree of JSON's. `places` lists where the values of a tree are.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

EXTREME_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-308, 1e38, 1e308, float("nan"), float("inf"))
EXTREME_TEXTS = ("", "x", "x" * 10_000, "\0", "\x1b[2J", "\ud800", "nan", "1e5", "../../x", "/dev/zero", "~nobody/x")
EXTREME_TREES: tuple[Any, ...] = ([], {}, [[]], [1, 2], {"kind": "x"}, {"a": {"b": 1}})
EXTREMES: tuple[Any, ...] = (*EXTREME_NUMBERS, None, True, False, *EXTREME_TEXTS, *EXTREME_TREES)
EXTREME_KEYS = ("", "x", "\0", "kind", "x" * 1000)
NUMBER = re.compile(rb"\d+")
NUMBER_TEXTS = (b"0", b"-1", b"1e999", b"9" * 20, b"9" * 5000, b"NaN", b"0x10", b"1_0", b"")
INSERTED_BYTES = (b"\0", b"\xff", b"[" * 2000, b"{", b'"', b"\n", b"&a *a ")
HEADER_BYTES = 64  # at a file's start, where sizes stand
MAX_SPAN = 64  # bytes
ByteChange = Callable[[bytearray, random.Random], bytearray]


def change_bytes(data: bytes, g: random.Random) -> bytes:
    """Make one to four changes of BYTE_CHANGES."""
    out = bytearray(data)
    for _ in range(g.choice((1, 1, 2, 4))):
        out = g.choice(BYTE_CHANGES)(out, g)
    return bytes(out)


def _draw_span(data: bytearray, g: random.Random) -> slice:
    """A few bytes somewhere."""
    start = g.randrange(len(data) + 1)
    return slice(start, min(len(data), start + g.randint(1, MAX_SPAN)))


def _flip_bit(data: bytearray, g: random.Random) -> bytearray:
    if data:
        data[g.randrange(len(data))] ^= 1 << g.randrange(8)
    return data


def _flip_header_bit(data: bytearray, g: random.Random) -> bytearray:
    if data:
        data[g.randrange(min(len(data), HEADER_BYTES))] ^= 1 << g.randrange(8)
    return data


def _cut(data: bytearray, g: random.Random) -> bytearray:
    """Drop the end, or a span."""
    part = slice(g.randrange(len(data) + 1), None) if g.random() < 0.5 else _draw_span(data, g)
    del data[part]
    return data


def _insert(data: bytearray, g: random.Random) -> bytearray:
    place = _draw_span(data, g).start
    data[place:place] = g.choice((g.randbytes(g.randint(1, 16)), *INSERTED_BYTES))
    return data


def _zero_span(data: bytearray, g: random.Random) -> bytearray:
    """Zeros, as a disk leaves them."""
    part = _draw_span(data, g)
    data[part] = bytes(part.stop - part.start)
    return data


def _double_span(data: bytearray, g: random.Random) -> bytearray:
    part = _draw_span(data, g)
    data[part.start : part.start] = data[part]
    return data


def _replace_number(data: bytearray, g: random.Random) -> bytearray:
    numbers = list(NUMBER.finditer(data))
    if numbers:
        match = g.choice(numbers)
        data[match.start() : match.end()] = g.choice(NUMBER_TEXTS)
    return data


BYTE_CHANGES: tuple[ByteChange, ...] = (  # numbers twice as often
    _flip_bit,
    _flip_header_bit,
    _cut,
    _insert,
    _zero_span,
    _double_span,
    _replace_number,
    _replace_number,
)


def places(tree: object) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree: the dict or list that it is in, and its key or index."""
    if not isinstance(tree, dict | list):
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        yield from places(value)


def change_values(tree: object, g: random.Random) -> object:
    """A copy of a tree with one value or two gone, replaced by one of EXTREMES, or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(g.choice((1, 1, 2))):
        tree_places = list(places(tree))
        if not tree_places or g.random() < 0.02:
            return _draw_extreme(g)
        holder, key = g.choice(tree_places)
        if g.random() < 0.2:
            del holder[key]
        elif g.random() < 0.1 and isinstance(holder, dict):
            holder[g.choice(EXTREME_KEYS)] = _draw_extreme(g)
        else:
            holder[key] = _draw_extreme(g)
    return tree


def _draw_extreme(g: random.Random) -> Any:  # noqa: ANN401, any value
    """One of EXTREMES, as a copy that may be changed again."""
    return deepcopy(g.choice(EXTREMES))
