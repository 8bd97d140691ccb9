"""A net of another model's weights, frozen, of which adapters are trained."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dumo.runtime.random import stream
from dumo.types import Cond, Heads, Sample, Time
from unit.training.toy import CLASSES


class Layer(nn.Module):
    """A frozen layer, and an adapter of rank 2 beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) if self.on else self.base(x)


class Adapted(nn.Module):
    """Two such layers between frozen ends that share a weight, a table that is fixed, and dropout; `base()` is there.

    The frozen weights are those of `source`, the adapters those of `seed`. Of an odd width no two ranks have halves.
    """

    table: Tensor

    def __init__(self, source: int = 0, seed: int = 0, width: int = 9, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width).requires_grad_(False), nn.Linear(width, 2).requires_grad_(False)
        self.again = nn.Linear(3, width).requires_grad_(False)
        self.again.weight = self.first.weight
        self.blocks = nn.ModuleList(Layer(width) for _ in range(2))
        self.drop = nn.Dropout(0.0)
        self.register_buffer("table", torch.zeros(CLASSES + 1, width), persistent=False)
        g, own = stream(source, "source"), stream(seed, "adapters")
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=own if p.requires_grad else g)
        self.table.copy_(torch.randn(self.table.shape, generator=g))
        self.to(dtype)

    def forward(self, x: Sample, c: Cond, /, *, t: Time) -> Heads:
        told = torch.cat([x, t[:, None].to(x)], 1)
        h = self.drop(self.first(told) + self.again(told) + self.table[c])
        for block in self.blocks:
            h = h + block(torch.tanh(h))
        return (self.last(h),)

    @contextmanager
    def base(self) -> Generator[None, None, None]:
        """The adapters are off inside."""
        layers = [block for block in self.blocks if isinstance(block, Layer)]
        for layer in layers:
            layer.on = False
        try:
            yield
        finally:
            for layer in layers:
                layer.on = True
