"""Count the bytes of training from shapes alone, between steps and within a step.

    weights        parameters and buffers
    gradients      gradients of the trained weights
    optimizer      the optimizer state, which is created by the first update
    averages       moving averages of the weights, without tensors shared with the network
    activations    the peak of a step beyond weights and gradients: saved tensors, targets

`held_bytes` counts the first four, which persist between steps, and `activation_bytes` the last. `step_bytes` counts a
step for a benchmark; `allocated_bytes` measures a step on a GPU. `dumo.plan.cluster` counts a step on several ranks,
and `dumo.plan.cost` adds everything up.

Networks are on the meta device, with shapes and dtypes but no values. A step runs on fake tensors, and each storage is
tracked from its creation until it is freed (`dumo.run.storages`). Fake tensors have no values either, but they are on
the CPU, so that device kernels are traced: on meta, attention would keep all of its scores, unlike fused kernels. Deep
networks are traced with a few blocks, and the result is extrapolated (`flops.count_by_depth`; `_unet_peak` for a
diffusers U-Net).
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
from dumo.training.optim import fake_score_parameters
from dumo.training.settings import Train
from dumo.types import NoisyBatch, Objective


@dataclass(frozen=True)
class HeldBytes:
    """The bytes that persist between training steps, without sharding."""

    weights: int
    gradients: int
    optimizer: int
    averages: int

    @property
    def total(self) -> int:
        """The sum of all four."""
        return self.weights + self.gradients + self.optimizer + self.averages

    def per_rank(self, num_shards: int) -> "HeldBytes":
        """Return the bytes of each rank if everything is sharded over `num_shards` ranks, rounded up."""
        return HeldBytes(
            weights=ceil(self.weights / num_shards),
            gradients=ceil(self.gradients / num_shards),
            optimizer=ceil(self.optimizer / num_shards),
            averages=ceil(self.averages / num_shards),
        )


class StepBytes(NamedTuple):
    """The bytes of tensors that exist before a function call, and the peak of the bytes that it adds."""

    preexisting: int
    peak: int


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the total bytes of tensors."""
    return sum(x.nbytes for x in tensors)


def weight_bytes(net: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers, on any device."""
    return tensor_bytes(_tensors(net))


def held_bytes(net: nn.Module, train: Train) -> HeldBytes:
    """Count the bytes that persist between steps. `net` is on the meta device and is not changed."""
    net = deepcopy(net)
    # Averages start as copies of the weights before those are rounded to 16 bits.
    averages = [MovingAverage(ema, net) for ema in train.ema]
    is_trained = any(p.requires_grad for p in net.parameters())
    num_average_bytes = tensor_bytes(average_tensors(averages, net))
    _use_trained_dtypes(net, train)
    # A step trains the fake score or the rest of the net, so only one of them has gradients at a time.
    gradient_bytes = tensor_bytes(p for p in net.parameters() if p.requires_grad)
    fake_bytes = tensor_bytes(fake_score_parameters(net))
    return HeldBytes(
        weights=weight_bytes(net),
        gradients=max(gradient_bytes - fake_bytes, fake_bytes),
        optimizer=_optimizer_bytes(train.optimizer(net)) if is_trained else 0,
        averages=num_average_bytes,
    )


def net_in_training(net: nn.Module, train: Train) -> nn.Module:
    """Copy a network on the meta device and convert its weights to the dtypes of training."""
    copy = deepcopy(net)
    _use_trained_dtypes(copy, train)
    return copy


def _use_trained_dtypes(net: nn.Module, train: Train) -> None:
    """Convert the trained weights of a network to their dtype in training, in place."""
    layout.shard(net, None, reshard=False, in_bfloat16=train.weights == "bfloat16")


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state after its first update; its parameters are on the meta device.

    Parameters of equal group, shape and dtype have equal states, so only the first of them is updated.
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
    """Return the tensors of averages that they do not share with the network. Averages share no other tensors."""
    tensors_of_net = {id(x) for x in _tensors(net)}
    tensors: list[Tensor] = []
    for average in averages:
        tensors += [x for x in _tensors(average.module) if id(x) not in tensors_of_net]
    return tensors


def _tensors(net: nn.Module) -> tuple[Tensor, ...]:
    """Return a network's parameters and buffers."""
    return (*net.parameters(), *net.buffers())


def checkpoint_bytes(net: nn.Module, held: HeldBytes) -> int:
    """Return the bytes of a checkpoint on disk, which excludes gradients and frozen weights."""
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
    """Return the peak bytes of a step over `rows` rows on a CPU, beyond weights, gradients and batch.

    The result is the maximum over the phases of the training. `net` is on the meta device, with the dtypes of training
    (`net_in_training`), and is not changed.
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
    """Count the bytes of a step over `rows` rows on a CPU: net and batch, and the peak that the step adds.

    The peak includes gradients, activations and targets. The whole network is traced, and the phase of the training
    with the highest peak is returned. `net` is on the meta device and is not changed.
    """
    phase_bytes: list[StepBytes] = []
    for noised, _ in flops.phases(objective, path, rows, shape):
        live = _follow_step(net, objective, noised, ref, precision, has_gradients=False)
        phase_bytes.append(StepBytes(live.preexisting, live.peak))
    return max(phase_bytes, key=lambda step: step.peak)


def allocated_bytes(work: Callable[[], object], device: torch.device) -> StepBytes:
    """Measure the bytes allocated on a GPU before a function call, and the peak that it adds."""
    torch.cuda.reset_peak_memory_stats(device)
    preexisting = torch.cuda.memory_allocated(device)
    work()
    return StepBytes(preexisting, torch.cuda.max_memory_allocated(device) - preexisting)


def _activation_peak(
    net: nn.Module, objective: Objective, noised: NoisyBatch, ref: flops.Theta, precision: Precision
) -> int:
    """Return the peak bytes of a step beyond weights, gradients and batch, extrapolated if the net is deep."""

    def follow(part: nn.Module, watched: Collection[str] = ()) -> LiveStorages:
        return _follow_step(part, objective, noised, ref, precision, has_gradients=True, watched=watched)

    if flops.is_unet(net):
        return _unet_peak(net, follow)
    # The first and last layers may outweigh a few blocks, so `check` that blocks contribute to the peak.
    return flops.count_by_depth(net, lambda part: follow(part).peak, check=True)


def _unet_peak(net: nn.Module, follow: Callable[[nn.Module, Collection[str]], LiveStorages]) -> int:
    """Return the peak bytes of a step of a UNet, extrapolated from a few of its transformer blocks.

    `follow` traces a step of a net, and watches the blocks at some paths.

    Each watched block represents equal blocks that were removed (`flops.sample_blocks`), which would leave behind as
    many bytes in the forward pass. If these bytes are all alive at the peak, each removed block adds them to the peak.
    It adds no more at any other time, so the peak stays at the same operation. Otherwise the whole net is traced.
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
    """Trace a step on fake tensors. `net` is not changed.

    `noised` is a batch on the meta device. With `has_gradients`, gradients exist before the step and are not counted.
    `watched` are the paths of blocks to count separately.
    """
    net, theta = flops.meta_copies(net, ref)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # theta may be the net itself.
        modules = {net, theta.module}
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
