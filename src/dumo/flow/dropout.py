"""Dropout whose masks are a function of the row, the step and the layer: a pass draws nothing.

In the order of events: `keys` makes a key for each row of a step's batch; `using` holds them around the step, inside it
`rows` around a pass of some rows and `off` around a pass that drops nothing; a net asks `current` once per pass, gives
each layer its `layer_keys`, and the layer calls `drop` (or `keep_mask`, or `hashes` for other choices).

Each row of the global batch has a key per step, from a stream of its own. A layer's mask of that row is a hash of key,
layer and place. So every pass of a step in training meets the same masks, whichever rows it is made of and however
often it is made again; two ranks equal one, any split of the batch equals the whole, and a mask is the same on every
device. An average of the weights as theta^- drops nothing: it is in the mode of sampling.

    with using(keys(seed, step, len(x))[rows]):  # the training step, for its rows of the batch
        loss(...)  # in it: `rows(...)` around a pass of some rows, `off()` around the null pass

`off` is about dropout alone: token routing (`dumo.nets.route`) uses the same keys, and goes on inside.

The net takes the keys once per pass, by `current`, and hands each layer its own, by `layer_keys`, as an argument: what
is computed again by checkpointing, after the step has left these contexts, meets the same masks too.

Keys are a state of the thread, not an argument: between the step and the layers are losses, slopes and nets of users
and of other libraries, whose calls have no place for them. None is forgotten unseen: a net that drops raises where
nobody set keys, nor `off`, and where there are keys for another number of rows than the pass has.
"""

import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dumo.runtime.random import stream
from dumo.types import Array

Keys = Int[Tensor, "b 2"]  # two numbers of 32 bits per row

_LEVELS = 1 << 16  # ours: a probability is rounded to a multiple of 1 / _LEVELS
_GOLDEN = -1640531527  # 2^32 / golden ratio as a signed number: layers differ by its multiples (Knuth's hash)


class _State(threading.local):
    """The keys that hold in a thread. All fields exist from its start: one added later would make torch recompile."""

    def __init__(self) -> None:
        self.keys: Keys | None = None
        self.is_set = False  # whether a caller said what the keys are
        self.drops = True  # False: inside `off`


_state = _State()


def keys(seed: int, step: int, batch: int) -> Keys:
    """The keys of all rows of the global batch at this step."""
    return torch.randint(-(2**31), 2**31, (batch, 2), generator=stream(seed, step, "dropout"), dtype=torch.int32)


@contextmanager
def using(rows: Keys | None, *, known: bool = True, drops: bool = True) -> Generator[None, None, None]:
    """Inside, nets in training drop and route by these keys, one for each row of a pass; None: they do neither.

    `known`: whether that is so because the caller says it; if not, a net that drops or routes raises. Without `drops`
    nothing is dropped.
    """
    before = _state.keys, _state.is_set, _state.drops
    _state.keys, _state.is_set, _state.drops = rows, known, drops
    try:
        yield
    finally:
        _state.keys, _state.is_set, _state.drops = before


def rows(rows: Sequence[int] | Int[Tensor, " k"]) -> AbstractContextManager[None]:
    """Inside, passes are of these rows of the surrounding `using` alone."""
    all_keys = _state.keys
    some_keys = None if all_keys is None else all_keys[rows]
    return using(some_keys, known=_state.is_set, drops=_state.drops)


def off() -> AbstractContextManager[None]:
    """Inside, nothing is dropped. Tokens are routed as before."""
    return using(_state.keys, drops=False)


def current(n: int, *, route: bool = False) -> Keys | None:
    """The keys for a pass of n rows; None inside `off`, except to `route` by, and where none are wanted.

    Raises RuntimeError where nobody set any, or for other rows.
    """
    pass_keys = _state.keys if _state.drops or route else None
    if not _state.is_set:
        raise RuntimeError(
            "a net in training drops or routes, and has no keys: make the pass inside `dropout.using(...)` or off()"
        )
    if pass_keys is not None and len(pass_keys) != n:
        raise RuntimeError(
            f"a pass of {n} rows has dropout keys for {len(pass_keys)}: make it inside `dropout.rows(...)`"
        )
    return pass_keys


def layer_keys(rows: Keys, layer: int) -> Keys:
    """The keys of a layer, by its number in the net: each layer must have another."""
    return rows + layer * _GOLDEN % 2**31


def drop(h: Array, rows: Keys, p: float) -> Array:
    """h (b, ...), each value zero with probability p, else divided by 1 - p, so that its mean stays."""
    scale = _LEVELS / (_LEVELS - round(p * _LEVELS))
    return h * keep_mask(rows, h.shape[1:], p) * scale


@torch.no_grad()
def keep_mask(rows: Keys, shape: Sequence[int], p: float) -> Bool[Tensor, "b ..."]:
    """Which values of shape (b, *shape) stay: those whose 16 bits, hashed from key and place, are not the lowest."""
    n = prod(shape)
    lowest_kept = round(p * _LEVELS) - _LEVELS // 2  # int16 counts from -_LEVELS / 2
    bits = hashes(rows, (n + 1) // 2).view(torch.int16)  # two numbers of 16 bits from one of 32
    return (bits[:, :n] >= lowest_kept).view(-1, *shape)


@torch.no_grad()
def hashes(rows: Keys, n: int) -> Int[Tensor, "b n"]:
    """A number of 32 bits for each of n places of a row. No two of a row are equal: each step here is a bijection."""
    step, start = _mix(rows).unsqueeze(-1).unbind(1)
    places = torch.arange(n, dtype=torch.int32, device=rows.device)
    return _mix(places * (step | 1) + start)


def _mix(x: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """A bijection of numbers of 32 bits that looks random (`lowbias32`, C. Wellons 2018). Products wrap around."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ (x >> 16 & 0xFFFF)
