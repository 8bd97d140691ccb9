"""The net that benches run: a run's net with random weights, none of which are zero.

`build` makes it, `outline` makes it on the meta device, to count. `precisions_of` checks the precisions that a bench is
asked for.
"""

from collections.abc import Sequence
from typing import cast, get_args

import torch
from torch import nn

from dumo.config.suggestion import require_known
from dumo.flow.precision import Precision
from dumo.nets import Net
from dumo.run import memory
from dumo.runtime.device import require_memory
from dumo.runtime.random import stream
from dumo.types import Needs, UserError

BIAS_SCALE = 0.1  # standard deviation of biases that are drawn: ours


def precisions_of(names: Sequence[str], device: torch.device) -> tuple[Precision, ...]:
    """The precisions with these names. Raises UserError for an unknown one, or one that this device does not have."""
    for name in names:
        require_known("precision", name, get_args(Precision))
        if name == "tf32" and device.type != "cuda":
            raise UserError("precision 'tf32' needs a GPU: use fp32 or bf16")
    return cast(tuple[Precision, ...], tuple(names))


def outline(net: Net, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The net for samples of this shape, on the meta device.

    `needs` are the objective's, `classes` the number of the data's. Raises UserError where the net does not fit.
    """
    if min(shape) < 1:
        raise UserError(f"a sample of shape {shape} has nothing in it: every side is at least 1")
    with torch.device("meta"):
        return net.build(needs, shape, classes)


def build(
    net: Net, needs: Needs, shape: tuple[int, ...], classes: int, device: torch.device, rows: int = 1
) -> nn.Module:
    """The net for samples of this shape, on the device, with the same random weights at every call.

    Weights are as training starts, but those that are all zero are drawn (`fill_zeros`). Raises UserError where the net
    does not fit the shape, or the device lacks memory for it and `rows` samples.
    """
    size = memory.least_bytes(outline(net, needs, shape, classes)) + memory.row_bytes(rows, shape)
    require_memory(size, "the net and its input take", "take a smaller one, fewer rows or a smaller shape", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("bench", "weights").initial_seed())
        return fill_zeros(net.build(needs, shape, classes)).to(device)


def fill_zeros(net: nn.Module) -> nn.Module:
    """Draw the parameters that are all zero, in place: a net that starts at zero has no derivative to measure."""
    g = stream("bench", "fill")
    for parameter in net.parameters():
        if parameter.any():
            continue
        scale = BIAS_SCALE
        if parameter.ndim > 1:  # a layer's weights, which keep the size of its input
            scale = parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape, generator=g).to(parameter) * scale
    return net
