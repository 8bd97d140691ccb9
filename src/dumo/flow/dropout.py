"""Dropout whose masks are a function of the row, the step and the layer: a pass draws nothing.

    with using(keys(seed, step, batch)[rows]):  # the training step, for its rows of the batch
        loss(...)  # in it: `rows(...)` around a pass of some rows, `off()` around a pass that drops nothing

The order of events:

1. `keys` draws a key for each row of a step's batch, and the step enters `using` with those of its rows.
2. The loss makes passes: of all rows, of some inside `rows`, without dropout inside `off`.
3. A net asks for the keys once per pass, by `current`, and gives each layer its `layer_keys` as an argument.
4. The layer calls `drop`, or `keep_mask` for the mask alone, or `hashes` for other choices. A mask is a hash of the
   row's key, the layer and the place in the row.

So every pass of a step in training meets the same masks, whichever rows it is made of. So does a block that
checkpointing computes again, after the step has left these contexts, because it got its keys as an argument. Two ranks
equal one, any split of the batch equals the whole, and a mask is the same on every device. An average of the weights as
theta^- drops nothing, because it is in evaluation mode. `off` turns off dropout alone: token routing
(`dumo.nets.route`) uses the same keys, and goes on inside.

Keys are a state of the thread, not an argument: between the step and the layers are losses, slopes and nets of users
and of other libraries, whose calls have no place for them. They cannot be forgotten in silence: a net that drops raises
where nobody entered `using` or `off`, and where the keys are those of another number of rows than the pass has.
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

Keys = Int[Tensor, "b 2"]  # two numbers of 32 bits per row, as int32

_LEVELS = 1 << 16  # ours: a probability is rounded to a multiple of 1 / _LEVELS
_GOLDEN = -1640531527  # 2^32 / golden ratio as a signed number: layers differ by its multiples (Knuth's hash)


class _State(threading.local):
    """The keys that hold in a thread. All fields exist from its start: one added later would make torch recompile."""

    def __init__(self) -> None:
        self.keys: Keys | None = None  # None: nets drop and route nothing
        self.is_set = False  # whether `using` or `off` is entered
        self.drops = True  # False: keys are for routing alone


_state = _State()


def keys(seed: int, step: int, batch: int) -> Keys:
    """The keys of all rows of a step's global batch, (batch, 2)."""
    return torch.randint(-(2**31), 2**31, (batch, 2), generator=stream(seed, step, "dropout"), dtype=torch.int32)


def using(keys: Keys | None, *, drops: bool = True) -> AbstractContextManager[None]:
    """Inside, nets in training drop and route by these keys, (b, 2), one for each row of a pass.

    keys: None: nets neither drop nor route.
    drops: whether they drop; else they route alone.
    """
    return _state_set(keys, is_set=True, drops=drops)


def rows(places: Sequence[int] | Int[Tensor, " k"]) -> AbstractContextManager[None]:
    """Inside, passes are of the rows at these places among those of the surrounding `using`."""
    some_keys = None if _state.keys is None else _state.keys[places]
    return _state_set(some_keys, is_set=_state.is_set, drops=_state.drops)


def off() -> AbstractContextManager[None]:
    """Inside, nothing is dropped. Tokens are routed as before."""
    return _state_set(_state.keys, is_set=True, drops=False)


@contextmanager
def _state_set(keys: Keys | None, *, is_set: bool, drops: bool) -> Generator[None, None, None]:
    """Inside, the thread has this state; afterwards that of before."""
    before = _state.keys, _state.is_set, _state.drops
    _state.keys, _state.is_set, _state.drops = keys, is_set, drops
    try:
        yield
    finally:
        _state.keys, _state.is_set, _state.drops = before


def current(n: int, *, route: bool = False) -> Keys | None:
    """The keys for a pass of n rows, (n, 2); None where nothing is to be dropped.

    `route`: ask for the keys of routing, which hold inside `off`, too. Raises RuntimeError outside of `using` and
    `off`, and where the keys are those of another number of rows.
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


def layer_keys(keys: Keys, layer: int) -> Keys:
    """The keys of a layer, by its number in the net: each layer must have another."""
    return keys + layer * _GOLDEN % 2**31


def drop(h: Array, keys: Keys, p: float) -> Array:
    """h (b, ...), each value zero with probability p, else divided by 1 - p, so that its mean stays."""
    scale = _LEVELS / (_LEVELS - round(p * _LEVELS))
    return h * keep_mask(keys, h.shape[1:], p) * scale


@torch.no_grad()
def keep_mask(keys: Keys, shape: Sequence[int], p: float) -> Bool[Tensor, "b ..."]:
    """Which values of shape (b, *shape) are not dropped, each with probability 1 - p."""
    n = prod(shape)
    lowest_kept = round(p * _LEVELS) - _LEVELS // 2  # int16 counts from -_LEVELS / 2
    bits = hashes(keys, (n + 1) // 2).view(torch.int16)  # two numbers of 16 bits from one of 32
    return (bits[:, :n] >= lowest_kept).view(-1, *shape)


@torch.no_grad()
def hashes(keys: Keys, n: int) -> Int[Tensor, "b n"]:
    """A number of 32 bits for each of n places of a row, (b, n) in int32.

    No two of a row are equal, since each step is a bijection of the numbers of 32 bits: `_mix`, the product with an odd
    number, the sum.
    """
    step, start = _mix(keys).unsqueeze(-1).unbind(1)
    places = torch.arange(n, dtype=torch.int32, device=keys.device)
    return _mix(places * (step | 1) + start)


def _mix(x: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """A bijection of numbers of 32 bits that looks random: `lowbias32` (C. Wellons 2018). Products wrap around.

    A shift of int32 copies the sign into the upper bits, which the masks clear.
    """
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ (x >> 16 & 0xFFFF)
