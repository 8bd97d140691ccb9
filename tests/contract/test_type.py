"""The nouns that all parts share keep their word."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

import dumo
from dumo.flow.path import Linear
from dumo.types import Frozen, frozen, lift, mean_square


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


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4, 4)])
def test_lift_multiplies_rows(shape: tuple[int, ...]) -> None:
    t = torch.tensor([1.0, 2.0, 3.0])
    out = lift(t, torch.ones(shape)) * torch.ones(shape)
    assert out.shape == shape
    assert all((out[i] == i + 1).all() for i in range(3))


def test_mean_square_is_per_row() -> None:
    e = torch.arange(12.0).view(2, 3, 2)
    assert mean_square(e).tolist() == pytest.approx([55 / 6, 451 / 6])


def test_shapes_are_checked_wherever_a_module_names_some(request: pytest.FixtureRequest) -> None:
    checked = request.config.getoption("jaxtyping_packages").split(",")
    source = Path(dumo.__file__).parent
    for file in (file for file in source.rglob("*.py") if "jaxtyping" in file.read_text()):
        module = ".".join(("dumo", *file.relative_to(source).with_suffix("").parts))
        assert any(f"{module}.".startswith(f"{room}.") for room in checked), module
    with pytest.raises(TypeCheckError, match=r"dumo\.flow\.path"):
        Linear().at(torch.ones(3, 2), torch.ones(3, 2), torch.ones(4))
