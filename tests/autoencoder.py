"""A codec of random weights, in place of the published one."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dumo.encoders.taesd import TinyAutoencoder
from dumo.runtime.random import stream


def filled(net: nn.Module) -> nn.Module:
    """The net with normal weights that keep the size of what goes through."""
    draws = stream("weights")
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=draws) / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else p.data
    return net


def taef2(file: Path) -> Path:
    """Write random weights in taef2's layout, in half precision."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.half() for name, p in filled(TinyAutoencoder(32)).state_dict().items()}, file)
    return file
