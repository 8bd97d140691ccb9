"""Small networks with which an objective is checked: any inputs, any heads, and how many passes are made."""

from math import prod

import torch
from torch import Tensor, nn

from dumo.types import Heads, Needs


class TinyNet(nn.Module):
    """One hidden layer, with the inputs, heads and gauges that an objective needs; c is `classes` for no class."""

    def __init__(self, needs: Needs, shape: tuple[int, ...], classes: int, width: int = 8) -> None:
        super().__init__()
        self.names = needs.names
        self.label = nn.Embedding(classes + 1, width)
        self.inner = nn.Linear(prod(shape) + len(self.names), width)
        self.heads = nn.ModuleList(nn.Linear(width, prod(shape)) for _ in needs.heads)
        self.gauges = nn.ModuleList(nn.Linear(width, 1) for _ in needs.gauges)

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        """The heads, then the gauges."""
        times = [inputs[name].unsqueeze(1).to(x.dtype) for name in self.names]
        h = torch.tanh(self.inner(torch.cat([x.flatten(1), *times], 1)) + self.label(c))
        heads = [head(h).view(x.shape) for head in self.heads]
        gauges = [gauge(h).squeeze(1) for gauge in self.gauges]
        return (*heads, *gauges)


class CountedNet(nn.Module):
    """A network that counts its passes, with gradients (`graded`) and without (`still`)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.graded = 0
        self.still = 0

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        """A pass of the network."""
        if torch.is_grad_enabled():
            self.graded += 1
        else:
            self.still += 1
        return self.net(x, c, **inputs)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew: a network that starts at zero has u = du/dt = 0, and would pass every check."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        size = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) * size
    return net
