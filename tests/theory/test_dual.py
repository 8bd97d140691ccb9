"""Dual numbers through whole nets: exact on every way that the slope may take, and the net itself none the wiser."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from math import sqrt

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contract.case import SMALL, nets
from dumo.autodiff.dual import NoRule
from dumo.flow import slope
from dumo.nets import DiT
from dumo.testing.network import randomise
from dumo.types import Array, Frozen, Heads, Needs, UserError

D = torch.float64
NEEDS = Needs(inputs=("t", "r"), heads=("v", "u"))
SHAPE, CLASSES, BATCH = (2, 8, 8), 3, 6
WAYS = ("deferred", "fused", "separate")
MOVING: dict[str, tuple[bool, ...] | None] = {
    "all": None,
    "every row": (True,) * BATCH,
    "some": (True, False, True, True, False, False),
    "none": (False,) * BATCH,
}


def waves(t: Array, width: int) -> Array:
    """Of a number per row, as in diffusers."""
    rate = torch.exp(-torch.arange(width // 2, dtype=torch.float32) / width).to(t.dtype)
    angles = 2 * t[:, None] * rate[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


class Clock(nn.Module):
    """Times and label to a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.label = width, nn.Embedding(CLASSES + 1, width)
        self.net = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c: Tensor, t: Array, r: Array) -> Array:
        return self.net(torch.cat((waves(t, self.width), waves(t - r, self.width)), 1)) + self.label(c)


def turn(x: Array, angles: Tensor) -> Array:
    """Rotary positions, without complex numbers."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return (x * angles.cos() + turned * angles.sin()).type_as(x)


def turn_complex(x: Array, angles: Tensor) -> Array:
    """The same by complex numbers, as in Lumina and Z-Image."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = torch.view_as_complex(z.reshape(*x.shape[:-1], -1, 2).contiguous())
    unit = torch.polar(torch.ones_like(angles[..., ::2]), angles[..., ::2]).to(torch.complex128)
    return torch.view_as_real(z * unit.to(z.dtype)).flatten(-2).type_as(x)


