"""A precision is what it says of products and of layers, and nothing is left of it when it is over."""

from collections.abc import Generator
from contextlib import contextmanager, suppress

import pytest
import torch

from dumo.flow.precision import Precision, precision_of, product_precision, uses_tf32, using
from dumo.flow.slope import CentralSlope
from dumo.types import UserError


def settings() -> tuple[str, bool, bool, bool]:
    """Products, convolutions, and autocast of either device."""
    autocast = (torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, *autocast


@pytest.mark.parametrize(
    ("precision", "inside"),
    [
        ("fp32", ("highest", False, False, False)),  # convolutions, too, which torch rounds unless it is told
        ("tf32", ("high", True, False, False)),
        ("bf16", ("highest", False, False, False)),
    ],
)
def test_a_gpu_rounds_as_asked_and_then_as_before(precision: Precision, inside: tuple[str, bool, bool, bool]) -> None:
    """Settings, of which a machine without a GPU has its own."""
    for around in (("highest", True), ("high", False)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=around[1]), set_products(around[0]):
            with suppress(KeyError), product_precision(precision, "cuda"):
                assert settings() == inside
                assert uses_tf32("cuda") == (precision == "tf32")
                assert not uses_tf32("cpu")
                raise KeyError
            assert settings()[:2] == around


@contextmanager
def set_products(precision: str) -> Generator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield
    torch.set_float32_matmul_precision(before)


def test_a_cpu_is_let_be_but_for_autocast() -> None:
    before, x = settings(), torch.ones(2, 2)
    for precision, kind in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        with using(precision, "cpu"):
            assert settings()[:2] == before[:2]
            assert torch.nn.functional.linear(x, x).dtype == kind
    assert settings() == before


def test_a_difference_is_refused_where_products_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dumo.flow.precision.uses_tf32", lambda kind: True)
    assert precision_of(torch.ones(2, dtype=torch.float64)) == "fp32"
    with pytest.raises(UserError, match="not tf32"):
        CentralSlope().check(precision_of(torch.ones(2)))
