"""The net that is measured: a run's, for samples of any shape, with its zeros filled."""

from math import prod

import torch
from torch import nn

from dumo import room
from dumo.config.spec import Run
from dumo.random import stream
from dumo.types import UserError


def outline(run: Run, shape: tuple[int, ...]) -> nn.Module:
    """The net without numbers. Raises UserError where it does not fit the shape."""
    if min(shape) < 1:
        raise UserError(f"a sample of shape {shape} has nothing in it: every side is at least 1")
    with torch.device("meta"):
        return run.net.build(run.objective.needs, shape, run.data.classes)


def build(run: Run, shape: tuple[int, ...], device: torch.device, rows: int = 1) -> nn.Module:
    """The net as it starts, then filled; always the same.

    Raises UserError where it does not fit the shape, or the device has not the memory for it and so many rows.
    """
    size = sum(value.nbytes for value in outline(run, shape).state_dict().values())
    size += rows * prod(shape) * torch.float32.itemsize
    room.require(size, "the net and its input take", "take a smaller one, fewer rows or a smaller shape", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("bench", "weights").initial_seed())
        return fill(run.net.build(run.objective.needs, shape, run.data.classes)).to(device)


def fill(net: nn.Module) -> nn.Module:
    """Draw the parameters that are all zero: a net that starts at zero has no derivative to be wrong about."""
    g = stream("bench", "fill")
    for p in net.parameters():
        if not p.any():
            size = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1  # a layer's weights keep the size of its input
            p.data = torch.randn(p.shape, generator=g).to(p) * size
    return net
