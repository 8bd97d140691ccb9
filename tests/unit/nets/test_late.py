"""Decoupled MeanFlow's blocks: which are told which time, and the net of one time that they begin as."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dumo.nets.dit import DiT, Transformer
from dumo.objectives import FlowMatching, MeanFlow
from dumo.run.config.load import load
from dumo.types import Needs
from unit.nets.given import drawn, points

TINY = DiT(patch=2, width=8, depth=5, attention=2, late=3)
MF = MeanFlow().needs


def built(needs: Needs = MF, **options: Any) -> Transformer:  # noqa: ANN401
    """Its net."""
    return drawn(TINY.model_copy(update=options), needs)


@pytest.mark.parametrize("options", [{}, {"modern": True}, {"checkpoint": True}], ids=str)
def test_the_first_blocks_are_told_t_and_the_others_r(options: dict[str, bool]) -> None:
    net, told = built(**options), list[Tensor]()
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


def test_without_a_step_it_is_the_net_of_one_time() -> None:
    """To the bit, by the same weights under the same names."""
    net, plain = built(), built(FlowMatching().needs, late=None)
    names = {name: name.replace("heads.u", "heads.v") for name in net.state_dict()}
    net.load_state_dict({name: plain.state_dict()[other] for name, other in names.items()})
    x, c, t = points(3)
    assert torch.equal(net(x, c, t=t, r=t)[0], plain(x, c, t=t)[0])
    assert not torch.allclose(net(x, c, t=t, r=t / 3)[0], plain(x, c, t=t)[0])


def test_the_recipe_has_it() -> None:
    assert load("digits-dmf").net.model_dump()["late"] == 3
