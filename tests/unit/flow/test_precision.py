"""A precision holds inside, whatever holds around, and what held around holds again afterwards."""

from typing import get_args

import pytest
import torch

from dumo.flow.precision import Precision, using


def now() -> tuple[object, ...]:
    """What passes are made in."""
    one = torch.ones(2, 2)
    return (one @ one).dtype, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


INSIDE = {
    "fp32": (torch.float32, "highest", False),
    "tf32": (torch.float32, "high", True),
    "bf16": (torch.bfloat16, "highest", False),
}


@pytest.mark.parametrize("outer", get_args(Precision))
@pytest.mark.parametrize("inner", get_args(Precision))
def test_it_holds_inside_and_not_after(inner: Precision, outer: Precision) -> None:
    before = now()
    with using(outer, "cpu"):
        with using(inner, "cpu"):
            assert now() == INSIDE[inner]
        assert now() == INSIDE[outer]
        with pytest.raises(ArithmeticError), using(inner, torch.device("cpu")):
            raise ArithmeticError
        assert now() == INSIDE[outer]
    assert now() == before
