"""Bytes of a net, of its training and of one step, counted before anything is made.

    weights        parameters and buffers
    gradients      of the weights that are trained
    optimizer      its tensors, which come with its first update
    averages       of the weights, but for what they share with the net
    activations    the peak of a step beyond weights and gradients: what the backward pass needs, targets

`training_bytes` counts all of them. The first four stay between steps (`held_bytes`), the last is `activation_bytes`.
`checkpoint_bytes` says what is written of them. `step_bytes` counts a step for a benchmark, where `allocated_bytes`
asks a GPU's allocator. `average_tensors` are what the averages hold besides the net.

An outline is a net on the meta device: it has shapes and dtypes, and no values. `held_bytes` begins a training on one,
which takes minutes of 20 B weights. `dumo.run.netbytes` bounds that from below, at once.

A step is run on fake tensors, and each storage followed from the operation that makes it until it is freed
(`dumo.run.storages`). Fake tensors have no values either, but they say that they are on the CPU, so that the operations
are those of a device: on meta, attention keeps all its scores, which no fused kernel does.

A deep net is followed with a few of its blocks, and the others are added: `cost.count_by_depth`, of a UNet
`_unet_peak`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dumo.flow.path import FlowPath
from dumo.flow.precision import Precision, autocast
from dumo.run import cost
from dumo.run.netbytes import net_tensors, tensor_bytes, weight_bytes
from dumo.run.storages import LiveStorages
from dumo.training import frozen
from dumo.training import state as training_state
from dumo.training.spec import Train
from dumo.training.state import State
from dumo.types import Noised, Objective


@dataclass(frozen=True)
class HeldBytes:
    """What training holds between steps, where each rank holds all."""

    weights: int
    gradients: int
    optimizer: int
    averages: int

    @property
    def total(self) -> int:
        """Bytes of all four together."""
        return self.weights + self.gradients + self.optimizer + self.averages

    def per_rank(self, num_shards: int) -> "HeldBytes":
        """The bytes of each rank, where `num_shards` ranks hold one copy of everything between them. Rounded up."""
        return HeldBytes(
            weights=ceil(self.weights / num_shards),
            gradients=ceil(self.gradients / num_shards),
            optimizer=ceil(self.optimizer / num_shards),
            averages=ceil(self.averages / num_shards),
        )


@dataclass(frozen=True)
class TrainingBytes:
    """What training takes on each rank, where each rank holds all and steps over `rows` rows at a time."""

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
    """What a checkpoint takes."""

    on_disk: int
    host_copy_per_rank: int  # in host memory, from which a thread writes it


class StepBytes(NamedTuple):
    """Bytes of the tensors that some work uses."""

    preexisting: int  # of those that were there before it
    peak: int  # of those that it makes, the most at one time


def training_bytes(
    net: nn.Module, objective: Objective, path: FlowPath, shape: Sequence[int], train: Train, rows: int
) -> TrainingBytes:
    """What training takes, with `rows` rows of a shape at a time. `net` is an outline, and changed by `held_bytes`."""
    held = held_bytes(net, train)  # first, for the activations are those of the net's dtypes in training
    activations = activation_bytes(net, objective, path, shape, rows=rows, ref=train.ref, precision=train.precision)
    return TrainingBytes(rows, held, activations)


def held_bytes(net: nn.Module, train: Train) -> HeldBytes:
    """What training holds between steps. `net` is an outline, on which a training is begun.

    So its weights have the dtypes of `train.weights` afterwards.
    """
    state = training_state.begin(net, train)
    averages = tensor_bytes(average_tensors(state))  # as they begin, before weights are rounded to 16 bits
    return HeldBytes(
        weights=weight_bytes(net),
        gradients=tensor_bytes(p for p in net.parameters() if p.requires_grad),
        optimizer=_optimizer_bytes(state.optimizer),
        averages=averages,
    )


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's own tensors, which come with its first update; its parameters are on the meta device.

    Parameters of one group, shape and dtype have alike tensors, so the first of them is updated, and counts for all.
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
        first = parameters[0]
        values = optimizer.state[first].values()
        total += len(parameters) * tensor_bytes(value for value in values if isinstance(value, Tensor))
        first.grad = None
    return total


def average_tensors(state: State) -> list[Tensor]:
    """The averages' tensors, but for those that they share with the net. No two averages share others."""
    tensors_of_net = {id(x) for x in net_tensors(state.net)}
    tensors: list[Tensor] = []
    for average in state.averages.values():
        tensors += [x for x in net_tensors(average.module) if id(x) not in tensors_of_net]
    return tensors


