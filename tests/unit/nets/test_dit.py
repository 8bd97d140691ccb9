"""The transformer: its size, its patches, its attention, its start, its refusals."""

import pytest
import torch
from torch import nn

from contract.case import randomise
from dumo.nets.dit import Block, DiT, Transformer
from dumo.nets.mlp import MLP
from dumo.types import Needs, UserError

TINY = DiT(patch=2, width=8, depth=2, attention=2)
V, VU = Needs(heads=("v",)), Needs(heads=("v", "u"))


def count(net: nn.Module) -> int:
    """Parameters and the fixed table of positions, as DiT counts."""
    table = net.get_buffer("positions")
    return sum(p.numel() for p in net.parameters()) + table.numel()


@pytest.mark.parametrize(("needs", "millions"), [(V, 675.111), (VU, 677.786)])
def test_xl_2_has_the_papers_size(needs: Needs, millions: float) -> None:
    with torch.device("meta"):
        net = DiT().build(needs, (4, 32, 32), 1000)
    assert round(count(net) / 1e6, 3) == millions


def test_a_further_head_is_one_output_layer() -> None:
    """2 W^2 + 2 W of modulation, (W + 1) p^2 ch of output: 2.67 M of XL/2."""
    sizes = [count(TINY.build(needs, (3, 4, 4), 5)) for needs in (V, VU)]
    assert sizes[1] - sizes[0] == 8 * 16 + 16 + 9 * 12


@pytest.mark.parametrize(("shape", "patch"), [((3, 4, 4), 2), ((1, 6, 6), 3), ((4, 8, 8), 1), ((2, 4, 4), 4)])
def test_patches_and_image_are_inverse(shape: tuple[int, ...], patch: int) -> None:
    net = TINY.model_copy(update={"patch": patch}).build(V, shape, 0)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    tokens = net._patches(x)
    assert tokens.shape == (5, (shape[1] // patch) ** 2, shape[0] * patch**2)
    assert torch.equal(net._image(tokens), x)


def test_tokens_are_squares_row_by_row() -> None:
    net = TINY.build(V, (2, 6, 6), 0)
    x = torch.arange(2 * 6 * 6).view(1, 2, 6, 6)
    tokens = net._patches(x)
    for i in range(3):
        for j in range(3):
            square = x[0, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            assert torch.equal(tokens[0, 3 * i + j], square.flatten())


def test_attention_by_hand() -> None:
    block = Block(8, 2)
    randomise(block)
    a = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = block.qkv(a).chunk(3, -1)
    mixed = torch.empty_like(a)
    for head in (slice(0, 4), slice(4, 8)):
        weight = (q[..., head] @ k[..., head].mT / 2).softmax(-1)
        mixed[..., head] = weight @ v[..., head]
    assert torch.allclose(block.attend(a), block.out(mixed), rtol=1e-5, atol=1e-6)


def test_block_by_hand() -> None:
    block = Block(8, 2)
    randomise(block)
    g = torch.Generator().manual_seed(1)
    h, e = torch.randn(3, 5, 8, generator=g), torch.randn(3, 8, generator=g)
    m = (e @ block.modulation.weight.T + block.modulation.bias)[:, None].split(8, -1)

    def norm(h: torch.Tensor) -> torch.Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    middle = h + m[2] * block.attend(norm(h) * (1 + m[1]) + m[0])
    wide = nn.functional.gelu(block.up(norm(middle) * (1 + m[4]) + m[3]), approximate="tanh")
    assert torch.allclose(block(h, e), middle + m[5] * block.down(wide), rtol=1e-4, atol=1e-5)


def test_blocks_start_as_nothing() -> None:
    """adaLN-zero: a block is the identity, though its own layers are not zero."""
    net = TINY.build(V, (3, 4, 4), 0)
    g = torch.Generator().manual_seed(0)
    h, e = torch.randn(2, 4, 8, generator=g), torch.randn(2, 8, generator=g)
    for block in net.blocks:
        assert isinstance(block, Block)
        assert torch.equal(block(h, e), h)
        assert block.qkv.weight.any()
        assert block.down.weight.any()


def test_places_are_told_apart() -> None:
    """Without positions a transformer cannot tell a picture from its patches shuffled."""
    net = TINY.build(V, (3, 4, 4), 0)
    randomise(net)
    x, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])
    shuffled = net._image(net._patches(x).flip(1))
    (out,), (other,) = (net(y, torch.zeros(2, dtype=torch.long), t=t) for y in (x, shuffled))
    assert not torch.allclose(net._patches(out).flip(1), net._patches(other), atol=1e-3)


def test_positions_are_saved_and_waves_are_not() -> None:
    names = set(TINY.build(V, (3, 4, 4), 0).state_dict())
    assert "positions" in names
    assert not any("frequencies" in name for name in names)


@pytest.mark.parametrize(
    ("update", "shape", "says"),
    [
        ({}, (2,), "square images.*mlp"),
        ({}, (3, 4, 6), "square"),
        ({}, (3, 5, 5), "patch 2 does not divide.*5"),
        ({"attention": 3}, (3, 4, 4), "attention 3 does not divide.*8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(update: dict[str, int], shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TINY.model_copy(update=update).build(V, shape, 10)


def test_heads_are_linear_in_the_output_layer() -> None:
    net = TINY.build(VU, (3, 4, 4), 0)
    assert isinstance(net, Transformer)
    randomise(net)
    g = torch.Generator().manual_seed(0)
    x, c, t = torch.randn(2, 3, 4, 4, generator=g), torch.zeros(2, dtype=torch.long), torch.rand(2, generator=g)
    v, u = net(x, c, t=t)
    head = net.heads["u"]
    head.out.weight.data.mul_(2)
    head.out.bias.data.mul_(2)
    assert torch.equal(net(x, c, t=t)[0], v)
    assert torch.allclose(net(x, c, t=t)[1], 2 * u, rtol=1e-5, atol=1e-6)


def test_mlp_takes_any_shape() -> None:
    for shape in ((2,), (7,), (3, 4), (1, 8, 8)):
        net = MLP(width=8, depth=1).build(VU, shape, 0)
        v, u = net(torch.zeros(5, *shape), torch.zeros(5, dtype=torch.long), t=torch.zeros(5))
        assert v.shape == u.shape == (5, *shape)
