"""A user's module as a net: which of several is meant, and what is said of one that does not fit."""

import pytest
import torch
from torch import Tensor, nn

from dumo.nets import ModuleSpec
from dumo.nets.module import require_heads
from dumo.types import Needs, UserError

NEEDS = Needs(heads=("v", "u"))


class Net(nn.Module):
    """Gives what it is made with, in place of u."""

    def __init__(self, u: object = "x") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.u = u

    def forward(self, x: Tensor, c: Tensor, t: Tensor) -> object:
        if isinstance(self.u, Exception):
            raise self.u
        return self.scale * x, x if self.u == "x" else self.u


def scaled(scale: float) -> Net:
    net = Net()
    nn.init.constant_(net.scale, scale)
    return net


def test_each_of_two_modules_of_one_layout_begins_with_its_own_weights() -> None:
    first, second = ModuleSpec.of(scaled(1.0)), ModuleSpec.of(scaled(2.0))
    assert first.layout == second.layout
    assert first.build(NEEDS, (3,), 0).scale.item() == 1
    assert second.build(NEEDS, (3,), 0).scale.item() == 2
    unknown = first.model_copy(update={"weights": "of another process"})
    assert unknown.build(NEEDS, (3,), 0).scale.item() == 2, "the last one of this layout, to be loaded into"


@pytest.mark.parametrize(
    ("u", "actual"),
    [(None, r"a tuple of \(2, 3\), a NoneType"), (torch.zeros(2), r"a tuple of \(2, 3\), \(2,\)")],
)
def test_heads_that_are_no_tensors_or_of_another_shape_are_refused(u: object, actual: str) -> None:
    with pytest.raises(UserError, match=rf"gave {actual}; this objective wants a tuple \(v, u\) of \(2, 3\), \(2, 3\)"):
        require_heads(Net(u), NEEDS, (3,), 0)


def test_an_empty_tuple_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "forward", lambda self, x, c, t: ())
    with pytest.raises(UserError, match="gave an empty tuple;"):
        require_heads(Net(), NEEDS, (3,), 0)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_mode_stays_also_where_a_pass_raises(*, is_training: bool) -> None:
    net = Net(ValueError("no"))
    net.train(is_training)
    with pytest.raises(UserError, match="raised ValueError: no"):
        require_heads(net, NEEDS, (3,), 0)
    assert net.training == is_training
