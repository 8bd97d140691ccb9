"""What a step costs, counted, not timed: floating-point operations of tensors that hold no numbers.

The unit is F, one pass of the net forward; a backward pass is 2 F. Counts depend on shapes alone, so the step runs on
the meta device, whatever the net's size: no memory, no arithmetic.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dumo.flow.draw import draw
from dumo.types import Objective, Path, still


def forward_flops(net: nn.Module, objective: Objective, shape: Sequence[int]) -> float:
    """Floating-point operations of one pass, per row (two per multiply-add)."""
    net, rows = copy.deepcopy(net).to("meta"), 2
    x, c = _nothing(rows, shape)
    inputs = {name: x.new_empty(rows) for name in (*objective.needs.inputs, *objective.needs.knobs)}
    with torch.no_grad():
        return _count(lambda: net(x, c, **inputs)) / rows


def forward_units(net: nn.Module, objective: Objective, path: Path, shape: Sequence[int]) -> float:
    """Floating-point operations of a training step over those of one pass: forward, targets and backward."""
    net, rows = copy.deepcopy(net).to("meta"), 2
    x, c = _nothing(rows, shape)
    b = draw(objective, path, x, c, c, seed=0, step=0)

    def step() -> None:
        objective.loss(net, still(net), b).loss.sum().backward()

    return _count(step) / (rows * forward_flops(net, objective, shape))


def _nothing(rows: int, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, *shape, device="meta"), torch.empty(rows, dtype=torch.long, device="meta")


def _count(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
