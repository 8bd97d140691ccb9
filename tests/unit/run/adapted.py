"""A run whose net is frozen weights with an adapter, and a teacher that is those weights in a net of their own."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from dumo.config.spec import Run
from dumo.nets import MLP, DiT
from dumo.run.weights import build
from dumo.runtime.random import stream
from dumo.types import Cond, Heads, Needs, Readings, Sample, Time

BUILD = MLP.build


class Adapted(nn.Module):
    """A net of frozen weights, whose heads an adapter changes; `base()` turns it off."""

    def __init__(self, net: nn.Module, source: int) -> None:
        super().__init__()
        self.net, self.adapter, self.drop = net.requires_grad_(False), nn.Linear(2, 2), nn.Dropout(0.5)
        self.on = True
        g = stream(source, "source")
        for p in net.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g, device="cpu") / max(1, p[0].numel()) ** 0.5)

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        heads = self.net(x, c, **inputs)
        return tuple(h + self.adapter(h) for h in heads) if self.on else tuple(map(self.drop, heads))

    @contextmanager
    def base(self) -> Generator[None, None, None]:
        """The adapter is off inside."""
        self.on = False
        try:
            yield
        finally:
            self.on = True


def adapt(monkeypatch: pytest.MonkeyPatch, source: int = 0) -> None:
    """Let every perceptron be one of another model's weights from here on."""

    def build(self: MLP, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
        return Adapted(BUILD(self, needs, shape, classes), source)

    monkeypatch.setattr(MLP, "build", build)


def freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the blocks of every DiT be frozen from here on."""
    build_all = DiT.build

    def build(self: DiT, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
        net = build_all(self, needs, shape, classes)
        net.get_submodule("blocks").requires_grad_(False)
        return net

    monkeypatch.setattr(DiT, "build", build)


def apart(run: Run, device: torch.device) -> Readings:
    """What the frozen weights tell, of a net that is not in training."""
    net = build(run, device).get_submodule("net")
    return Readings(velocity=lambda x, t, c: net(x, c, t=t)[0])
