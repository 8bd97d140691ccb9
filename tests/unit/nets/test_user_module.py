"""A user's module as a net: which of several is meant."""

import torch
from torch import Tensor, nn

from dumo.nets import ModuleSpec
from dumo.types import Needs

NEEDS = Needs(heads=("v", "u"))


class Net(nn.Module):
    """Multiplies x by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, c: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * x, x


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
