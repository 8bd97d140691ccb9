"""Estimate the peak memory per rank of distributed training, in a single process without values.

`peak_bytes` is the entry point. It runs one rank's step on fake tensors in a fake process group (`fake_ranks`) without
communication. The network is sharded as in training (`dumo.training.layout`), so weights are gathered and freed as
there. torch's `FSDPMemTracker` tracks the memory of the second step, because the first one creates the optimizer state.

The memory of drivers and NCCL, and the fragmentation of the allocator, are not included.
"""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import torch
import torch.distributed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dumo.flow.module import Flow
from dumo.flow.path import FlowPath
from dumo.run import flops
from dumo.run.memory import average_tensors
from dumo.training import layout
from dumo.training.micro_batch import rows_of_rank
from dumo.training.settings import Train
from dumo.training.state import State, begin
from dumo.types import NoisyBatch, Objective


@contextmanager
def fake_ranks(ranks: int) -> Generator[None, None, None]:
    """Make this process rank 0 of a fake process group of `ranks` ranks inside the context."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def peak_bytes(
    net: nn.Module, objective: Objective, path: FlowPath, shape: tuple[int, ...], train: Train, *, rows: int, ranks: int
) -> int:
    """Return the peak bytes of a rank in a step with micro-batches of `rows` rows of this shape.

    `net` is on the meta device and is not changed. The count of a deep network is extrapolated from a few blocks
    (`flops.count_by_depth`); a diffusers U-Net is counted whole, which can take minutes.
    """
    with fake_ranks(ranks), warnings.catch_warnings():
        # Ignore the warning of a dual slope that freed weights need another pass.
        warnings.simplefilter("ignore")
        peaks: list[int] = []
        for noised, _ in flops.phases(objective, path, rows, shape):
            peaks.append(_peak(net, objective, path, train, noised))
    return max(peaks)


def _peak(net: nn.Module, objective: Objective, path: FlowPath, train: Train, noised: NoisyBatch) -> int:
    """Return the peak of a rank's step on a batch on the meta device, extrapolated if the network is deep."""

    def count(part: nn.Module) -> int:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        fake_net = deepcopy(part)
        with fake:
            fake_net.to_empty(device="cpu")
        state = begin(fake_net, train)
        with fake:
            return _follow_step(state, objective, path, train, flops.empty_cpu_batch_like(noised))

    if flops.is_unet(net):
        return count(net)
    return flops.count_by_depth(net, count, check=True)


def _follow_step(state: State, objective: Objective, path: FlowPath, train: Train, batch: NoisyBatch) -> int:
    """Run the second step of rank 0, with micro-batches of this batch and the update; return its peak bytes.

    Two micro-batches suffice: those in between gather as much as the last one, and reduce no gradients.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    net = state.net
    _, micro_batches = rows_of_rank(train, objective)
    num_micro_batches = min(len(micro_batches), 2)

    # The first step creates the optimizer state, and torch propagates the sharding of its operations on full weights.
    for p in net.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    _update(state)
    state.optimizer.zero_grad()

    # The second step.
    loss = _Loss(state, objective, path, train, batch)
    tracker = FSDPMemTracker(net, state.optimizer)
    tracker.track_inputs(tuple(average_tensors(state.averages.values(), net)))
    with tracker, flops.without_dropout(net, batch):
        for number in range(1, num_micro_batches + 1):
            layout.prepare_backward(net, number == num_micro_batches, reshard=train.reshard)
            loss().backward()
        _update(state)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def _update(state: State) -> None:
    """Update weights and averages as a training step does."""
    state.optimizer.step()
    for average in state.averages.values():
        average.update(state.net, 1)


class _Loss(nn.Module):
    """The loss as a module, because the tracker allows repeated calls of a network only inside another module."""

    def __init__(self, state: State, objective: Objective, path: FlowPath, train: Train, batch: NoisyBatch) -> None:
        super().__init__()
        average = None if train.ref == "self" else state.averages[train.ref].module
        flow = Flow(state.net, objective, direct=True, path=path, ref=average, precision=train.precision)
        self.batch = batch
        # Wrap the network in a partial, so that it is not a submodule of this module.
        self.loss = partial(flow.compute_loss, cache_casts=not layout.frees_gathered_weights(train.reshard))

    def forward(self) -> Tensor:
        """Return the sum of the loss over the batch."""
        return self.loss(self.batch).loss.sum()
