"""Changes to what a program reads: of bytes, as disks and lines make them; of values, as people and enemies do."""

import json
import random
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

EXTREMES: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e-308, 1e38, 1e308, float("nan"), float("inf")),
    *(
        None,
        True,
        False,
        "",
        "x",
        "x" * 10_000,
        "\0",
        "\x1b[2J",
        "\ud800",
        "nan",
        "1e5",
        "../../x",
        "/dev/zero",
        "~nobody/x",
    ),
    *([], {}, [[]], [1, 2], {"kind": "x"}, {"a": {"b": 1}}),
)
NUMBER = re.compile(rb"\d+")
NUMBERS = (b"0", b"-1", b"1e999", b"9" * 20, b"9" * 5000, b"NaN", b"0x10", b"1_0", b"")
Bytes = Callable[[bytearray, random.Random], bytearray]


def mutated(data: bytes, g: random.Random) -> bytes:
    """One to four changes, each of one of the kinds below."""
    out = bytearray(data)
    for _ in range(g.choice((1, 1, 2, 4))):
        out = g.choice(KINDS)(out, g)
    return bytes(out)


def span(data: bytearray, g: random.Random, most: int = 64) -> slice:
    """A few bytes somewhere."""
    start = g.randrange(len(data) + 1)
    return slice(start, min(len(data), start + g.randint(1, most)))


def flip(data: bytearray, g: random.Random) -> bytearray:
    """One bit."""
    if data:
        data[g.randrange(len(data))] ^= 1 << g.randrange(8)
    return data


def head(data: bytearray, g: random.Random) -> bytearray:
    """A bit among the first bytes, where sizes stand."""
    if data:
        data[g.randrange(min(len(data), 64))] ^= 1 << g.randrange(8)
    return data


def cut(data: bytearray, g: random.Random) -> bytearray:
    """The end, or a span, is gone."""
    part = slice(g.randrange(len(data) + 1), None) if g.random() < 0.5 else span(data, g)
    del data[part]
    return data


def insert(data: bytearray, g: random.Random) -> bytearray:
    """A few bytes that were not there."""
    place = span(data, g).start
    data[place:place] = g.choice(
        (g.randbytes(g.randint(1, 16)), b"\0", b"\xff", b"[" * 2000, b"{", b'"', b"\n", b"&a *a ")
    )
    return data


def zero(data: bytearray, g: random.Random) -> bytearray:
    """A span of zeros, as a disk leaves it."""
    part = span(data, g)
    data[part] = bytes(part.stop - part.start)
    return data


def double(data: bytearray, g: random.Random) -> bytearray:
    """A span stands there twice."""
    part = span(data, g)
    data[part.start : part.start] = data[part]
    return data


def number(data: bytearray, g: random.Random) -> bytearray:
    """A number is another one."""
    if found := list(NUMBER.finditer(data)):
        match = g.choice(found)
        data[match.start() : match.end()] = g.choice(NUMBERS)
    return data


KINDS: tuple[Bytes, ...] = (flip, head, cut, insert, zero, double, number, number)


def paths(value: object) -> Iterator[tuple[Any, Any]]:
    """Every place of a value: the mapping or list it is in, and its key."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from paths(inner)


def extreme(g: random.Random) -> Any:  # noqa: ANN401
    """One of them, for itself."""
    return deepcopy(g.choice(EXTREMES))


def replaced(value: object, g: random.Random) -> object:
    """The value with one place or two lost, or holding what nobody expects there."""
    value = json.loads(json.dumps(value))
    for _ in range(g.choice((1, 1, 2))):
        if not (places := list(paths(value))) or g.random() < 0.02:
            return extreme(g)
        holder, key = g.choice(places)
        if g.random() < 0.2:
            del holder[key]
        elif g.random() < 0.1 and isinstance(holder, dict):
            holder[g.choice(("", "x", "\0", "kind", "x" * 1000))] = extreme(g)
        else:
            holder[key] = extreme(g)
    return value
