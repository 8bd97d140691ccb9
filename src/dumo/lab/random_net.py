"""The net that benches run: a run's net with random weights. No parameter is all zeros.

`build` makes it, `build_on_meta` makes it on the meta device, to count. `checked_precisions` checks the precisions that
a bench is asked for.
"""

from collections.abc import Sequence
from math import prod
from typing import cast, get_args

import torch
from torch import nn

from dumo.config.suggestion import require_known
from dumo.flow.precision import Precision
from dumo.nets import Net
from dumo.run.memory import weight_bytes
from dumo.runtime.device import require_memory
from dumo.runtime.random import stream
from dumo.types import Needs, UserError

_BIAS_STD = 0.1  # standard deviation of biases that are drawn: our choice, no paper's


def checked_precisions(names: Sequence[str], device: torch.device) -> tuple[Precision, ...]:
    """The precisions with these names. Raises UserError for an unknown one, or one that this device does not have."""
    for name in names:
        require_known("precision", name, get_args(Precision))
        if name == "tf32" and device.type != "cuda":
            raise UserError("precision 'tf32' needs a GPU: use fp32 or bf16")
    return cast(tuple[Precision, ...], tuple(names))


def build_on_meta(net: Net, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The net for samples of this shape, on the meta device.

    needs: what the objective asks of the net.
    shape: of a sample, without the batch.
    classes: the number of classes in the data.

    Raises UserError where the net does not fit the shape.
    """
    if min(shape) < 1:
        raise UserError(f"a sample of shape {shape} has nothing in it: every side is at least 1")
    with torch.device("meta"):
        return net.build(needs, shape, classes)


def build(
    net: Net, needs: Needs, shape: tuple[int, ...], classes: int, device: torch.device, rows: int = 1
) -> nn.Module:
    """The net for samples of this shape, on the device, with the same random weights at every call.

    Weights are as training starts, but parameters that are all zeros are drawn (`fill_zeros`). Arguments are as in
    `build_on_meta`. Raises UserError where the net does not fit the shape, or the device lacks memory for it and `rows`
    samples.
    """
    num_bytes = weight_bytes(build_on_meta(net, needs, shape, classes)) + rows * prod(shape) * torch.float32.itemsize
    require_memory(
        num_bytes,
        "the net and its input take",
        "take a smaller one, fewer rows or a smaller shape",
        device,
    )
    # nets draw from torch's global generator: on the CPU, so that weights are the same on every device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("bench", "weights").initial_seed())
        return fill_zeros(net.build(needs, shape, classes)).to(device)


def fill_zeros(net: nn.Module) -> nn.Module:
    """Draw the parameters that are all zeros, in place: a net that starts at zero has no derivative to measure."""
    generator = stream("bench", "fill")
    for parameter in net.parameters():
        if parameter.any():
            continue
        std = _BIAS_STD
        if parameter.ndim > 1:
            std = parameter[0].numel() ** -0.5  # 1 / sqrt(fan_in), so outputs have the scale of inputs
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * std
    return net
