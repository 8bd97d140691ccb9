"""Sums, products, quotients, powers, and elementary functions: their derivative from what went in, or what came out."""

from collections.abc import Callable
from math import log, pi, sqrt
from typing import Any

import torch
from torch import Tensor

from dumo.autodiff.dual import Dual, NoRule, Rule, carry, primal, rule
from dumo.types import Array


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(a: Any, other: Any, *, alpha: int | float = 1) -> Array:
    """d(a + alpha b) = da + alpha db."""
    a_, b_ = primal(a), primal(other)
    return carry(a_ + b_ if alpha == 1 else torch.add(a_, b_, alpha=alpha), _add, (a, other), alpha)


def _add(da: Tensor | None, db: Tensor | None, alpha: int | float) -> Tensor:
    return _sum(da, db if db is None or alpha == 1 else alpha * db)


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
def sub(a: Any, other: Any, *, alpha: int | float = 1) -> Array:
    """d(a - alpha b) = da - alpha db."""
    a_, b_ = primal(a), primal(other)
    return carry(a_ - b_ if alpha == 1 else torch.sub(a_, b_, alpha=alpha), _add, (a, other), -alpha)


@rule(torch.rsub, Tensor.__rsub__, "__rsub__")
def rsub(a: Any, other: Any) -> Array:
    """d(b - a)."""
    return sub(other, a)


def _sum(*terms: Tensor | None) -> Tensor:
    first, *others = (d for d in terms if d is not None)
    for other in others:
        first = first + other
    return first


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(a: Any, other: Any) -> Array:
    """d(a b) = da b + a db."""
    return _bilinear(torch.mul, a, other)


@rule(torch.matmul)
def matmul(a: Any, other: Any) -> Array:
    """d(a b) = da b + a db."""
    return _bilinear(torch.matmul, a, other)


@rule(Tensor.matmul, Tensor.__matmul__)
def matmul_method(a: Any, other: Any) -> Array:
    """As matmul. Raises NoRule for `tensor @ moving` under torch.compile, which gives `moving @ tensor` as the same."""
    if torch.compiler.is_compiling() and not isinstance(a, Dual):
        raise NoRule("@ under torch.compile, which may swap its operands: write torch.matmul")
    return matmul(a, other)


@rule(torch.bmm, Tensor.bmm)
def bmm(a: Any, mat2: Any) -> Array:
    """d(a b) = da b + a db."""
    return _bilinear(torch.bmm, a, mat2)


@rule(torch.outer, torch.ger, Tensor.outer, Tensor.ger)
def outer(a: Any, vec2: Any) -> Array:
    """d(a b^T) = da b^T + a db^T."""
    return _bilinear(torch.outer, a, vec2)


def _bilinear(product: Callable[..., Tensor], a: Any, b: Any) -> Array:
    p = product(primal(a), primal(b))
    kept = (primal(a) if isinstance(b, Dual) else None, primal(b) if isinstance(a, Dual) else None)
    return carry(p, leibniz, (a, b), product, *kept)


def leibniz(da: Tensor | None, db: Tensor | None, product: Callable[..., Tensor], a: Any, b: Any) -> Tensor:
    """The change of a product: da b + a db, without what rests."""
    if db is None:
        return product(da, b)
    if da is None:
        return product(a, db)
    if product is torch.mul and da.dtype == db.dtype == a.dtype == b.dtype:
        return torch.addcmul(da * b, a, db)
    return product(da, b) + product(a, db)


@rule(torch.addcmul, Tensor.addcmul)
def addcmul(c: Any, tensor1: Any, tensor2: Any, *, value: int | float = 1) -> Array:
    """d(c + k a b) = dc + k (da b + a db)."""
    a_, b_ = primal(tensor1), primal(tensor2)
    p = torch.addcmul(primal(c), a_, b_, value=value)
    return carry(p, _addcmul, (c, tensor1, tensor2), a_, b_, value)


def _addcmul(
    dc: Tensor | None, da: Tensor | None, db: Tensor | None, a: Tensor, b: Tensor, value: int | float
) -> Tensor:
    return _sum(dc, None if da is None else value * da * b, None if db is None else value * a * db)


@rule(torch.lerp, Tensor.lerp)
def lerp(a: Any, end: Any, weight: Any) -> Array:
    """d(a + w (b - a)) = da + w (db - da) + dw (b - a)."""
    a_, b_, w_ = primal(a), primal(end), primal(weight)
    ends = (a_, b_) if isinstance(weight, Dual) else (None, None)
    return carry(torch.lerp(a_, b_, w_), _lerp, (a, end, weight), *ends, w_)


def _lerp(da: Tensor | None, db: Tensor | None, dw: Tensor | None, a: Any, b: Any, w: Any) -> Tensor:
    return _sum(
        None if da is None else (1 - w) * da, None if db is None else w * db, None if dw is None else dw * (b - a)
    )


