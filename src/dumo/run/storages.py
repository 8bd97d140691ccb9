"""Track the storages that are alive while torch code runs, and their peak total bytes.

`LiveStorages` is a context manager that intercepts each operation below autograd, including backward passes:

1. A storage that first appears as an input existed before: its bytes count in `preexisting`.
2. A storage that first appears as an output is new: its bytes count in `now` until its last tensor is freed.
3. After each operation `peak` is the maximum of `now`.

Tensors may be on any device, and fake. A storage counts with its size when it is first seen, because training steps do
not resize storages. Temporary memory inside kernels is not tracked.

`watched` modules are also counted separately in `blocks`, from which `dumo.run.memory` extrapolates to deep nets.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class WatchedBlock:
    """The bytes of storages created in a block's forward passes."""

    # Currently alive.
    bytes_now: int = 0
    # Alive at the end of a forward pass with gradients (the maximum over passes).
    bytes_left_behind: int = 0
    # Alive at the peak of all storages.
    bytes_at_peak: int = 0


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages inside its context (see the module docstring)."""

    def __init__(self, watched: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
        """`watched` are the blocks to count separately, by path. They must not be nested."""
        super().__init__()
        self.preexisting = 0
        self.now = 0
        self.peak = 0
        self.blocks = {path: WatchedBlock() for path in watched}
        # The bytes that each living storage contributes to `now`, by id.
        self._bytes_by_storage: dict[int, int] = {}
        self._running_block: WatchedBlock | None = None
        for path, module in watched.items():
            module.register_forward_pre_hook(partial(self._begin_block, self.blocks[path]))
            # Recomputation ends a block early by an exception.
            module.register_forward_hook(partial(self._end_block, self.blocks[path]), always_call=True)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation, and count its storages."""
        # Skip the most frequent call on fake tensors, which creates no tensor.
        if func is torch.ops.prim.device.default:
            return func(*args)
        # The same view beneath autograd, and one that fake tensors cache.
        if func is torch.ops.aten._unsafe_view.default:
            func = torch.ops.aten.view.default
        for storage in _storages((args, kwargs)):
            is_new = self._track_if_new(storage, 0)
            if is_new:
                self.preexisting += storage.nbytes()
        output = func(*args, **kwargs or {})
        for storage in _storages(output):
            self._track_if_new(storage, storage.nbytes())
        if self.now > self.peak:
            self.peak = self.now
            for block in self.blocks.values():
                block.bytes_at_peak = block.bytes_now
        return output

    def _track_if_new(self, storage: torch.UntypedStorage, num_bytes: int) -> bool:
        """Count `num_bytes` for a new storage until its last tensor is freed. Return whether it was new."""
        # torch represents a living storage by a single object.
        key = id(storage)
        if key in self._bytes_by_storage:
            return False
        self._bytes_by_storage[key] = num_bytes
        self.now += num_bytes
        if self._running_block is not None:
            self._running_block.bytes_now += num_bytes
        weakref.finalize(storage, self._untrack, key, self._running_block).atexit = False
        return True

    def _untrack(self, key: int, block: WatchedBlock | None) -> None:
        """Stop counting a storage. `block` is the block that created it."""
        num_bytes = self._bytes_by_storage.pop(key)
        self.now -= num_bytes
        if block is not None:
            block.bytes_now -= num_bytes

    def _begin_block(self, block: WatchedBlock, *_: object) -> None:
        """Assign new storages to `block` from now on (forward pre-hook)."""
        assert self._running_block is None, "a watched block lies within another"
        self._running_block = block

    def _end_block(self, block: WatchedBlock, *_: object) -> None:
        """Record the bytes that `block` leaves behind (forward hook)."""
        self._running_block = None
        # Ignore recomputation in a backward pass, whose tensors are used at once.
        is_backward = torch._C._current_graph_task_id() != -1
        if torch.is_grad_enabled() and not is_backward:
            block.bytes_left_behind = max(block.bytes_left_behind, block.bytes_now)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in nested lists, tuples and dicts."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
