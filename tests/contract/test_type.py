"""The nouns that all parts share keep their word."""

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn

import dumo
from dumo.flow.path import Linear
from dumo.types import frozen


class Line(nn.Module):
    """One head, a x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.a * x,)


def test_a_frozen_net_is_the_weights_from_inside_a_wrapper_and_records_no_gradient() -> None:
    net, other = Line(), nn.Module()
    assert frozen(net).module is frozen(nn.DataParallel(net)).module is net
    other.module = net  # a part of this name makes no wrapper
    assert frozen(other).module is other
    x, c = torch.ones(3, 2), torch.zeros(3, dtype=torch.long)
    (still,), (live,) = frozen(net)(x, c, t=torch.zeros(3)), net(x, c)
    assert (still.requires_grad, live.requires_grad) == (False, True)
    assert torch.equal(still, live)


def test_shapes_are_checked_wherever_a_module_names_some(request: pytest.FixtureRequest) -> None:
    checked = request.config.getoption("jaxtyping_packages").split(",")
    source = Path(dumo.__file__).parent
    for file in (file for file in source.rglob("*.py") if "jaxtyping" in file.read_text()):
        module = ".".join(("dumo", *file.relative_to(source).with_suffix("").parts))
        assert any(f"{module}.".startswith(f"{room}.") for room in checked), module
    with pytest.raises(TypeCheckError, match=r"dumo\.flow\.path"):
        Linear().at(torch.ones(3, 2), torch.ones(3, 2), torch.ones(4))
