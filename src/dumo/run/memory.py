"""Bytes that training takes, counted from shapes before anything is made: between steps and in a step.

    weights        parameters and buffers
    gradients      of the weights that are trained
    optimizer      its state, which is made by its first update
    averages       of the weights (EMA), but for what they share with the network
    activations    the peak of a step beyond weights and gradients: what the backward pass needs, targets

`held_bytes` counts the first four, which stay between steps, and `activation_bytes` the last. `step_bytes` counts a
step for a benchmark; `allocated_bytes` measures one on a GPU. `dumo.plan.cluster` counts a step of several ranks, and
`dumo.plan.cost` puts the parts together.

Networks are on the meta device: they have shapes and dtypes, and no values. A step is run on fake tensors, and each
storage is followed from the operation that makes it until it is freed (`dumo.run.storages`). Fake tensors have no
values either, but they are on the CPU, so that the operations are those of a device: on meta, attention keeps all its
scores, which no fused kernel does. A deep network is followed with a few of its blocks, and the others are added
(`cost.count_by_depth`; `_unet_peak` for a U-Net of diffusers).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dumo.flow.path import FlowPath
from dumo.flow.precision import Precision, autocast
from dumo.run import flops
from dumo.run.storages import LiveStorages
from dumo.training import frozen, layout
from dumo.training.ema import MovingAverage
from dumo.training.settings import Train
from dumo.types import NoisyBatch, Objective


@dataclass(frozen=True)
class HeldBytes:
    """What training holds between steps, if each rank holds all of it."""

    weights: int
    gradients: int
    optimizer: int
    averages: int

    @property
    def total(self) -> int:
        """Bytes of all four together."""
        return self.weights + self.gradients + self.optimizer + self.averages

    def per_rank(self, num_shards: int) -> "HeldBytes":
        """The bytes of each rank, if `num_shards` ranks hold one copy of everything between them. Rounded up."""
        return HeldBytes(
            weights=ceil(self.weights / num_shards),
            gradients=ceil(self.gradients / num_shards),
            optimizer=ceil(self.optimizer / num_shards),
            averages=ceil(self.averages / num_shards),
        )


class StepBytes(NamedTuple):
    """Bytes of the tensors that some work uses."""

    preexisting: int  # of those that were there before it
    peak: int  # of those that it makes, the most at one time


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(x.nbytes for x in tensors)


def weight_bytes(net: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, on any device."""
    return tensor_bytes(_tensors(net))


def held_bytes(net: nn.Module, train: Train) -> HeldBytes:
    """What training holds between steps. `net` is on the meta device, and stays as it is."""
    net = deepcopy(net)
    # Averages begin as copies of the weights before these are rounded to 16 bits.
    averages = [MovingAverage(ema, net) for ema in train.ema]
    is_trained = any(p.requires_grad for p in net.parameters())
    num_average_bytes = tensor_bytes(average_tensors(averages, net))
    _use_trained_dtypes(net, train)
    return HeldBytes(
        weights=weight_bytes(net),
        gradients=tensor_bytes(p for p in net.parameters() if p.requires_grad),
        optimizer=_optimizer_bytes(train.optimizer(net)) if is_trained else 0,
        averages=num_average_bytes,
    )


def net_in_training(net: nn.Module, train: Train) -> nn.Module:
    """A copy of a network on the meta device whose weights have the dtypes of training."""
    copy = deepcopy(net)
    _use_trained_dtypes(copy, train)
    return copy


def _use_trained_dtypes(net: nn.Module, train: Train) -> None:
    """Give the trained weights of a network their dtype in training, in place."""
    layout.shard(net, None, reshard=False, in_bfloat16=train.weights == "bfloat16")


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state, which is made by its first update; its parameters are on the meta device.

    Parameters of one group, shape and dtype have equal states, so the first of them is updated, and counts for all.
    """
    parameters_by_kind: dict[object, list[Tensor]] = {}
    for group_index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            parameters_by_kind.setdefault((group_index, p.shape, p.dtype), []).append(p)
    for first, *_ in parameters_by_kind.values():
        first.grad = torch.empty_like(first)
    optimizer.step()
    total = 0
    for parameters in parameters_by_kind.values():
        values = optimizer.state[parameters[0]].values()
        total += len(parameters) * tensor_bytes(value for value in values if isinstance(value, Tensor))
    return total


def average_tensors(averages: Iterable[MovingAverage], net: nn.Module) -> list[Tensor]:
    """The tensors of averages of a network, but for those that they share with it. No two averages share others."""
    tensors_of_net = {id(x) for x in _tensors(net)}
    tensors: list[Tensor] = []
    for average in averages:
        tensors += [x for x in _tensors(average.module) if id(x) not in tensors_of_net]
    return tensors


def _tensors(net: nn.Module) -> tuple[Tensor, ...]:
    """A network's parameters and buffers."""
    return (*net.parameters(), *net.buffers())