def checkpoint_bytes(net: nn.Module, held: HeldBytes, ranks: int = 1) -> CheckpointBytes:
    """Bytes that `dumo.training.saver` copies and writes, over `ranks` ranks: all but gradients and frozen weights.

    `net` is an outline, `held` what its training holds.
    """
    frozen_bytes = tensor_bytes(p for p in net.parameters() if not p.requires_grad)
    on_disk = held.weights + held.optimizer + held.averages - frozen_bytes
    return CheckpointBytes(on_disk=on_disk, host_copy_per_rank=ceil(on_disk / ranks))


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
    """Peak bytes of a step over `rows` rows, beyond weights, gradients and batch, on a CPU.

    The part of the training that takes the most counts. Deep nets are extrapolated from a few blocks. `net` is an
    outline, and stays as it is.
    """
    peaks: list[int] = []
    for noised, _ in cost.phases(objective, path, rows, shape):
        peaks.append(_activation_peak(net, objective, noised, ref, precision))
    return max(peaks)


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
    """Bytes of a step over `rows` rows on a CPU: net and batch before it; activations, gradients, targets in it.

    Gradients count in the step, and the whole net is followed. The part of the training that takes the most counts.
    `net` is an outline, and stays as it is.
    """
    phase_bytes: list[StepBytes] = []
    for noised, _ in cost.phases(objective, path, rows, shape):
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
    net: nn.Module, objective: Objective, noised: Noised, ref: cost.Theta, precision: Precision
) -> int:
    """Peak bytes of a step on a noised batch, beyond weights, gradients and batch; of a deep net by a few blocks."""

    def follow(part: nn.Module, watched: Collection[str] = ()) -> LiveStorages:
        return _follow_step(part, objective, noised, ref, precision, has_gradients=True, watched=watched)

    if cost.is_unet(net):
        return _unet_peak(net, follow)
    # The ends of a net may take more than a few blocks: `check` makes sure that its blocks add to the peak.
    return cost.count_by_depth(net, lambda part: follow(part).peak, check=True)


def _unet_peak(net: nn.Module, follow: Callable[[nn.Module, Collection[str]], LiveStorages]) -> int:
    """Peak bytes of a step of a UNet, by a few of the blocks in its transformers.

    `follow` follows a step of a net, and watches the blocks at some paths.

    One watched block stands for others like it that are left out (`cost.sample_blocks`). Each of those would leave
    behind as many bytes in the forward pass as it does. If all of them are still alive at the peak, each block that was
    left out adds these bytes to the peak. It adds no more than these at any other time, so the peak stays at the same
    operation. If some are gone at the peak, this does not hold, and the whole net is followed.
    """
    sampled = cost.sample_blocks(net)
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
    noised: Noised,
    ref: cost.Theta,
    precision: Precision,
    *,
    has_gradients: bool,
    watched: Collection[str] = (),
) -> LiveStorages:
    """Follow one step on fake tensors. `net` stays as it is.

    `noised` is a batch on the meta device. `has_gradients`: gradients exist before the step, so they do not count in
    it. `watched`: paths of the blocks to count apart.
    """
    net, theta = cost.meta_copies(net, ref)
    with FakeTensorMode(allow_non_fake_inputs=True):
        modules = {net, theta.module}  # one where theta is the net itself
        for module in modules:
            module.to_empty(device="cpu")
        frozen.share_frozen(theta.module, net)
        for p in net.parameters():
            p.grad = torch.empty_like(p) if has_gradients and p.requires_grad else None
        step = cost.step_function(net, theta, objective, cost.empty_cpu_batch_like(noised))
        live = LiveStorages({path: net.get_submodule(path) for path in watched})
        with autocast(precision, "cpu"), live:
            step()
    return live
