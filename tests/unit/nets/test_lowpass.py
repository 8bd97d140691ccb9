"""The low-pass of a time embedder: which waves there are, how close the curve stays, that what is cut stays cut."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transformers_tiny as tiny
from dumo.nets.dualized import Dualized, time_embedder_paths
from dumo.nets.family import FAMILIES
from dumo.nets.lowpass import LowpassFit, MaskedLinear, cut, frequencies, linear_layers, refit, waves
from dumo.nets.pretrained import Pretrained
from dumo.nets.text_rows import Codes
from tiers import tiered
from transformers_saved import CLASSES, GUIDANCE, SHAPE, batch

# But for models of diffusions, whose waves are of an index (test_diffusion.py).
NAMES = [
    name for name in tiny.TINY if not name.startswith("chroma") and not FAMILIES[tiny.TINY[name].kind].is_diffusion
]


def dualized(name: str, limit: float | None = None, *, smooth: bool = False) -> Dualized:
    """A tiny model with a head v."""
    model: Any = tiny.TINY[name].model()
    row = FAMILIES[tiny.TINY[name].kind]
    net = Dualized(
        *(
            model,
            row,
            Pretrained(texts=Codes()).text_rows(row, model.config, CLASSES),
            ("v",),
            row.patch(model.config, SHAPE[0]),
        ),
        guidance=GUIDANCE.get(name),
    )
    turn = row.max_frequency(model.config)
    for path in time_embedder_paths(net.model, net.family):
        embedder = model.get_submodule(path)
        if smooth:
            slow(linear_layers(embedder)[1], turn)
        if limit is not None:
            lowpass(embedder, turn, limit)
    return net


def lowpass(embedder: nn.Module, turn: float, limit: float) -> LowpassFit:
    """Cut and refitted."""
    return refit(embedder, turn, cut(embedder, turn, limit))


def slow(first: nn.Linear, turn: float) -> None:
    """Quick waves weigh little, as in a net that was trained: by the fourth power of their frequency."""
    with torch.no_grad():
        first.weight.mul_((10 / frequencies(first.in_features, turn)).clamp(max=1).pow(4))


@pytest.mark.parametrize("name", NAMES)
def test_waves_are_those_that_the_model_makes(name: str) -> None:
    net = dualized(name)
    x, c, t = batch()
    count = 1 - t if net.family.has_reversed_time else t
    for path in time_embedder_paths(net.model, net.family):
        _, first, _ = linear_layers(net.model.get_submodule(path))
        seen: list[Tensor] = []
        first.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        net(x, c, t=t)
        w = frequencies(first.in_features, net.family.max_frequency(net.config))
        assert torch.allclose(seen[0].double(), waves(count.double(), w), atol=2e-4)


SLOW_ALREADY = ("sana-sprint", "lumina2")  # they read t, not 1000 t


@pytest.mark.parametrize("name", tiered([name for name in NAMES if name != "z-image-lengths"], ci=["sd3"]))
def test_a_smooth_net_stays_what_it_is(name: str) -> None:
    """|dv| / |v| <= 1 % over all times; to the bit where waves are slow."""
    slow = name in SLOW_ALREADY
    old, new = (dualized(name, limit, smooth=not slow) for limit in (None, 10.0))
    x, c, _ = batch(8)
    t = torch.linspace(0, 1, 8)
    with torch.no_grad():
        v, w = old(x, c, t=t)[0], new(x, c, t=t)[0]
    assert (w - v).norm() / v.norm() < 0.01
    assert torch.equal(w, v) == slow


@pytest.mark.nightly
def test_what_is_cut_stays_cut() -> None:
    """Whatever moves the columns, the net does not see it; and no step of AdamW, decay included, moves them."""
    net = dualized("sd3")
    fit = lowpass(net.model.get_submodule(path := time_embedder_paths(net.model, net.family)[0]), 1000.0, 10.0)
    assert (fit.kept, fit.waves, fit.limit) == (128, 256, 10.0)
    assert fit.error is not None
    assert f"{100 * fit.error:.2g} %" in str(fit)
    first = linear_layers(net.model.get_submodule(path))[1]
    assert isinstance(first, MaskedLinear)
    quick = frequencies(first.in_features, 1000.0) > 10
    assert quick.sum() == len(quick) // 2
    assert not first.weight[:, quick].any()
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.1)
    x, c, t = batch()
    for _ in range(3):
        optimizer.zero_grad()
        net(x, c, t=t)[0].square().mean().backward()
        optimizer.step()
    assert not first.weight[:, quick].any()
    before = net(x, c, t=t)[0]
    with torch.no_grad():
        first.weight[:, quick] = 1.0
    assert torch.equal(net(x, c, t=t)[0], before)
    assert not first.plain().weight[:, quick].any()


@pytest.mark.nightly
def test_a_refit_is_a_function() -> None:
    """The same on every call, whatever torch's generator, which it leaves as it was. What is fixed stays fixed."""
    one, two = (nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    state = torch.get_rng_state()
    for embedder in (one, two):
        linear_layers(embedder)[2].bias.requires_grad_(False)
    fixed = one[2].bias.clone()
    lowpass(one, 1000.0, 10.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    lowpass(two, 1000.0, 10.0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(one[2].bias, fixed)
    assert [p.requires_grad for p in two.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in two.parameters())
