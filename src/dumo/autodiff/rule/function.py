"""Functions of one number: their derivative from what went in (x), or from what came out (y). And softmax."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dumo.autodiff.dual import RULES, Dual, Rule, carry, elsewhere, rule
from dumo.types import Array

aten = torch.ops.aten


def _of_x(dx: Tensor, name: str, x: Tensor) -> Tensor:
    return dx * SLOPES[name][0](x)


def _elementwise(name: str, f: Callable[[Tensor], Tensor], from_output: bool) -> Rule:
    def apply(x: Dual) -> Array:
        y = f(x.p)
        return carry(y, _of_x, (x,), name, y if from_output else x.p)

    return apply


def _minus_sin(x: Tensor) -> Tensor:
    return -x.sin()


def _itself(y: Tensor) -> Tensor:
    return y


def _twice(x: Tensor) -> Tensor:
    return 2 * x


def _one_minus_square(y: Tensor) -> Tensor:
    return 1 - y * y


def _logistic(y: Tensor) -> Tensor:
    return y * (1 - y)


def _half_inverse(y: Tensor) -> Tensor:
    return 0.5 / y


def _minus_half_cube(y: Tensor) -> Tensor:
    return -0.5 * y**3


def _minus_square(y: Tensor) -> Tensor:
    return -y * y


SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether it is a function of the output
    "cos": (_minus_sin, False),
    "sin": (torch.cos, False),
    "log": (torch.reciprocal, False),
    "square": (_twice, False),
    "abs": (torch.sign, False),
    "relu": (torch.sign, True),
    "exp": (_itself, True),
    "tanh": (_one_minus_square, True),
    "sigmoid": (_logistic, True),
    "sqrt": (_half_inverse, True),
    "rsqrt": (_minus_half_cube, True),
    "reciprocal": (_minus_square, True),
}
for _name, (_, _from_output) in SLOPES.items():
    rule(getattr(torch, _name), getattr(Tensor, _name))(_elementwise(_name, getattr(torch, _name), _from_output))


@rule(F.relu)
def relu(x: Dual, inplace: bool = False) -> Array:
    """Raises NoRule in place."""
    elsewhere("relu", inplace)
    return RULES[torch.relu](x)


@rule(F.gelu)
def gelu(x: Dual, approximate: str = "none") -> Array:
    """Elementwise, so the kernel of the backward pass is the forward derivative too, in one sweep."""
    return carry(F.gelu(x.p, approximate=approximate), _gelu, (x,), x.p, approximate)


def _gelu(dx: Tensor, x: Tensor, approximate: str) -> Tensor:
    return aten.gelu_backward(dx, x, approximate=approximate)


@rule(F.silu)
def silu(x: Dual, inplace: bool = False) -> Array:
    """As gelu. Raises NoRule in place."""
    elsewhere("silu", inplace)
    return carry(F.silu(x.p), _silu, (x,), x.p)


def _silu(dx: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # recorded: this kernel has no derivative of its own
        y = x.sigmoid()
        return dx * y * (1 + x * (1 - y))
    return aten.silu_backward(dx, x)


@rule(F.softplus)
def softplus(x: Dual, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """As gelu."""
    return carry(F.softplus(x.p, beta, threshold), _softplus, (x,), x.p, beta, threshold)


def _softplus(dx: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    return aten.softplus_backward(dx, x, beta, threshold)


@rule(F.softmax)
def softmax_function(x: Dual, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Array:
    """As softmax."""
    return softmax(x, dim, dtype)


@rule(torch.softmax, Tensor.softmax)
def softmax(x: Dual, dim: int, dtype: torch.dtype | None = None) -> Array:
    """dy = y (dx - sum y dx)."""
    y = torch.softmax(x.p, dim, dtype)
    return carry(y, _softmax, (x,), y, dim)


def _softmax(dx: Tensor, y: Tensor, dim: int) -> Tensor:
    h = y * dx.to(y.dtype)
    return h - y * h.sum(dim, keepdim=True)
