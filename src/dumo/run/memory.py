"""Bytes of a net, of its training and of one step, counted before anything is made.

    weights        parameters and buffers
    gradients      of the weights that are trained
    optimizer      its tensors, which come with its first update
    averages       of the weights, but for what they share with the net
    activations    the most that one piece of a batch takes at one time: what is kept for the backward pass, targets

`training_bytes` counts all of them. The first four stay between passes: `held_bytes` makes them on the meta device.
That takes minutes of 20 B weights, so before a net is made `least_bytes` bounds them from below.

Activations (`activation_bytes`) are counted by following every tensor's storage from the operation that made it until
it is freed. That needs the operations that a device would run: on meta, attention keeps all its scores, which no fused
kernel does. So they are followed on fake tensors, which hold no numbers either, but say that they are on the CPU.

A deep net is followed with a few of its blocks (`cost.by_depth`, of a UNet `_unet_peak`), for the same bytes.
"""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dumo.flow.path import FlowPath
from dumo.flow.precision import Precision, autocast
from dumo.run import cost
from dumo.training.frozen import frozen_weights, share
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.types import Noised, Objective


@dataclass(frozen=True)
class HeldBytes:
    """What training holds between passes, where each rank holds all."""

    weights: int
    gradients: int
    optimizer: int
    averages: int

    @property
    def total(self) -> int:
        """Bytes of all four together."""
        return self.weights + self.gradients + self.optimizer + self.averages

    def part(self, share: int) -> "HeldBytes":
        """The bytes of a rank, where `share` ranks hold one copy of everything between them."""
        return HeldBytes(
            weights=self.weights // share,
            gradients=self.gradients // share,
            optimizer=self.optimizer // share,
            averages=self.averages // share,
        )


@dataclass(frozen=True)
class TrainingBytes:
    """What training takes on each rank, where each holds all, `rows` rows at a time."""

    rows: int
    held: HeldBytes
    activations: int

    @property
    def total(self) -> int:
        """The most bytes at one time."""
        return self.held.total + self.activations

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for: weights, gradients, optimizer, averages, activations."""
        return {**asdict(self.held), "activations": self.activations}


class CheckpointBytes(NamedTuple):
    """What a checkpoint takes on disk, and the copy of it that each rank keeps in host memory."""

    bytes: int
    copy: int


class StepBytes(NamedTuple):
    """Bytes of tensors that a piece of work met: those there before it, and most of its own alive at one time."""

    before: int
    peak: int


def _tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(x.nbytes for x in tensors)


def weight_bytes(net: nn.Module) -> int:
    """Bytes of a net's parameters and buffers."""
    return _tensor_bytes(_weights(net))


def row_bytes(rows: int, shape: Sequence[int]) -> int:
    """Bytes of `rows` samples of a shape, in float32."""
    return rows * prod(shape) * torch.float32.itemsize


def least_bytes(net: nn.Module, copies: float = 0) -> int:
    """The least that a net takes with `copies` of its trained weights (`Train.copies`): known at once."""
    trained = _tensor_bytes(p for p in net.parameters() if p.requires_grad)
    return weight_bytes(net) + int(copies * trained)


def held_bytes(net: nn.Module, train: Train) -> HeldBytes:
    """What training holds between passes. `net` is an outline."""
    state = begin(net, train)
    averages = _tensor_bytes(average_tensors(state))  # as they begin, before weights are rounded to 16 bits
    return HeldBytes(
        weights=weight_bytes(net),
        gradients=_tensor_bytes(p for p in net.parameters() if p.requires_grad),
        optimizer=_optimizer_bytes(state.optimizer),
        averages=averages,
    )


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's own tensors, which come with its first step; its parameters are on the meta device.

    Parameters of one group, shape and type have alike tensors, so one of them makes the step, and counts for all.
    """
    parameters_by_kind: dict[object, list[Tensor]] = {}
    for group_index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            parameters_by_kind.setdefault((group_index, p.shape, p.dtype), []).append(p)
    for first, *_ in parameters_by_kind.values():
        first.grad = torch.empty_like(first)
    optimizer.step()
    size = 0
    for parameters in parameters_by_kind.values():
        first = parameters[0]
        values = optimizer.state[first].values()
        size += len(parameters) * _tensor_bytes(value for value in values if isinstance(value, Tensor))
        first.grad = None
    return size


def average_tensors(state: State) -> list[Tensor]:
    """The averages' tensors, but for those that they share with the net."""
    of_net = {id(x) for x in _weights(state.net)}
    own: list[Tensor] = []
    for average in state.averages.values():
        own += [x for x in _weights(average.module) if id(x) not in of_net]
    return own


