"""The transformer: its size, its patches, its attention, its start, its refusals."""

from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dumo.config.load import load
from dumo.nets.block import Block, BlockSizes, swiglu_width
from dumo.nets.dit import DiT, DiTHead, Transformer
from dumo.nets.embed import apply_rotary, rotary_tables
from dumo.objectives import DuMo, FlowMatching, MeanFlow, Objective
from dumo.run.flops import forward_flops
from dumo.run.net import meta_net as outline_of_run
from dumo.testing.network import randomise
from dumo.types import Needs, UserError
from unit.nets.given import drawn, points

TINY = DiT(patch=2, width=8, depth=2, attention=2)
V, VU, MF = Needs(heads=("v",)), Needs(heads=("v", "u")), MeanFlow().needs
MODERN: dict[str, Any] = {"modern": True}
KEPT: dict[str, Any] = {"magnitude": "preserved"}
LATENT, LARGE, DEEP = (4, 32, 32), (4, 64, 64), (32, 16, 16)  # SD-VAE at 256 and 512, DC-AE at 512


def count(net: nn.Module) -> int:
    """Parameters and the fixed table of positions, as DiT counts."""
    positions = dict(net.named_buffers()).get("positions", torch.empty(0))
    return sum(p.numel() for p in net.parameters()) + positions.numel()


def meta_net(spec: DiT, needs: Needs, shape: tuple[int, ...]) -> Transformer:
    """A net for the classes of ImageNet without numbers."""
    with torch.device("meta"):
        return spec.build(needs, shape, 1000)


@pytest.mark.parametrize(
    ("spec", "needs", "shape", "millions"),
    [
        (DiT(), V, LATENT, 675.111),
        (DiT(), VU, LATENT, 677.786),
        (DiT.size("XL", patch=4), VU, LARGE, 677.952),
        (DiT.size("XL", patch=1), VU, DEEP, 677.841),
        (DiT.size("XL", modern=True), V, LATENT, 674.863),
        (DiT.size("L"), V, LATENT, 458.086),
        (DiT.size("B"), V, LATENT, 130.500),
        (DiT.size("S"), V, LATENT, 32.957),
    ],
)
def test_sizes(spec: DiT, needs: Needs, shape: tuple[int, ...], millions: float) -> None:
    """The paper's 675 M, DiT's 33, 130, 458 and 675 M."""
    assert round(count(meta_net(spec, needs, shape)) / 1e6, 3) == millions


@pytest.mark.parametrize(("objective", "needs"), [(FlowMatching(), V), (DuMo(), VU)])
def test_a_pass_of_xl_2_is_119_billion_multiply_adds(objective: Objective, needs: Needs) -> None:
    """DiT: 118.6. The second head costs 7 million."""
    assert forward_flops(meta_net(DiT(), needs, LATENT), objective, LATENT) / 2 == pytest.approx(118.62e9, abs=5e6)


def test_a_size_is_its_numbers() -> None:
    assert DiT.size("XL", patch=4) == DiT(width=1152, depth=28, attention=16, patch=4)
    with pytest.raises(UserError, match=r"size 'H'.*S, B, L, XL"):
        DiT.size("H")


