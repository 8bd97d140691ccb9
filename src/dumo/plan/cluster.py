"""The peak memory of one rank of several, counted by one process without values.

`peak_bytes` is the entry point. It makes one rank's step on fake tensors, in a group of ranks that do not exist
(`fake_ranks`), so that nothing is sent. The network is sharded as training shards it (`dumo.training.layout`), so
weights are gathered and freed as they are there. torch's `FSDPMemTracker` follows the memory through the second step,
because the optimizer makes its state in the first.

The memory of drivers and NCCL and the fragmentation of the allocator come on top.
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
    """Inside, this process is the first of a group of `ranks` ranks; the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def peak_bytes(
    net: nn.Module, objective: Objective, path: FlowPath, shape: tuple[int, ...], train: Train, *, rows: int, ranks: int
) -> int:
    """The most bytes that a rank holds in a step whose micro-batches have `rows` rows of this shape.

    `net` is on the meta device, and stays as it is. A deep network is counted by a few of its blocks
    (`cost.count_by_depth`); a U-Net of diffusers is counted whole, which can take minutes.
    """
    with fake_ranks(ranks), warnings.catch_warnings():
        # A dual slope warns that another pass is needed where gathered weights are freed.
        warnings.simplefilter("ignore")
        peaks: list[int] = []
        for noised, _ in flops.phases(objective, path, rows, shape):
            peaks.append(_peak(net, objective, path, train, noised))
    return max(peaks)


def _peak(net: nn.Module, objective: Objective, path: FlowPath, train: Train, noised: NoisyBatch) -> int:
    """The peak of a rank's step on a batch on the meta device, of a deep network by a few blocks."""

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
    """Make the second step of the first rank, micro-batches of this batch and the update; return its peak bytes.

    Two micro-batches stand for all: one between them gathers as much as the last, and reduces no gradients.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    net = state.net
    _, micro_batches = rows_of_rank(train, objective)
    num_micro_batches = min(len(micro_batches), 2)

    # The first step: the optimizer makes its state. torch also works out, on whole weights, how to move sharded ones.
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
    """Update weights and averages by the gradients, as a step of training does."""
    state.optimizer.step()
    for average in state.averages.values():
        average.update(state.net, 1)


class _Loss(nn.Module):
    """The loss of a pass as a module: the tracker allows several calls of a network inside another module alone."""

    def __init__(self, state: State, objective: Objective, path: FlowPath, train: Train, batch: NoisyBatch) -> None:
        super().__init__()
        average = None if train.ref == "self" else state.averages[train.ref].module
        flow = Flow(state.net, objective, direct=True, path=path, ref=average, precision=train.precision)
        self.batch = batch
        # In a partial, so that the network is no submodule of this one.
        self.loss = partial(flow.compute_loss, cache_casts=not layout.frees_gathered_weights(train.reshard))

    def forward(self) -> Tensor:
        """The sum of the loss over the batch, a number."""
        return self.loss(self.batch).loss.sum()