def training_bytes(
    net: nn.Module, objective: Objective, path: FlowPath, shape: Sequence[int], train: Train, rows: int
) -> TrainingBytes:
    """What training takes, `rows` rows at a time. `net` is an outline."""
    held = held_bytes(net, train)
    activations = activation_bytes(net, objective, path, shape, rows=rows, ref=train.ref, precision=train.precision)
    return TrainingBytes(rows, held, activations)


def checkpoint_bytes(net: nn.Module, size: HeldBytes, ranks: int = 1) -> CheckpointBytes:
    """Bytes that `dumo.training.saver` copies and writes, over `ranks` ranks.

    `net` is an outline, `size` what its training holds.
    """
    whole = size.weights + size.optimizer + size.averages - _tensor_bytes(frozen_weights(net).values())
    return CheckpointBytes(bytes=whole, copy=ceil(whole / ranks))


def activation_bytes(
    net: nn.Module,
    objective: Objective,
    path: FlowPath,
    shape: Sequence[int],
    *,
    rows: int,
    ref: cost.Theta = "self",
    precision: Precision = "fp32",
) -> int:
    """The most bytes of a step of `rows` rows at one time, on top of weights, gradients and batch; on a CPU."""

    def peak_at(b: Noised) -> int:
        def follow(net: nn.Module, watched: Collection[str] = ()) -> _LiveStorages:
            return _follow_step(net, objective, b, ref, precision, has_gradients=True, watched=watched)

        if cost.is_unet(net):
            return _unet_peak(net, follow)
        return cost.by_depth(net, lambda net: follow(net).peak, check=True)

    return max(peak_at(b) for b, _ in cost.phases(objective, path, rows, shape))


def step_bytes(
    net: nn.Module,
    objective: Objective,
    path: FlowPath,
    shape: Sequence[int],
    *,
    rows: int,
    ref: cost.Theta = "self",
    precision: Precision = "fp32",
) -> StepBytes:
    """Bytes of a training step of `rows` rows on a CPU: net and batch before it; activations, gradients, targets in it.

    In the part of the training that takes the most. What a kernel takes for itself while it runs is not seen.
    """
    of_phases: list[StepBytes] = []
    for b, _ in cost.phases(objective, path, rows, shape):
        live = _follow_step(net, objective, b, ref, precision, has_gradients=False)
        of_phases.append(StepBytes(live.before, live.peak))
    return max(of_phases, key=lambda size: size.peak)


def allocated_bytes(work: Callable[[], object], device: torch.device) -> StepBytes:
    """Bytes that a GPU's allocator hands out for a piece of work."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return StepBytes(before, torch.cuda.max_memory_allocated(device) - before)


def follow_bytes(work: Callable[[], object]) -> StepBytes:
    """Follow the bytes of all tensors that a piece of work meets, on whatever device they are, fake ones too."""
    with _LiveStorages() as live:
        work()
    return StepBytes(live.before, live.peak)


def _weights(net: nn.Module) -> tuple[Tensor, ...]:
    """Parameters and buffers."""
    return (*net.parameters(), *net.buffers())


def _unet_peak(net: nn.Module, follow: Callable[[nn.Module, Collection[str]], "_LiveStorages"]) -> int:
    """The most bytes of a step of a UNet at one time, by a few of the blocks in its transformers.

    A block that is left out adds what the block that stands for it left behind in the forward pass, if all of that is
    still alive when the bytes are at their peak. Then no block adds more at any other time, so that the peak of the
    whole net is at the same operation. Else the whole net is followed. `follow` follows a step of a net, and watches
    the blocks at some paths.
    """
    sampled = cost.sample_blocks(net)
    if not sampled.left_out:
        return follow(net, ()).peak
    live = follow(sampled.net, sampled.left_out.keys())
    peak = live.peak
    for path, number in sampled.left_out.items():
        block = live.blocks[path]
        if block.bytes_at_peak != block.bytes_left_behind:
            return follow(net, ()).peak
        peak += number * block.bytes_at_peak
    return peak


def _follow_step(
    net: nn.Module,
    objective: Objective,
    b: Noised,
    ref: cost.Theta,
    precision: Precision,
    *,
    has_gradients: bool,
    watched: Collection[str] = (),
) -> "_LiveStorages":
    """Follow one step on fake tensors, and watch the blocks at the paths `watched`.

    `has_gradients`: gradients are there before, so they do not count in it.
    """
    net, theta = cost.outlines(net, ref)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in {net, theta.module}:
            module.to_empty(device="cpu")
        share(theta.module, net)
        for p in net.parameters():
            p.grad = torch.empty_like(p) if has_gradients and p.requires_grad else None
        step = cost.step_of(net, theta, objective, cost.on_cpu(b))
        live = _LiveStorages({path: net.get_submodule(path) for path in watched})
        with autocast(precision, "cpu"), live:
            step()
    return live


@dataclass
class _WatchedBlock:
    """The bytes of the storages that were made while a block's forward pass ran."""

    bytes_now: int = 0  # alive now
    bytes_left_behind: int = 0  # alive when a forward pass with gradients had ended, at most
    bytes_at_peak: int = 0  # alive when those of all were at their peak