@pytest.mark.parametrize(("shape", "p"), [((2, 6, 6), 2), ((1, 6, 9), 3), ((4, 8, 6), 1), ((2, 4, 4), 4)])
def test_tokens_are_squares_row_by_row(shape: tuple[int, ...], p: int) -> None:
    """And go back to their places, whatever shape the net was built for."""
    net = TINY.model_copy(update={"patch": p}).build(V, (shape[0], 12, 12), 0)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    tokens, (rows, columns) = net._cut_patches(x, grid := (shape[1] // p, shape[2] // p)), grid
    squares = [x[:, :, p * i : p * i + p, p * j : p * j + p].flatten(1) for i in range(rows) for j in range(columns)]
    assert torch.equal(tokens, torch.stack(squares, 1))
    assert torch.equal(net._join_patches(tokens, grid), x)


@pytest.mark.parametrize("modern", [False, True])
def test_a_patch_has_the_same_place_in_every_shape(modern: bool) -> None:
    """By row and column: a net built for another square gives the same samples of any shape."""
    nets = [TINY.model_copy(update={"modern": modern}).build(V, (3, side, side), 0) for side in (4, 12)]
    randomise(nets[0])
    mine = {name: x for name, x in nets[0].state_dict().items() if name != "positions"}
    nets[1].load_state_dict(mine, strict=False)
    t, c = torch.tensor([0.2, 0.7]), torch.zeros(2, dtype=torch.long)
    for shape in ((4, 4), (12, 12), (4, 12), (12, 6)):
        x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
        (a,), (b,) = (net(x, c, t=t) for net in nets)
        assert a.shape == x.shape
        assert torch.equal(a, b)
    turned = nets[0](x.mT, c, t=t)[0].mT
    assert not torch.allclose(turned, a, atol=1e-3)  # height is not width


def test_attention_by_hand() -> None:
    block = Block(BlockSizes(8, 2))
    randomise(block)
    a = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = block.qkv(a).chunk(3, -1)
    mixed = torch.empty_like(a)
    for head in (slice(0, 4), slice(4, 8)):
        weight = (q[..., head] @ k[..., head].mT / 2).softmax(-1)
        mixed[..., head] = weight @ v[..., head]
    assert torch.allclose(block.attend(a), block.out(mixed), rtol=1e-5, atol=1e-6)


def test_block_by_hand() -> None:
    block = Block(BlockSizes(8, 2))
    randomise(block)
    g = torch.Generator().manual_seed(1)
    h, e = torch.randn(3, 5, 8, generator=g), torch.randn(3, 8, generator=g)
    m = (e @ block.modulation.weight.T + block.modulation.bias)[:, None].split(8, -1)

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    middle = h + m[2] * block.attend(norm(h) * (1 + m[1]) + m[0])
    wide = nn.functional.gelu(block.up(norm(middle) * (1 + m[4]) + m[3]), approximate="tanh")
    assert torch.allclose(block(h, e), middle + m[5] * block.down(wide), rtol=1e-4, atol=1e-5)


def test_rms_norm_by_hand() -> None:
    """A stream and the same raised by a number differ, where layer norm sees none; scaled, they are the same."""
    h, e = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 8)
    layer, rms = (DiTHead(8, 12, rms=rms) for rms in (False, True))
    randomise(layer)
    rms.load_state_dict(layer.state_dict())
    shift, scale = layer.modulation.bias.chunk(2)
    unit = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(rms(h, e), rms.out(unit * (1 + scale) + shift), rtol=1e-5, atol=1e-6)
    assert torch.allclose(rms(h, e), rms(5 * h, e), rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer(h, e), layer(h + 1, e), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rms(h, e), rms(h + 1, e), atol=1e-2)


def test_qk_norm_by_hand() -> None:
    """Scores are of queries and keys of mean square 1, so their size in the stream does not count."""
    block = Block(BlockSizes(8, 2, qk_norm=True))
    randomise(block)
    assert block.q_norm
    assert block.k_norm
    a = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in block.qkv(a).chunk(3, -1))
    q, k = (p / p.square().mean(-1, keepdim=True).sqrt() for p in (q, k))
    weight = ((q * block.q_norm.weight) @ (k * block.k_norm.weight).mT / 2).softmax(-1)
    before = block.attend(a)
    assert torch.allclose(before, block.out((weight @ v).transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)
    for p in (block.qkv.weight, block.qkv.bias):
        p.data[:16] *= 7  # queries and keys
    assert torch.allclose(block.attend(a), before, rtol=1e-4, atol=1e-5)


def test_swiglu_by_hand() -> None:
    block = Block(BlockSizes(8, 2, modern=True))
    randomise(block)
    a, hidden = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)), swiglu_width(8)
    gate, up = block.up(a)[..., :hidden], block.up(a)[..., hidden:]
    assert torch.allclose(block.apply_perceptron(a), block.down(gate * gate.sigmoid() * up), rtol=1e-5, atol=1e-6)


def test_modern_blocks_have_all_four_parts() -> None:
    """Those of the recipe's net."""
    net = outline_of_run(load("imagenet256-xl2-modern", ["net.depth=2", "net.width=16", "net.attention=2"]))
    assert isinstance(net, Transformer)
    block, head = net.blocks[0], net.heads["v"]
    assert isinstance(block, Block)
    assert isinstance(head, DiTHead)
    assert (block.q_norm is None, block.modern, head.rms, net.rotary) == (False, True, True, True)


def test_turned_scores_depend_on_the_offset_alone() -> None:
    """Of one query and one key at every two places; and on both coordinates of the offset, and on its sign."""
    side, size = 4, 8
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(size, generator=g).expand(1, 1, side**2, size) for _ in range(2))
    tables = rotary_tables(side, side, size)
    scores = (apply_rotary(q, *tables) @ apply_rotary(k, *tables).mT).view(side, side, side, side)
    seen: dict[tuple[int, int], float] = {}
    for a, b, c, d in product(range(side), repeat=4):
        score = seen.setdefault((a - c, b - d), scores[a, b, c, d].item())
        assert scores[a, b, c, d].item() == pytest.approx(score, abs=1e-5)
    assert len({round(score, 3) for score in seen.values()}) == (2 * side - 1) ** 2


