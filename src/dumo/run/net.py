"""The net that a run's spec describes: on the meta device, or at step 0."""

from math import prod

import torch
from torch import nn

from dumo.config.tree import Tree
from dumo.io.deferred import Deferred
from dumo.nets import MLP, DiT, Pretrained, UNet
from dumo.nets.live import Live
from dumo.runtime import dist
from dumo.runtime.random import stream


def outline(run: Tree, *, short: bool = False) -> nn.Module:
    """The net on the meta device, without values. Raises UserError if it does not fit the data.

    `short`: only the first blocks of a pretrained net, which takes long.
    """
    net = run.net.short(1) if short and isinstance(run.net, Pretrained) else run.net
    with torch.device("meta"):
        return net.build(run.objective.needs, run.data.shape, run.data.classes)


def drawn(run: Tree) -> nn.Module:
    """The net at step 0 on the CPU, its weights keyed by the run's seed, or those of its pipeline."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(run.train.seed, "weights").initial_seed())
        net = run.net.build(run.objective.needs, run.data.shape, run.data.classes)
    for part in net.modules():
        if isinstance(part, Live):
            part.captions = run.conditions.names
    return net


def deferred(run: Tree) -> tuple[nn.Module, Deferred]:
    """The same net, and what makes its weights one by one; a net from outside has them."""
    weights = Deferred()
    if not isinstance(run.net, DiT | MLP | Pretrained | UNet):
        return drawn(run), weights
    with weights:
        net = drawn(run)
    assert not (lost := weights.strange(net)), f"{lost[0]} is not drawn"
    return net, weights


def require_room(run: Tree, device: torch.device | str, copies: float = 0, rows: int = 0, share: int = 1) -> None:
    """Raise UserError if a device has too little memory for the net, `copies` of its trained weights, and `rows`.

    Weights are split into `share` parts; rows count with their noise. That is the least: activations come on top
    (`dumo.plan.plan`).
    """
    net, numbers = outline(run), 2 * rows * prod(run.data.shape)
    whole = sum(value.nbytes for value in net.state_dict().values())
    frozen = sum(p.nbytes for p in net.parameters() if not p.requires_grad)
    size = int((whole + copies * (whole - frozen)) / share) + numbers * torch.float32.itemsize
    what = "weights, gradients, optimizer, averages and a batch take" if rows else "the net takes"
    way = "take a smaller net (net.width, net.depth)" + " or batch (train.batch)" * bool(rows)
    dist.require_memory(size, what, way, device)
