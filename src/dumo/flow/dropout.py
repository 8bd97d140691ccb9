"""Dropout with masks that are a function of the row, the step and the layer.

    with using(keys(seed, step, batch)[rows]):  # the training step, for its rows of the batch
        loss(...)  # uses `rows(...)` around a pass of some rows, `off()` around a pass without dropout

1. `keys` draws a key for each row of a step's batch, and the training step enters `using` with the keys of its rows.
2. The loss makes passes of all rows, of some rows inside `rows`, or without dropout inside `off`.
3. In each pass, a network gets the keys from `current` and passes `layer_keys` to each layer.
4. The layer calls `drop`, `keep_mask` for the mask only, or `hashes` for other random choices. A mask is a hash of the
   row's key, the layer and the position in the row.

All training passes of a step therefore use the same masks, whichever rows they contain, and so does the recomputation
of a checkpointed block, which gets its keys as an argument. Masks do not depend on the number of ranks, the split of
the batch or the device. An average of the weights as theta^- is in evaluation mode and does not drop. `off` disables
dropout only: token routing (`dumo.nets.route`) uses the same keys and remains enabled.

Keys are thread state and not an argument, because losses, slopes and users' networks between the step and the layers
do not pass them on. A network that drops raises an error outside of `using` and `off`, and if the number of keys
differs from the number of rows of the pass.
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

# Two 32-bit numbers per row, as int32.
Keys = Int[Tensor, "b 2"]

# Probabilities are rounded to a multiple of 1 / _LEVELS (our choice).
_LEVELS = 1 << 16
# 2^32 / golden ratio as a signed number. The keys of layers differ by its multiples (Knuth's hash).
_GOLDEN = -1640531527


class _State(threading.local):
    """The keys of a thread. All fields exist from the start, because a new field would make torch recompile.

    keys: None disables dropout and routing.
    is_set: whether `using` or `off` is active.
    drops: whether dropout is enabled in addition to routing.
    """

    def __init__(self) -> None:
        self.keys: Keys | None = None
        self.is_set = False
        self.drops = True


_state = _State()


def keys(seed: int, step: int, batch: int) -> Keys:
    """Draw the keys of all rows of a step's global batch, (batch, 2)."""
    return torch.randint(-(2**31), 2**31, (batch, 2), generator=stream(seed, step, "dropout"), dtype=torch.int32)


def using(keys: Keys | None, *, drops: bool = True) -> AbstractContextManager[None]:
    """Use these keys (b, 2), one per row of a pass, for dropout and routing of networks in training mode.

    keys: None disables dropout and routing.
    drops: whether dropout is enabled in addition to routing.
    """
    return _state_set(keys, is_set=True, drops=drops)


def rows(places: Sequence[int] | Int[Tensor, " k"]) -> AbstractContextManager[None]:
    """Select the keys of some rows of the surrounding `using`, for a pass of these rows."""
    some_keys = None if _state.keys is None else _state.keys[places]
    return _state_set(some_keys, is_set=_state.is_set, drops=_state.drops)


def off() -> AbstractContextManager[None]:
    """Disable dropout. Token routing remains enabled."""
    return _state_set(_state.keys, is_set=True, drops=False)


@contextmanager
def _state_set(keys: Keys | None, *, is_set: bool, drops: bool) -> Generator[None, None, None]:
    """Set the thread's state, and restore it afterwards."""
    before = _state.keys, _state.is_set, _state.drops
    _state.keys, _state.is_set, _state.drops = keys, is_set, drops
    try:
        yield
    finally:
        _state.keys, _state.is_set, _state.drops = before


def current(n: int, *, route: bool = False) -> Keys | None:
    """Return the keys for a pass of n rows, (n, 2), or None if dropout is disabled.

    route: return the keys for routing, which `off` does not disable.

    Raises RuntimeError outside of `using` and `off`, and if the number of keys is not n.
    """
    pass_keys = _state.keys if _state.drops or route else None
    if not _state.is_set:
        raise RuntimeError(
            "a network with dropout or routing is in training mode without keys: call it inside `dropout.using(...)` "
            "or `dropout.off()`"
        )
    if pass_keys is not None and len(pass_keys) != n:
        raise RuntimeError(
            f"a pass of {n} rows has dropout keys for {len(pass_keys)}: call the network inside `dropout.rows(...)`"
        )
    return pass_keys


def layer_keys(keys: Keys, layer: int) -> Keys:
    """Return the keys of a layer. Each layer of a network must have a different number."""
    return keys + layer * _GOLDEN % 2**31


def drop(h: Array, keys: Keys, p: float) -> Array:
    """Zero each value of h (b, ...) with probability p, and divide the rest by 1 - p."""
    scale = _LEVELS / (_LEVELS - round(p * _LEVELS))
    return h * keep_mask(keys, h.shape[1:], p) * scale


@torch.no_grad()
def keep_mask(keys: Keys, shape: Sequence[int], p: float) -> Bool[Tensor, "b ..."]:
    """Return the mask (b, *shape) of the values to keep, each with probability 1 - p."""
    n = prod(shape)
    # int16 starts at -_LEVELS / 2.
    lowest_kept = round(p * _LEVELS) - _LEVELS // 2
    # Each 32-bit hash gives two 16-bit numbers.
    bits = hashes(keys, (n + 1) // 2).view(torch.int16)
    return (bits[:, :n] >= lowest_kept).view(-1, *shape)


@torch.no_grad()
def hashes(keys: Keys, n: int) -> Int[Tensor, "b n"]:
    """Return a 32-bit hash for each of n positions of a row, (b, n) in int32.

    The hashes of a row are distinct, because each operation is a bijection of 32-bit numbers: `_mix`, the product with
    an odd number, and the sum.
    """
    step, start = _mix(keys).unsqueeze(-1).unbind(1)
    places = torch.arange(n, dtype=torch.int32, device=keys.device)
    return _mix(places * (step | 1) + start)


def _mix(x: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Hash 32-bit numbers by the bijection `lowbias32` (C. Wellons 2018).

    The masks clear the copies of the sign bit that a shift of int32 inserts.
    """
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975  # 0x846CA68B as a signed number
    return x ^ (x >> 16 & 0xFFFF)
