"""The low-pass of a time embedder: which waves there are, how close the curve stays, that what is cut stays cut."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transformers_tiny as tiny
from dumo.nets.dualized import Dualized
from dumo.nets.family import FAMILIES
from dumo.nets.lowpass import frequencies, layers, lowpass, waves
from dumo.nets.text import table
from transformers_saved import CLASSES, GUIDANCE, SHAPE, batch

NAMES = [name for name in tiny.TINY if not name.startswith("chroma")]


def dualized(name: str, limit: float | None = None, *, smooth: bool = False) -> Dualized:
    """A tiny model with a head v."""
    model: Any = tiny.TINY[name].model()
    row = FAMILIES[tiny.TINY[name].kind]
    net = Dualized(
        *(model, row, table(None, row, model.config, CLASSES), ("v",), row.patch(model.config, SHAPE[0])),
        guidance=GUIDANCE.get(name),
    )
    turn = row.turn(model.config)
    for path in net._embedders():
        embedder = model.get_submodule(path)
        if smooth:
            slow(layers(embedder)[1], turn)
        if limit is not None:
            lowpass(embedder, turn, limit)
    return net


def slow(first: nn.Linear, turn: float) -> None:
    """Quick waves weigh little, as in a net that was trained: by the square of their frequency."""
    with torch.no_grad():
        first.weight.mul_((10 / frequencies(first.in_features, turn)).clamp(max=1).square())


@pytest.mark.parametrize("name", NAMES)
def test_waves_are_those_that_the_model_makes(name: str) -> None:
    net = dualized(name)
    x, c, t = batch()
    count = 1 - t if net.row.backward else t
    for path in net._embedders():
        _, first, _ = layers(net.model.get_submodule(path))
        seen: list[Tensor] = []
        first.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        net(x, c, t=t)
        w = frequencies(first.in_features, net.row.turn(net.config))
        assert torch.allclose(seen[0].double(), waves(count.double(), w), atol=2e-4)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sana-sprint"])
def test_a_smooth_net_stays_what_it_is(name: str) -> None:
    """|dv| / |v| <= 1 % at all times, and its rate of change by a central difference is within as much."""
    old, new = (dualized(name, limit, smooth=True) for limit in (None, 10.0))
    x, c, _ = batch(6)
    t = torch.linspace(0.05, 1, 6)
    with torch.no_grad():
        v, w = old(x, c, t=t)[0], new(x, c, t=t)[0]
    assert (w - v).norm() / v.norm() < 0.01
