"""Routing in models of diffusers: what their blocks see, the derivative through it, and that nothing else changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.case import randomise
from dumo.flow.draw import draw
from dumo.flow.dropout import keys, using
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope, JvpSlope, Slope
from dumo.nets.dualized import Dualized
from dumo.nets.route import Route, TokenSplit
from dumo.objectives import DuMo
from dumo.run import cost
from dumo.types import Frozen, UserError, frozen
from transformers_saved import CLASSES, SHAPE, Saved, asked, batch, built, of

ROWS, TOKENS, TEXT = 3, 16, 7
KEYS, ROUTE = keys(0, 0, ROWS), Route(share=0.75, first=1, last=1)
DEEP = {"sd3": {"num_layers": 4}, "flux": {"num_layers": 2, "num_single_layers": 2}}
MODELS = pytest.mark.parametrize("name", DEEP)
Made = Callable[..., Dualized]
OBJECTIVE = DuMo(slope=DualSlope(), drop=0.0, guide=Guide(zeta=0.5))


@pytest.fixture
def made(folder: Saved, tmp_path: Path) -> Made:
    """Nets of four blocks, the second and the third routed, in training."""

    def net(name: str, route: Route | None = ROUTE, **fields: object) -> Dualized:
        config = json.loads((folder(name).pipeline.folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | DEEP[name]))
        spec = of(tmp_path, weights="drawn", lowpass=10.0)
        return randomise(built(spec, texts=folder(name).texts, route=route, **fields)).train()

    return net


def gradient(net: Dualized, slope: Slope) -> Tensor:
    """Of a guided step."""
    objective, (x, c, _) = OBJECTIVE.model_copy(update={"slope": slope}), batch(ROWS)
    b = draw(objective, Linear(), x.to(net.heads["v"].out.weight), c, CLASSES, seed=0, step=0)
    with using(KEYS):
        loss = objective.loss(net, frozen(net), b).loss.mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@MODELS
def test_a_block_sees_some_of_the_image_at_its_places_and_all_of_the_text(name: str, made: Made) -> None:
    """By hand: each row alone, with the rotary places of its own tokens."""
    net, (x, c, t), seen = made(name), batch(ROWS), dict[int, tuple[dict[str, Any], Any]]()
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _, args, named, out, i=i: seen.update({i: (named, out)}), with_kwargs=True)
    with using(KEYS):
        net(x, c, t=t)
    split, tables = TokenSplit(KEYS, TOKENS, 4), seen[0][0].get("image_rotary_emb", ())
    for i, n in enumerate([16, 4, 4, 16]):
        named, _ = seen[i]
        assert named["hidden_states"].shape[1] == n
        assert named["encoder_hidden_states"].shape[1] == TEXT
    for row in range(ROWS):
        there, skipping, one = split.processed[row], split.skipped[row], slice(row, row + 1)
        before, after = seen[0][1][1][row], seen[3][0]["hidden_states"][row]
        assert torch.equal(seen[1][0]["hidden_states"][row], before[there])
        assert torch.equal(after[there], seen[2][1][1][row])
        assert torch.equal(after[skipping], before[skipping])
        kept = torch.cat([torch.arange(TEXT), TEXT + there])
        near = {"image_rotary_emb": tuple(table[kept] for table in tables)} if tables else {}
        given = {key: seen[1][0][key][one] for key in ("hidden_states", "encoder_hidden_states", "temb")}
        text, h = net.blocks[1].forward(**given, **near)  # no hook
        assert torch.allclose(h[0], seen[1][1][1][row], atol=1e-5)
        assert torch.allclose(text[0], seen[1][1][0][row], atol=1e-5)


@pytest.mark.slow
@MODELS
def test_the_derivative_is_that_of_the_routed_net(name: str, made: Made) -> None:
    """In float64: what rides, before or after its direction is known, is torch.func.jvp's; and a step's gradient."""
    net, (x, c, t) = made(name).double(), (part.double() if part.is_floating_point() else part for part in batch(ROWS))
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()

    def rate(slope: Slope, toward: Tensor | None = None) -> Tensor:
        return torch.cat(slope(net, Frozen(net), x, c, t=t, toward=toward)[1](w))

    limit = 1e-10 if name == "sd3" else 1e-5  # Flux turns in float32
    with using(KEYS):
        exact = rate(JvpSlope())
        for found in (rate(DualSlope()), rate(DualSlope(), w)):
            assert (found - exact).norm() < limit * exact.norm()
    with using(None):
        assert (rate(DualSlope()) - exact).norm() > 1e-2 * exact.norm()
    one, other = (gradient(made(name).double(), slope) for slope in (DualSlope(), JvpSlope()))
    assert (one - other).norm() < limit * other.norm()


@MODELS
def test_sampling_and_export_are_dense(name: str, made: Made) -> None:
    """To the bit; keys decide in training, and without them it raises."""
    net, dense, (x, c, t) = made(name), made(name, None), batch(2)
    assert net.state_dict().keys() == dense.state_dict().keys()
    plain = dense(x, c, t=t)
    with using(keys(0, 0, 2)):
        routed, again = net(x, c, t=t), net(x, c, t=t)
        still = net.eval()(x, c, t=t)
    stock, other = (one.single_head_model("u", merged=True) for one in (net, dense))
    assert torch.equal(routed[0], again[0])
    assert not torch.allclose(routed[0], plain[0], atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(still, plain, strict=True))
    assert stock.config == other.config
    assert torch.equal(asked(name, stock, x, c, t), asked(name, other, x, c, t))
    with pytest.raises(RuntimeError, match="routes, and has no keys"):
        net.train()(x, c, t=t)


@pytest.mark.slow
@MODELS
def test_blocks_that_are_computed_again_meet_the_same_tokens(name: str, made: Made) -> None:
    plain, lean, half = (gradient(made(name, checkpoint=every), DualSlope()) for every in (False, True, 2))
    assert all((plain - other).norm() < 1e-4 * plain.norm() for other in (lean, half))


@pytest.mark.nightly
@MODELS
def test_what_is_counted_is_what_a_step_does(name: str, made: Made) -> None:
    net, (x, c, _) = made(name), batch(4)
    b = draw(OBJECTIVE, Linear(), x, c, CLASSES, seed=0, step=0)

    def step() -> None:
        with using(keys(0, 0, 4)):
            OBJECTIVE.loss(net, frozen(net), b).loss.sum().backward()

    units = cost.forward_units(net, OBJECTIVE, Linear(), SHAPE, rows=4)
    dense = cost.forward_units(made(name, None), OBJECTIVE, Linear(), SHAPE, rows=4)
    assert cost.flops(step) / (4 * cost.forward_flops(net, OBJECTIVE, SHAPE)) == pytest.approx(units, rel=1e-9)
    assert units < 0.9 * dense


def test_what_cannot_route_is_refused(folder: Saved, made: Made) -> None:
    for name in ("chroma", "sana"):
        with pytest.raises(UserError, match=r"SD3 and Flux alone route: set net\.route=null"):
            built(folder(name), route=ROUTE)
    with pytest.raises(UserError, match=r"net\.route leaves no block.*of 4"):
        made("flux", Route(share=0.5, first=2, last=2))
