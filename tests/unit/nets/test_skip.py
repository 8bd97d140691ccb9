"""Long skips: which block reaches which, and that they are not there at the start."""

from typing import Any

import pytest
import torch
from torch import Tensor

from contract.case import randomise
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets.dit import DiT, Transformer
from dumo.nets.skip import Joined
from dumo.objectives import DuMo
from dumo.preflight.cost import forward_flops
from dumo.types import Frozen, Needs, UserError
from unit.nets.given import Given

SHAPE, CLASSES = (3, 4, 4), 5
VU = Needs(heads=("v", "u"))
TINY = DiT(patch=2, width=8, depth=5, attention=2, skips=True)


def points(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, c and t in float64."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, *SHAPE, generator=g).double(), torch.arange(n), torch.rand(n, generator=g).double()


def built(**options: Any) -> Transformer:  # noqa: ANN401
    """A net in float64, every parameter drawn."""
    net = TINY.model_copy(update=options).build(VU, SHAPE, CLASSES)
    randomise(net)
    return net.double()


@pytest.mark.parametrize(
    ("depth", "pairs"), [(3, {2: 0}), (4, {3: 0}), (5, {4: 0, 3: 1}), (6, {5: 0, 4: 1}), (7, {6: 0, 5: 1, 4: 2})]
)
def test_blocks_reach_those_opposite_them(depth: int, pairs: dict[int, int]) -> None:
    net, outs, found = built(depth=depth), list[Tensor](), dict[int, int]()
    for i, block in enumerate(net.blocks):
        if isinstance(block, Joined):

            def into(_: object, given: tuple[Tensor, ...], i: int = i) -> None:
                found[i] = next(j for j, out in enumerate(outs) if out is given[1])
                assert given[0] is outs[-1]

            block.register_forward_pre_hook(into)
        block.register_forward_hook(lambda _, __, out: outs.append(out))
    x, c, t = points()
    net(x, c, t=t)
    assert found == pairs


def test_a_block_takes_in_both_by_one_layer() -> None:
    block = built().blocks[-1]
    assert isinstance(block, Joined)
    h, skip, e = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    left, right = block.join.weight.chunk(2, 1)
    both = h @ left.T + skip @ right.T + block.join.bias
    assert torch.allclose(block(h, skip, e[:, 0]), block.block(both, e[:, 0]), rtol=1e-12)


def test_a_net_starts_as_that_without() -> None:
    """To the bit, whatever is in its blocks."""
    plain = built(skips=False)
    net = TINY.build(VU, SHAPE, CLASSES).double()
    state = {name.replace(".block.", "."): name for name in net.state_dict() if ".join." not in name}
    net.load_state_dict({state[name]: x for name, x in plain.state_dict().items()}, strict=False)
    x, c, t = points()
    for one, other in zip(net(x, c, t=t), plain(x, c, t=t), strict=True):
        assert torch.equal(one, other)
    net.blocks[-1].get_parameter("join.weight").data[0, 8:] = 0.1
    assert not torch.allclose(net(x, c, t=t)[0], plain(x, c, t=t)[0])


@pytest.mark.parametrize("way", ["cross", "joint"])
def test_blocks_that_read_texts_have_exact_slopes(way: str) -> None:
    net = built(texts=Given(), text=way, checkpoint=True)
    x, c, t = points()
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    exact, found = (s(net, Frozen(net), x, c, t=t)[1](w) for s in (JvpSlope(), DualSlope()))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(found, exact, strict=True))


def test_a_skip_costs_two_square_matrices_a_token() -> None:
    """Of XL/2, 256 tokens."""
    with torch.device("meta"):
        plain, net = (DiT(depth=5, skips=on).build(VU, (4, 32, 32), 1000) for on in (False, True))
    more = forward_flops(net, DuMo(), (4, 32, 32)) - forward_flops(plain, DuMo(), (4, 32, 32))
    assert more / 2 == 2 * 2 * 1152**2 * 256


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(UserError, match=r"net\.skips.*depth of at least 3, not 2"):
        built(depth=2)


def test_off_it_is_not_written() -> None:
    assert "skips" not in DiT().model_dump()
    assert DiT.model_validate(TINY.model_dump()) == TINY