def checkpoint_bytes(net: nn.Module, held: HeldBytes) -> int:
    """Bytes of a checkpoint on disk: all but gradients and frozen weights."""
    frozen_bytes = tensor_bytes(p for p in net.parameters() if not p.requires_grad)
    return held.weights + held.optimizer + held.averages - frozen_bytes


def activation_bytes(
    net: nn.Module,
    objective: Objective,
    path: FlowPath,
    shape: Sequence[int],
    *,
    rows: int,
    ref: flops.Theta = "self",
    precision: Precision = "fp32",
) -> int:
    """Peak bytes of a step over `rows` rows, beyond weights, gradients and batch, on a CPU.

    Of the phases of a training the one that takes the most counts. `net` is on the meta device, with the dtypes of
    training (`net_in_training`), and stays as it is.
    """
    peaks: list[int] = []
    for noised, _ in flops.phases(objective, path, rows, shape):
        peaks.append(_activation_peak(net, objective, noised, ref, precision))
    return max(peaks)


def step_bytes(
    net: nn.Module,
    objective: Objective,
    path: FlowPath,
    shape: Sequence[int],
    *,
    rows: int,
    ref: flops.Theta = "self",
    precision: Precision = "fp32",
) -> StepBytes:
    """Bytes of a step over `rows` rows on a CPU: net and batch before it; activations, gradients, targets in it.

    Gradients count in the step, and the whole network is followed. Of the phases of a training the one that takes the
    most counts.
    `net` is on the meta device, and stays as it is.
    """
    phase_bytes: list[StepBytes] = []
    for noised, _ in flops.phases(objective, path, rows, shape):
        live = _follow_step(net, objective, noised, ref, precision, has_gradients=False)
        phase_bytes.append(StepBytes(live.preexisting, live.peak))
    return max(phase_bytes, key=lambda step: step.peak)


def allocated_bytes(work: Callable[[], object], device: torch.device) -> StepBytes:
    """Bytes that a GPU's allocator hands out before some work, and more while it runs."""
    torch.cuda.reset_peak_memory_stats(device)
    preexisting = torch.cuda.memory_allocated(device)
    work()
    return StepBytes(preexisting, torch.cuda.max_memory_allocated(device) - preexisting)


def _activation_peak(
    net: nn.Module, objective: Objective, noised: NoisyBatch, ref: flops.Theta, precision: Precision
) -> int:
    """Peak bytes of a step on a noised batch, beyond weights, gradients and batch; of a deep net by a few blocks."""

    def follow(part: nn.Module, watched: Collection[str] = ()) -> LiveStorages:
        return _follow_step(part, objective, noised, ref, precision, has_gradients=True, watched=watched)

    if flops.is_unet(net):
        return _unet_peak(net, follow)
    # The ends of a net may take more than a few blocks: `check` makes sure that its blocks add to the peak.
    return flops.count_by_depth(net, lambda part: follow(part).peak, check=True)


def _unet_peak(net: nn.Module, follow: Callable[[nn.Module, Collection[str]], LiveStorages]) -> int:
    """Peak bytes of a step of a UNet, by a few of the blocks in its transformers.

    `follow` follows a step of a net, and watches the blocks at some paths.

    One watched block stands for others like it that are left out (`cost.sample_blocks`). Each of those would leave
    behind as many bytes in the forward pass as it does. If all of them are still alive at the peak, each block that was
    left out adds these bytes to the peak. It adds no more than these at any other time, so the peak stays at the same
    operation. If some are gone at the peak, this does not hold, and the whole net is followed.
    """
    sampled = flops.sample_blocks(net)
    if not sampled.left_out:
        return follow(net, ()).peak
    live = follow(sampled.net, sampled.left_out.keys())
    peak = live.peak
    for path, num_left_out in sampled.left_out.items():
        block = live.blocks[path]
        if block.bytes_at_peak != block.bytes_left_behind:
            return follow(net, ()).peak
        peak += num_left_out * block.bytes_at_peak
    return peak


def _follow_step(
    net: nn.Module,
    objective: Objective,
    noised: NoisyBatch,
    ref: flops.Theta,
    precision: Precision,
    *,
    has_gradients: bool,
    watched: Collection[str] = (),
) -> LiveStorages:
    """Follow one step on fake tensors. `net` stays as it is.

    `noised` is a batch on the meta device. `has_gradients`: gradients exist before the step, so they do not count in
    it. `watched`: paths of the blocks to count apart.
    """
    net, theta = flops.meta_copies(net, ref)
    with FakeTensorMode(allow_non_fake_inputs=True):
        modules = {net, theta.module}  # one where theta is the net itself
        for module in modules:
            module.to_empty(device="cpu")
        frozen.share_frozen(theta.module, net)
        for p in net.parameters():
            p.grad = torch.empty_like(p) if has_gradients and p.requires_grad else None
        step = flops.step_function(net, theta, objective, flops.empty_cpu_batch_like(noised))
        live = LiveStorages({path: net.get_submodule(path) for path in watched})
        with autocast(precision, "cpu"), live:
            step()
    return live