@pytest.mark.parametrize("options", [{}, MODERN, KEPT], ids=["plain", "modern", "preserved"])
def test_blocks_start_as_nothing(options: dict[str, Any]) -> None:
    """adaLN-zero: a block is the identity, though its own layers are not zero."""
    net = TINY.model_copy(update=options).build(V, (3, 4, 4), 0)
    g = torch.Generator().manual_seed(0)
    h, e = torch.randn(2, 4, 8, generator=g), torch.randn(2, 8, generator=g)
    for block in net.blocks:
        assert isinstance(block, Block)
        assert torch.equal(block(h, e), h)
        assert block.qkv.weight.any()
        assert block.down.weight.any()


def test_linear_layers_start_as_xavier_draws_them() -> None:
    net = DiT(width=128, depth=1).build(V, (3, 4, 4), 0)
    (block,) = net.blocks
    assert isinstance(block, Block)
    for layer in (net.embed, block.qkv, block.up, block.down):
        assert layer.weight.std().item() == pytest.approx((2 / sum(layer.weight.shape)) ** 0.5, rel=0.05)
        assert not layer.bias.any()


@pytest.mark.parametrize("modern", [False, True])
def test_a_shuffled_picture_is_another(modern: bool) -> None:
    """By waves, or by rotary positions."""
    net = TINY.model_copy(update={"modern": modern}).build(V, (3, 4, 4), 0)
    randomise(net)
    x, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])
    shuffled = net._join_patches(net._cut_patches(x, (2, 2)).flip(1), (2, 2))
    (out,), (other,) = (net(y, torch.zeros(2, dtype=torch.long), t=t) for y in (x, shuffled))
    assert not torch.allclose(net._cut_patches(out, (2, 2)).flip(1), net._cut_patches(other, (2, 2)), atol=1e-3)


def test_positions_are_saved_and_not_trained_and_waves_are_neither() -> None:
    net = TINY.build(V, (3, 4, 4), 0)
    names = set(net.state_dict())
    assert "positions" in names - {name for name, _ in net.named_parameters()}
    assert not any("frequencies" in name for name in names)


# --- Decoupled MeanFlow's blocks: which are told which time, and the net of one time that they begin as


def late(needs: Needs = MF, **options: Any) -> Transformer:  # noqa: ANN401
    """A net whose last two blocks are told r, in float64."""
    return drawn(TINY.model_copy(update={"depth": 5, "late": 3, **options}), needs)


@pytest.mark.parametrize("options", [{}, {"modern": True}, {"checkpoint": True}, {"checkpoint": 2}], ids=str)
def test_the_first_blocks_are_told_t_and_the_others_r(options: dict[str, Any]) -> None:
    net, told = late(**options), list[Tensor]()
    for part in (*net.blocks, net.heads["u"]):
        modulation = next(m for name, m in part.named_modules() if name.endswith("modulation"))
        modulation.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    x, c, t = points(3)
    with torch.no_grad():
        net(x, c, t=t, r=t / 3)
        assert net.label is not None
        by_t, by_r = (torch.nn.functional.silu(net.scalars(t=s) + net.label(c)) for s in (t, t / 3))
    assert [torch.equal(e, by_t) for e in told] == [True] * 3 + [False] * 3
    assert [torch.equal(e, by_r) for e in told] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(("every", "calls"), [(False, 5), (True, 10), (2, 8), (3, 7)])
def test_every_nth_block_is_computed_again(every: bool | int, calls: int) -> None:
    """From the first on; the gradients keep their bits, and a copy of the net does alike."""
    x, c, t = points(3)
    plain, net, told = late(), deepcopy(late(checkpoint=every)), list[nn.Module]()
    for block in net.blocks:
        block.register_forward_pre_hook(lambda block, _: told.append(block))
    for one in (plain, net):
        one(x, c, t=t, r=t / 3)[0].square().sum().backward()
    assert len(told) == calls
    pairs = zip(plain.parameters(), net.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None)


def test_without_a_step_it_is_the_net_of_one_time() -> None:
    """To the bit, by the same weights under the same names."""
    net, plain = late(), late(FlowMatching().needs, late=None)
    names = {name: name.replace("heads.u", "heads.v") for name in net.state_dict()}
    net.load_state_dict({name: plain.state_dict()[other] for name, other in names.items()})
    x, c, t = points(3)
    assert torch.equal(net(x, c, t=t, r=t)[0], plain(x, c, t=t)[0])
    assert not torch.allclose(net(x, c, t=t, r=t / 3)[0], plain(x, c, t=t)[0])


def test_the_recipe_has_it() -> None:
    assert load("digits-dmf").net.model_dump()["late"] == 3
