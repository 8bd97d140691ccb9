"""The nouns that all parts share keep their word."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

import dumo
from dumo.flow.path import Linear
from dumo.types import Frozen, frozen


class Line(nn.Module):
    """One head, a x, that says whether gradients are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))
        self.graded: list[bool] = []

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> tuple[Tensor, ...]:
        self.graded.append(torch.is_grad_enabled())
        return (self.a * x,)


X, C = torch.ones(3, 2), torch.zeros(3, dtype=torch.long)


def test_a_frozen_net_records_no_gradient() -> None:
    net = Line()
    (frozen,), (live,) = Frozen(net)(X, C, t=torch.zeros(3)), net(X, C)
    assert net.graded == [False, True]
    assert not frozen.requires_grad
    assert live.requires_grad
    assert torch.equal(frozen, live)


def test_a_still_net_is_the_weights_in_training_from_inside_a_wrapper() -> None:
    net = Line()
    wrapper = nn.Module()
    wrapper.module = net
    assert frozen(net).module is net
    assert frozen(wrapper).module is net


def test_shapes_are_checked_wherever_a_module_names_some(request: pytest.FixtureRequest) -> None:
    checked = request.config.getoption("jaxtyping_packages").split(",")
    source = Path(dumo.__file__).parent
    for file in (file for file in source.rglob("*.py") if "jaxtyping" in file.read_text()):
        module = ".".join(("dumo", *file.relative_to(source).with_suffix("").parts))
        assert any(f"{module}.".startswith(f"{room}.") for room in checked), module
    with pytest.raises(TypeCheckError, match=r"dumo\.flow\.path"):
        Linear().at(torch.ones(3, 2), torch.ones(3, 2), torch.ones(4))
