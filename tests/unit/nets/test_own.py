"""Inputs of some heads alone: they reach these heads' own output layers, and nothing else."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contract.case import kind, nets
from dumo.nets import DiT, Net
from dumo.nets.block import normalize
from dumo.types import Needs
from unit.nets import given
from unit.nets.given import drawn

each = pytest.mark.parametrize("net", nets(), ids=kind)
SHAPE = (2, 4, 4)
PLAIN = Needs(heads=("v", "u", "m"), gauges=("doubt",), knobs={"w": 1.0})
TOLD = Needs(heads=("v", "u", "m"), gauges=("doubt",), knobs={"w": 1.0}, own={"m": ("r",)})
THREE = Needs(heads=("v", "u", "m"), own={"m": ("r",)})


def points() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, c and times."""
    x, c, t = given.points(5, SHAPE, 3)
    return x, c, {"t": t, "r": t / 3}


def test_names_of_all_that_a_pass_is_given() -> None:
    needs = Needs(inputs=("t", "r"), heads=("a", "b", "d"), knobs={"w": 1.0}, own={"b": ("s", "r"), "d": ("s", "q")})
    assert needs.shared == ("t", "r", "w")
    assert needs.names == ("t", "r", "w", "s", "q")


@each
def test_r_reaches_its_head_and_no_other(net: Net) -> None:
    x, c, times = points()
    model, w = drawn(net, TOLD, SHAPE, 3), torch.ones(5).double()
    one, two = (model(x, c, w=w, **times | {"r": times["t"] * share}) for share in (0.2, 0.9))
    for i in (0, 1, 3):  # v, u and the gauge
        assert torch.equal(one[i], two[i])
    assert ((one[2] - two[2]).abs().flatten(1).amax(1) > 1e-3).all()


@each
def test_a_head_that_is_told_nothing_by_its_embedding_is_as_any_other(net: Net) -> None:
    """And a net of the same weights whose heads are all told the same gives v, u and the gauge bit by bit."""
    x, c, times = points()
    w = torch.ones(5).double()
    model, plain = drawn(net, TOLD, SHAPE, 3), drawn(net, PLAIN, SHAPE, 3)
    plain.load_state_dict({key: p for key, p in model.state_dict().items() if not key.startswith("own.")})
    expected, found = plain(x, c, t=times["t"], w=w), model(x, c, w=w, **times)
    assert all(torch.equal(expected[i], found[i]) for i in (0, 1, 3))
    assert not torch.allclose(expected[2], found[2])
    for name, p in model.named_parameters():
        if name.startswith("own.") and ".2." in name:  # the last layers of its embeddings
            p.data.zero_()
    assert torch.allclose(model(x, c, w=w, **times)[2], expected[2], rtol=1e-12)


def test_a_head_of_the_transformer_by_hand() -> None:
    """Its own embedding is added to the condition before the SiLU; the blocks never see it."""
    spec = DiT(patch=2, width=8, depth=1, attention=2)
    model, (x, c, times) = drawn(spec, THREE, SHAPE, 3), points()
    seen = list[tuple[Tensor, ...]]()
    model.heads["v"].register_forward_pre_hook(lambda _, args: seen.append(args))
    found = model(x, c, **times)[2]
    told = model.scalars(t=times["t"]) + model.label(c) + model.own.heads["m"](**times)
    head = model.heads["m"]
    shift, scale = head.modulation(F.silu(told))[:, None].chunk(2, -1)
    made = head.out(normalize(seen[0][0]) * (1 + scale) + shift)
    assert torch.allclose(model._join_patches(made, (model.grid, model.grid)), found)


def test_a_head_of_the_unet_by_hand() -> None:
    """Shift and scale of its norm."""
    (spec,) = (net for net in nets() if net.kind == "unet")
    model, (x, c, times) = drawn(spec, THREE, SHAPE, 3), points()
    seen = list[Tensor]()
    model.heads["v"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = model(x, c, **times)[2]
    shift, scale = model.own.heads["m"](**times)[:, :, None, None].chunk(2, 1)
    norm, _, convolve = model.heads["m"]
    assert torch.allclose(convolve(F.silu(norm(seen[0]) * (1 + scale) + shift)), found)
