"""Compiles the blocks of a tiny pretrained net; prints how many, of how many kinds, and how far gradients are off."""

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dumo.flow.draw import draw
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope
from dumo.nets import Pretrained
from dumo.nets.adapter import Lora
from dumo.nets.dualized import Dualized
from dumo.objectives import DuMo
from dumo.training.loop import compile_blocks
from dumo.types import Frozen, Needs
from transformers_saved import CLASSES, SHAPE, batch, saved


def main(name: str) -> None:
    """Print [blocks that are compiled, kinds of them, relative distance of the gradients]."""
    spec = saved(Path(), name).model_copy(update={"lora": Lora(rank=4), "lowpass": 10.0})
    plain, net = built(spec), built(spec)
    torch.compile = partial(torch.compile, backend="eager")
    for block in net.blocks:
        block.compile = partial(block.compile, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    compile_blocks(net)
    there, found = gradient(plain), gradient(net)
    assert found.keys() == there.keys()
    off = torch.stack([(found[n] - g).norm() for n, g in there.items()]).norm()
    size = torch.stack([g.norm() for g in there.values()]).norm()
    made = [block for block in net.blocks if block._compiled_call_impl is not None]
    print(json.dumps([len(made), len({type(block) for block in made}), (off / size).item()]))


def built(spec: Pretrained) -> Dualized:
    """The same numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return spec.build(Needs(heads=("v", "u")), SHAPE, CLASSES)


def gradient(net: Dualized) -> dict[str, Tensor]:
    """Of a guided step of DuMo."""
    objective = DuMo(slope=DualSlope(), drop=0.1, guide=Guide(zeta=0.55))
    x, c, _ = batch(4)
    b = draw(objective, Linear(), x, c, CLASSES, seed=0, step=0)
    objective.loss(net.train(), Frozen(net), b).loss.mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