class Modern(nn.Module):
    """RMSNorm, qk-norm, rotary positions, SwiGLU, cross-attention to tokens of text, LayerNorm with weights."""

    def __init__(self, rotary: Callable[[Array, Tensor], Array] = turn, drop: float = 0.0) -> None:
        super().__init__()
        width, heads = 16, 2
        self.heads, self.rotary, self.drop, n = heads, rotary, drop, width // heads
        self.embed, self.clock, self.text = nn.Linear(8, width), Clock(width), nn.Embedding(CLASSES + 1, 5 * width)
        self.modulation = nn.Linear(width, 6 * width)
        self.before, self.between = nn.RMSNorm(width, eps=1e-6), nn.LayerNorm(width)
        self.after = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(n), nn.RMSNorm(n, eps=1e-5)
        self.ask, self.answer = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.last = nn.Linear(width, 16)

    def split(self, x: Array) -> Array:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Array, c: Tensor, /, *, t: Array, r: Array) -> Heads:
        b, ch, side, _ = x.shape
        h = self.embed(x.view(b, ch, side // 2, 2, side // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(F.silu(self.clock(c, t, r))).chunk(6, 1)
        a = self.before(h) * (1 + scale_1[:, None]) + shift_1.unsqueeze(1)
        q, k, v = (self.split(y) for y in torch.chunk(self.qkv(a), 3, dim=-1))
        place = torch.arange(q.shape[2], dtype=torch.float32)[:, None] / torch.arange(1.0, 5.0).repeat_interleave(2)
        q, k = (self.rotary(y, place) for y in (self.norm_q(q), self.norm_k(k)))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, h.shape[-1])
        h = h + torch.tanh(gate_1)[:, None] * self.out(a)
        text = self.text(c).view(b, 5, -1)
        k, v = (self.split(y) for y in self.answer(text).chunk(2, -1))
        h = h + F.scaled_dot_product_attention(self.split(self.ask(self.between(h))), k, v).transpose(1, 2).flatten(2)
        gate, value = self.up(torch.addcmul(shift_2[:, None], self.after(h), scale_2[:, None] + 1)).chunk(2, dim=-1)
        h = torch.lerp(h, h + gate_2[:, None] * self.down(F.silu(gate) * value), 0.7)
        h = F.dropout(h, p=self.drop, training=self.training)
        y = self.last(F.normalize(h, dim=-1) * sqrt(h.shape[-1]))
        y = y.reshape(b, side // 2, side // 2, 2 * ch, 2, 2)
        v, u = torch.einsum("bhwcpq->bchpwq", y).reshape(b, 2 * ch, side, side).split([ch, ch], 1)
        return v, u


SIZES = {k: v for k, v in SMALL.items() if k in DiT.model_fields}
LATER = DiT(**SIZES, modern=True, magnitude="preserved")
BUILD: dict[str, Callable[[], nn.Module]] = {
    **{spec.kind: partial(spec.build, NEEDS, SHAPE, CLASSES) for spec in nets()},
    "dit with all options": partial(LATER.build, NEEDS, SHAPE, CLASSES),
    "modern": Modern,
    "complex": partial(Modern, rotary=turn_complex),
}
each_net = pytest.mark.parametrize("name", BUILD)
each_way = pytest.mark.parametrize("way", WAYS)
quiet = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # rms_norm under autocast


def made(name: str, dtype: torch.dtype = D) -> nn.Module:
    return randomise(BUILD[name]()).to(dtype).train()


def record(dtype: torch.dtype = D) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, c, t, r, w, in every corner of time."""
    g = torch.Generator().manual_seed(7)
    x, w = torch.randn(2, BATCH, *SHAPE, generator=g, dtype=D)
    t, r = torch.tensor([0.0, 1.0, 1.0, 0.3, 0.6, 0.9], dtype=D), torch.tensor([0.0, 0.0, 1.0, 0.1, 0.6, 0.5], dtype=D)
    return x.to(dtype), torch.arange(BATCH) % CLASSES, t.to(dtype), r.to(dtype), w.to(dtype)


def known(net: nn.Module) -> Heads:
    """The slope by torch, in float64."""
    exact, (x, c, t, r, w) = deepcopy(net).to(D), record()
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        _, slopes = torch.func.jvp(lambda x, t: exact(x, c, t=t, r=r), (x, t), (w, torch.ones_like(t)))
    return slopes


@cache
def known_of(name: str, dtype: torch.dtype = D) -> Heads:
    return known(made(name, dtype))


def run(
    net: nn.Module, way: str, moving: tuple[bool, ...] | None = None, dtype: torch.dtype = D
) -> tuple[Heads, Heads]:
    """Heads and slopes; the way is checked to be the one asked for."""
    x, c, t, r, w = record(dtype)
    ref = Frozen(deepcopy(net) if way == "separate" else net)
    exact = slope.DualSlope()
    made = "separate" if way == "deferred" and moving is not None else way  # deferring needs all rows
    assert exact.strategy(net, ref, known=way == "fused", moving=moving).name == made
    torch.manual_seed(0)
    heads, along = exact(net, ref, x, c, t=t, r=r, direction=w if way == "fused" else None, moving=moving)
    torch.manual_seed(0)
    return heads, along(w)


def gradients(net: nn.Module, heads: Heads) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(8)
    net.zero_grad(set_to_none=True)
    sum((h * torch.randn(h.shape, generator=g).to(h)).sum() for h in heads).backward()
    return [p.grad for p in net.parameters()]


def plain(net: nn.Module, dtype: torch.dtype = D) -> Heads:
    x, c, t, r, _ = record(dtype)
    torch.manual_seed(0)
    return net(x, c, t=t, r=r)


def error(found: Heads, truth: Heads) -> float:
    """The worst head's, relative to its size."""
    pairs = zip((a.detach().double() for a in found), (b.detach() for b in truth), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)


def same(found: list[Tensor | None], truth: list[Tensor | None]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@each_net
@each_way
def test_the_slope_is_that_of_torch_and_the_net_is_itself(name: str, way: str) -> None:
    net = made(name)
    truth = plain(net)
    known_gradients = gradients(net, truth)
    assert sum(g is not None for g in known_gradients) > len(known_gradients) - 3
    for moving in (MOVING["all"], MOVING["some"], MOVING["none"]):
        heads, slopes = run(net, way, moving)
        rows = torch.tensor(moving or [True] * BATCH).view(-1, 1, 1, 1)
        slopes_of_torch = tuple(d * rows for d in known_of(name))
        assert rows.any() == any(bool(d.any()) for d in slopes_of_torch)
        assert not any(d.requires_grad for d in slopes)
        assert error(slopes, slopes_of_torch) < 1e-12, moving
        if way != "fused" or moving is not MOVING["some"]:  # a fused pass of some rows is two passes
            assert all(torch.equal(a, b) for a, b in zip(heads, truth, strict=True))
            assert moving or same(gradients(net, heads), known_gradients)


@quiet
@pytest.mark.parametrize("name", sorted(set(BUILD) - {"complex"}))  # the same net as modern
@each_way
def test_bf16_is_as_good_for_the_slope_as_for_the_net(name: str, way: str) -> None:
    net = made(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        truth = plain(net, torch.float32)
        heads, slopes = run(net, way, None, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(heads, truth, strict=True))
    assert same(gradients(net, heads), gradients(net, truth))
    assert error(slopes, known_of(name, torch.float32)) < 0.02


@quiet
@each_net
def test_bf16_weights_do_no_harm(name: str) -> None:
    """The direction may be of more precision than the net."""
    net = made(name, torch.bfloat16)
    x, c, t, r, w = record(torch.bfloat16)
    _, along = slope.DualSlope()(net, Frozen(net), x, c, t=t, r=r)
    slopes = along(w.float())
    assert all(d.dtype == torch.bfloat16 for d in slopes)
    assert error(slopes, known_of(name, torch.bfloat16)) < 0.1


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_dropout_moves_with_its_mask(way: str, dtype: torch.dtype) -> None:
    net = randomise(Modern(drop=0.3)).to(dtype).train()
    truth = plain(net, dtype)
    heads, slopes = run(net, way, None, dtype)
    assert all(torch.equal(a, b) for a, b in zip(heads, truth, strict=True))
    assert same(gradients(net, heads), gradients(net, plain(net, dtype)))
    assert error(slopes, known(net)) < (1e-12 if dtype == D else 1e-5)
    assert error(slopes, known(net.eval())) > 0.1


# What a slope owes beyond numbers.


class Parts(nn.Module):
    """Heads that the moving inputs reach by x, by t, by r alone and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0, dtype=D))

    def forward(self, x: Array, c: Tensor, /, *, t: Array, r: Array) -> Heads:
        one = torch.ones_like(x)
        return self.a * x, one * t.view(-1, 1, 1, 1) ** 2, one * self.a * r.view(-1, 1, 1, 1), one * self.a, t * r


@each_way
@pytest.mark.parametrize("moving", MOVING.values(), ids=MOVING)
def test_what_the_moving_inputs_do_not_reach_rests(way: str, moving: tuple[bool, ...] | None) -> None:
    *_, t, r, w = record()
    rows = torch.tensor(moving or [True] * BATCH, dtype=D)
    lift = rows.view(-1, 1, 1, 1)
    _, (by_x, by_t, by_r, constant, gauge) = run(Parts(), way, moving)
    assert torch.equal(by_x, 2 * w * lift)
    assert torch.equal(by_t, (2 * t).view(-1, 1, 1, 1).expand_as(w) * lift)
    assert torch.equal(by_r, torch.zeros_like(w))
    assert torch.equal(constant, torch.zeros_like(w))
    assert torch.equal(gauge, r * rows)


class Strange(nn.Module):
    """A net with an operation that has no rule."""

    def __init__(self, operation: Callable[[Array], Array]) -> None:
        super().__init__()
        self.operation, self.a = operation, nn.Parameter(torch.ones((), dtype=D))

    def forward(self, x: Array, c: Tensor, /, *, t: Array, r: Array) -> Heads:
        return (self.operation(self.a * x),)


def add_in_place(x: Array) -> Array:
    x += 1
    return x


@each_way
@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: x.detach(), "detach"),
        (torch.special.bessel_j0, "bessel_j0"),
        (lambda x: x.add_(1), "add_"),
        (add_in_place, "__iadd__"),
        (nn.SiLU(inplace=True), "silu"),
        (lambda x: torch.normal(x, 1.0), "normal"),
    ],
)
def test_a_missing_rule_is_named(way: str, operation: Callable[[Array], Array], name: str) -> None:
    with pytest.raises(NoRule, match=name) as refused:
        run(Strange(operation), way)
    assert isinstance(refused.value, UserError)
    assert "jvp" in str(refused.value)


# Checkpointing.


def transformers() -> tuple[nn.Module, nn.Module]:
    """The same DiT, without checkpointing and with it."""
    one, other = (DiT(**SIZES, checkpoint=lean).build(NEEDS, SHAPE, CLASSES) for lean in (False, True))
    return randomise(one).to(D), randomise(other).to(D)


@pytest.mark.parametrize("way", ["fused", "separate"])
def test_a_checkpointed_net_keeps_its_bits(way: str) -> None:
    full, lean = transformers()
    heads, slopes = run(lean, way)
    truth = plain(full)
    assert all(torch.equal(a, b) for a, b in zip(heads, truth, strict=True))
    assert same(gradients(lean, heads), gradients(full, truth))
    assert error(slopes, known(full)) < 1e-12


def test_a_checkpointed_net_has_no_tape() -> None:
    _, lean = transformers()
    way = slope.DualSlope().strategy(lean, Frozen(lean), known=False)
    assert way.name == "separate"
    assert "checkpointing" in way.reason


def cost(net: nn.Module, way: str | None) -> int:
    """Floating-point operations of a pass and its backward pass, fused or without."""
    with FlopCounterMode(display=False) as counter:
        gradients(net, plain(net) if way is None else run(net, way)[0])
    return counter.get_total_flops()


@pytest.mark.slow
def test_a_ride_costs_what_a_tape_does_and_a_checkpoint_computes_no_tangent_again() -> None:
    full, lean = transformers()
    assert cost(full, "fused") == cost(full, "deferred")
    tangent = cost(full, "fused") - cost(full, None)
    assert cost(lean, "fused") - cost(lean, None) == tangent > 0
