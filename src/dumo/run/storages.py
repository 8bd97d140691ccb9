"""Which storages are alive while torch runs some work, and how many bytes they have at most at one time.

`LiveStorages` is entered around the work. It sees each operation beneath autograd, those of backward passes included:

1. A storage that first comes as an input existed before the work: `preexisting` has its bytes.
2. A storage that first comes as an output is new: `now` has its bytes until the last tensor on it is gone.
3. After each operation `peak` is the most that `now` has been.

Tensors may be on any device, and fake. A storage counts by its size when it is first seen: nothing resizes one in a
training step. What a kernel allocates for itself while it runs is not seen.

`watched` modules are counted apart, in `blocks`: `dumo.run.memory` extrapolates from a few blocks of a deep net.
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
    """Bytes of the storages that are made during a block's forward passes."""

    bytes_now: int = 0  # alive now
    bytes_left_behind: int = 0  # alive at the end of a forward pass with gradients, the most of all such passes
    bytes_at_peak: int = 0  # alive when all storages together were at their peak


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages while it is entered. The header has the order of events."""

    def __init__(self, watched: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
        """`watched`: the blocks to count apart in `blocks`, by path. None may lie within another."""
        super().__init__()
        self.preexisting = 0
        self.now = 0
        self.peak = 0
        self.blocks = {path: WatchedBlock() for path in watched}
        self._bytes_by_storage: dict[int, int] = {}  # of the storages alive, by id: their bytes in `now`
        self._running_block: WatchedBlock | None = None
        for path, module in watched.items():
            module.register_forward_pre_hook(partial(self._begin_block, self.blocks[path]))
            # recomputing a block ends it early, by an exception
            module.register_forward_hook(partial(self._end_block, self.blocks[path]), always_call=True)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation, and count its storages."""
        # Fake tensors are asked for their device more often than all else; this makes no tensor.
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
        """Count `num_bytes` for a storage until its last tensor is gone, unless it is known. Returns if it was new."""
        key = id(storage)  # torch shows a storage as one object while it lives
        if key in self._bytes_by_storage:
            return False
        self._bytes_by_storage[key] = num_bytes
        self.now += num_bytes
        if self._running_block is not None:
            self._running_block.bytes_now += num_bytes
        weakref.finalize(storage, self._untrack, key, self._running_block).atexit = False
        return True

    def _untrack(self, key: int, block: WatchedBlock | None) -> None:
        """Count a storage no more. `block` is the block that made it."""
        num_bytes = self._bytes_by_storage.pop(key)
        self.now -= num_bytes
        if block is not None:
            block.bytes_now -= num_bytes

    def _begin_block(self, block: WatchedBlock, *_: object) -> None:
        """Give `block` the storages that are made from now on. A hook before its forward pass."""
        assert self._running_block is None, "a watched block lies within another"
        self._running_block = block

    def _end_block(self, block: WatchedBlock, *_: object) -> None:
        """Note what `block` leaves behind. A hook after its forward pass."""
        self._running_block = None
        # In a backward pass a block is computed again, and what that leaves behind is used at once.
        is_backward = torch._C._current_graph_task_id() != -1
        if torch.is_grad_enabled() and not is_backward:
            block.bytes_left_behind = max(block.bytes_left_behind, block.bytes_now)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in nested lists, tuples and dicts."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