class _LiveStorages(TorchDispatchMode):
    """Sees every operation beneath autograd, backward passes included, and so every storage on its way in or out."""

    def __init__(self, watched: Mapping[str, nn.Module] = MappingProxyType({})) -> None:
        """`watched`: blocks by path, whose bytes are counted apart in `blocks`."""
        super().__init__()
        self.before = 0
        self.now = 0
        self.peak = 0
        self.blocks = {path: _WatchedBlock() for path in watched}
        self._counted: dict[int, int] = {}  # storages alive: bytes that count in `now`
        self._running_block: _WatchedBlock | None = None
        for path, module in watched.items():
            module.register_forward_pre_hook(partial(self._begin_block, self.blocks[path]))
            # recomputing a block ends it early, by an exception
            module.register_forward_hook(partial(self._end_block, self.blocks[path]), always_call=True)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation. A storage first seen going in was there before; one first seen coming out is new."""
        if func is torch.ops.prim.device.default:  # a question, which fake tensors are asked more often than all else
            return func(*args)
        if func is torch.ops.aten._unsafe_view.default:
            func = torch.ops.aten.view.default  # the same beneath autograd, and one that fake tensors remember
        for storage in _storages((args, kwargs)):
            if self._meet(storage, 0):
                self.before += storage.nbytes()
        out = func(*args, **kwargs or {})
        for storage in _storages(out):
            self._meet(storage, storage.nbytes())
        if self.now > self.peak:
            self.peak = self.now
            for block in self.blocks.values():
                block.bytes_at_peak = block.bytes_now
        return out

    def _meet(self, storage: torch.UntypedStorage, size: int) -> bool:
        """Whether a storage is seen for the first time; it counts `size` bytes until the last tensor on it is gone."""
        key = id(storage)  # torch shows a storage as one object while it lives
        if key in self._counted:
            return False
        self._counted[key] = size
        self.now += size
        if self._running_block is not None:
            self._running_block.bytes_now += size
        weakref.finalize(storage, self._leave, key, self._running_block).atexit = False
        return True

    def _leave(self, key: int, block: _WatchedBlock | None) -> None:
        """Count a storage no more. `block` is the one that made it."""
        size = self._counted.pop(key)
        self.now -= size
        if block is not None:
            block.bytes_now -= size

    def _begin_block(self, block: _WatchedBlock, *_: object) -> None:
        """Note that a block makes what is made from now on; a hook before its forward pass."""
        self._running_block = block

    def _end_block(self, block: _WatchedBlock, *_: object) -> None:
        """Note what a block leaves behind; a hook after its forward pass."""
        self._running_block = None
        is_backward = torch._C._current_graph_task_id() != -1  # it is computed again there, and used at once
        if torch.is_grad_enabled() and not is_backward:
            block.bytes_left_behind = max(block.bytes_left_behind, block.bytes_now)


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))
