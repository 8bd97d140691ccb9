"""What a piece of work on tensors takes, whatever it is: floating-point operations, and bytes alive at one time.

Both depend on shapes alone, so tensors may be on the meta device, or fake.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Bytes(NamedTuple):
    """Bytes of tensors that a piece of work met: those there before it, and most of its own alive at one time."""

    before: int
    peak: int


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and convolutions, on whatever device they are."""
    aten = torch.ops.aten
    missing = {  # from torch's own table; that a fused backward computes the scores again is not counted
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, v, *__, **___: 2 * _attention(q, v),
        aten.addmm_: lambda _, a, b, *__, **___: 2 * prod(a) * b[-1],
        aten.baddbmm_: lambda _, a, b, *__, **___: 2 * prod(a) * b[-1],
        aten.convolution_backward: _convolved_back,  # torch's does not know of groups
    }
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        work()
    return counter.get_total_flops()


def live_bytes(work: Callable[[], object]) -> Bytes:
    """Follow the bytes of all tensors that a piece of work meets, on whatever device they are, fake ones too."""
    with _Live() as live:
        work()
    return Bytes(live.before, live.peak)


class _Live(TorchDispatchMode):
    """Sees every operation beneath autograd, backward passes included, and so every storage on its way in or out."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.now = self.peak = 0
        self._known: dict[int, int] = {}  # storages alive: bytes that count in `now`

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation. A storage first seen going in was there before; one first seen coming out is new."""
        for storage in _storages((args, kwargs)):
            if self._meet(storage, 0):
                self.before += storage.nbytes()
        out = func(*args, **kwargs or {})
        for storage in _storages(out):
            self._meet(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _meet(self, storage: torch.UntypedStorage, size: int) -> bool:
        """Whether a storage is seen for the first time; it counts `size` bytes until the last tensor on it is gone."""
        if storage._cdata in self._known:
            return False
        self._known[storage._cdata] = size
        self.now += size
        weakref.finalize(storage, self._leave, storage._cdata).atexit = False
        return True

    def _leave(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))


def _convolved_back(
    grad: Sequence[int],
    x: Sequence[int],
    w: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    mask: Sequence[bool],
    **_: object,
) -> int:
    """Each of the gradients of input and weights takes what the convolution took; w is (out, in / groups, ...)."""
    places = x if transposed else grad
    return sum(mask[:2]) * 2 * places[0] * prod(places[2:]) * prod(w)


def _attention(q: Sequence[int], v: Sequence[int]) -> int:
    """Scores and their product with the values; q is (b, heads, n, d), v (b, heads, m, d)."""
    return 2 * prod(q[:-1]) * v[-2] * (q[-1] + v[-1])