@rule(torch.einsum)
def einsum(equation: str, *operands: Array) -> Array:
    """Linear in every operand."""
    ps = [primal(x) for x in operands]
    return carry(torch.einsum(equation, *ps), _einsum, operands, equation, *ps)


def _einsum(*rest: Any) -> Tensor:
    n = (len(rest) - 1) // 2
    moved, equation, ps = rest[:n], rest[n], rest[n + 1 :]
    terms = (torch.einsum(equation, *ps[:i], d, *ps[i + 1 :]) for i, d in enumerate(moved) if d is not None)
    return _sum(*terms)


@rule(torch.div, torch.true_divide, Tensor.div, Tensor.__truediv__)
def div(a: Any, other: Any, *, rounding_mode: str | None = None) -> Array:
    """d(a / b) = (da - (a / b) db) / b. Rounded quotients stand still almost everywhere, which is refused."""
    if rounding_mode is not None:
        raise NoRule(f"div with rounding_mode={rounding_mode}")
    p = primal(a) / primal(other)
    return carry(p, _div, (a, other), p if isinstance(other, Dual) else None, primal(other))


@rule(Tensor.__rtruediv__, "__rdiv__")
def rdiv(a: Any, other: Any) -> Array:
    """d(b / a)."""
    return div(other, a)


def _div(da: Tensor | None, db: Tensor | None, y: Tensor | None, b: Any) -> Tensor:
    if db is None:
        return da / b  # pyright: ignore[reportOptionalOperand]
    return _sum(da, -y * db) / b  # pyright: ignore[reportOptionalOperand]


@rule(torch.pow, Tensor.pow, Tensor.__pow__)
def power(x: Any, exponent: Any) -> Array:
    """d(x^n) = n x^(n - 1) dx, n a number; d(a^x) = a^x log a dx, a a number."""
    if not isinstance(x, Tensor | Dual):
        y = x ** primal(exponent)
        return carry(y, _exponential, (exponent,), y, x)
    if not isinstance(exponent, int | float):
        base, n = primal(x), primal(exponent)
        y = base**n
        return carry(y, _general_power, (x, exponent), base, n, y)
    if not isinstance(x, Dual):
        return x**exponent
    return carry(x.p**exponent, _power, (x,), x.p, exponent)


@rule(Tensor.__rpow__)
def rpower(exponent: Any, base: Any) -> Array:
    """As power."""
    return power(base, exponent)


def _general_power(dx: Tensor | None, dn: Tensor | None, x: Tensor, n: Tensor, y: Tensor) -> Tensor:
    """d(x^n) = n x^(n - 1) dx + x^n log x dn."""
    along_x = along_n = None
    if dx is not None:
        along_x = torch.where(n == 0, 0.0, n * x ** (n - 1)) * dx
    if dn is not None:
        along_n = torch.where(x == 0, 0.0, y * torch.where(x == 0, 1.0, x).log()) * dn
    return _sum(along_x, along_n)


def _exponential(dx: Tensor, y: Tensor, base: int | float) -> Tensor:
    return dx * y * log(base) if base else torch.zeros_like(dx)


def _power(dx: Tensor, x: Tensor, n: int | float) -> Tensor:
    return n * x ** (n - 1) * dx if n else torch.zeros_like(dx)


SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether it is a function of the output
    "cos": (lambda x: -x.sin(), False),
    "sin": (torch.cos, False),
    "log": (torch.reciprocal, False),
    "square": (lambda x: 2 * x, False),
    "abs": (torch.sign, False),
    "relu": (torch.sign, True),
    "exp": (lambda y: y, True),
    "tanh": (lambda y: 1 - y * y, True),
    "sigmoid": (lambda y: y * (1 - y), True),
    "sqrt": (lambda y: 0.5 / y, True),
    "rsqrt": (lambda y: -0.5 * y**3, True),
    "reciprocal": (lambda y: -y * y, True),
    "erf": (lambda x: 2 / sqrt(pi) * (-x * x).exp(), False),
    "log1p": (lambda x: 1 / (1 + x), False),
    "expm1": (lambda y: y + 1, True),
    "tan": (lambda y: 1 + y * y, True),
    "atan": (lambda x: 1 / (1 + x * x), False),
    "sinh": (torch.cosh, False),
    "cosh": (torch.sinh, False),
}


def _elementwise(name: str) -> Rule:
    f, (_, from_output) = getattr(torch, name), SLOPES[name]

    def apply(x: Dual) -> Array:
        y = f(x.p)
        return carry(y, _along_slope, (x,), name, y if from_output else x.p)

    return apply


def _along_slope(dx: Tensor, name: str, x: Tensor) -> Tensor:
    return dx * SLOPES[name][0](x)


for _name in SLOPES:
    rule(getattr(torch, _name), getattr(Tensor, _name))(_elementwise(_name))
