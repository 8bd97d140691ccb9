"""Rules of sums, products, quotients, powers, and elementary functions."""

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
    a_ = primal(a)
    b_ = primal(other)
    value = a_ + b_ if alpha == 1 else torch.add(a_, b_, alpha=alpha)
    return carry(value, _jvp_add, (a, other), alpha)


def _jvp_add(da: Tensor | None, db: Tensor | None, alpha: int | float) -> Tensor:
    if db is not None and alpha != 1:
        db = alpha * db
    return _sum_terms(da, db)


@rule(torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__)
def sub(a: Any, other: Any, *, alpha: int | float = 1) -> Array:
    """d(a - alpha b) = da - alpha db."""
    a_ = primal(a)
    b_ = primal(other)
    value = a_ - b_ if alpha == 1 else torch.sub(a_, b_, alpha=alpha)
    return carry(value, _jvp_add, (a, other), -alpha)


@rule(torch.rsub, Tensor.__rsub__, "__rsub__")
def rsub(a: Any, other: Any) -> Array:
    """d(b - a) = db - da."""
    return sub(other, a)


def _sum_terms(*terms: Tensor | None) -> Tensor:
    """Return the sum of the terms that are not None; at least one is not."""
    total, *rest = (term for term in terms if term is not None)
    for term in rest:
        total = total + term
    return total


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
    """d(a b) = da b + a db.

    Raises NoRule for `tensor @ dual` under torch.compile, which calls this with its operands swapped.
    """
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
    """Apply the rule of a product that is linear in both operands."""
    a_ = primal(a)
    b_ = primal(b)
    # Save an operand only if the other may have a tangent.
    saved_a = a_ if isinstance(b, Dual) else None
    saved_b = b_ if isinstance(a, Dual) else None
    return carry(product(a_, b_), jvp_product, (a, b), product, saved_a, saved_b)


def jvp_product(da: Tensor | None, db: Tensor | None, product: Callable[..., Tensor], a: Any, b: Any) -> Tensor:
    """Compute da b + a db, without the term of a tangent that is None; at least one is not."""
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
    a_ = primal(tensor1)
    b_ = primal(tensor2)
    total = torch.addcmul(primal(c), a_, b_, value=value)
    return carry(total, _jvp_addcmul, (c, tensor1, tensor2), a_, b_, value)


def _jvp_addcmul(
    dc: Tensor | None, da: Tensor | None, db: Tensor | None, a: Tensor, b: Tensor, k: int | float
) -> Tensor:
    along_a = None if da is None else k * da * b
    along_b = None if db is None else k * a * db
    return _sum_terms(dc, along_a, along_b)


@rule(torch.lerp, Tensor.lerp)
def lerp(a: Any, end: Any, weight: Any) -> Array:
    """d(a + w (b - a)) = da + w (db - da) + dw (b - a)."""
    a_ = primal(a)
    b_ = primal(end)
    w_ = primal(weight)
    saved_ends = (a_, b_) if isinstance(weight, Dual) else (None, None)
    return carry(torch.lerp(a_, b_, w_), _jvp_lerp, (a, end, weight), *saved_ends, w_)


def _jvp_lerp(da: Tensor | None, db: Tensor | None, dw: Tensor | None, a: Any, b: Any, w: Any) -> Tensor:
    along_a = None if da is None else (1 - w) * da
    along_b = None if db is None else w * db
    along_w = None if dw is None else dw * (b - a)
    return _sum_terms(along_a, along_b, along_w)


@rule(torch.einsum)
def einsum(equation: str, *operands: Array) -> Array:
    """d einsum(x_1 ... x_n) = the sum over i of einsum(x_1 ... dx_i ... x_n)."""
    primals = [primal(x) for x in operands]
    return carry(torch.einsum(equation, *primals), _jvp_einsum, operands, equation, *primals)


def _jvp_einsum(*arguments: Any) -> Tensor:
    """Compute the JVP from n tangents, the equation, and n primals."""
    n = (len(arguments) - 1) // 2
    tangents = arguments[:n]
    equation = arguments[n]
    primals = arguments[n + 1 :]
    terms: list[Tensor] = []
    for i, dx in enumerate(tangents):
        if dx is not None:
            terms.append(torch.einsum(equation, *primals[:i], dx, *primals[i + 1 :]))
    return _sum_terms(*terms)


@rule(torch.div, torch.true_divide, Tensor.div, Tensor.__truediv__)
def div(a: Any, other: Any, *, rounding_mode: str | None = None) -> Array:
    """d(a / b) = (da - (a / b) db) / b.

    Raises NoRule for rounded quotients, because their derivative is zero almost everywhere.
    """
    if rounding_mode is not None:
        raise NoRule(f"div with rounding_mode={rounding_mode}")
    b_ = primal(other)
    quotient = primal(a) / b_
    saved_quotient = quotient if isinstance(other, Dual) else None
    return carry(quotient, _jvp_div, (a, other), saved_quotient, b_)


@rule(Tensor.__rtruediv__, "__rdiv__")
def rdiv(a: Any, other: Any) -> Array:
    """d(b / a), as in `div`."""
    return div(other, a)


def _jvp_div(da: Tensor | None, db: Tensor | None, quotient: Tensor | None, b: Any) -> Tensor:
    if db is None:
        return da / b  # pyright: ignore[reportOptionalOperand], one of both is a tensor
    return _sum_terms(da, -quotient * db) / b  # pyright: ignore[reportOptionalOperand], it is saved with db


@rule(torch.pow, Tensor.pow, Tensor.__pow__)
def power(x: Any, exponent: Any) -> Array:
    """d(x^n) = n x^(n - 1) dx + x^n log x dn; one of them may be a number."""
    if not isinstance(x, Tensor | Dual):
        y = x ** primal(exponent)
        return carry(y, _jvp_exponential, (exponent,), y, x)
    if not isinstance(exponent, int | float):
        base = primal(x)
        n = primal(exponent)
        y = base**n
        return carry(y, _jvp_general_power, (x, exponent), base, n, y)
    if not isinstance(x, Dual):
        return x**exponent
    return carry(x.p**exponent, _jvp_power, (x,), x.p, exponent)


@rule(Tensor.__rpow__)
def rpower(exponent: Any, base: Any) -> Array:
    """d(base^exponent), as in `power`; Python passes the exponent first."""
    return power(base, exponent)


def _jvp_general_power(dx: Tensor | None, dn: Tensor | None, x: Tensor, n: Tensor, y: Tensor) -> Tensor:
    """Compute both terms, with y = x^n. A term with a zero factor is zero instead of NaN = 0 * inf."""
    along_x: Tensor | None = None
    along_n: Tensor | None = None
    if dx is not None:
        along_x = torch.where(n == 0, 0.0, n * x ** (n - 1)) * dx
    if dn is not None:
        along_n = torch.where(x == 0, 0.0, y * torch.where(x == 0, 1.0, x).log()) * dn
    return _sum_terms(along_x, along_n)


def _jvp_exponential(dx: Tensor, y: Tensor, base: int | float) -> Tensor:
    """Compute base^x log(base) dx, with y = base^x."""
    return dx * y * log(base) if base else torch.zeros_like(dx)


def _jvp_power(dx: Tensor, x: Tensor, n: int | float) -> Tensor:
    """Compute n x^(n - 1) dx; zero for n = 0, also at x = 0."""
    return n * x ** (n - 1) * dx if n else torch.zeros_like(dx)


@rule(torch.logaddexp, Tensor.logaddexp)
def logaddexp(a: Any, other: Any) -> Array:
    """d log(e^a + e^b) = sigmoid(a - b) da + sigmoid(b - a) db."""
    a_ = primal(a)
    b_ = primal(other)
    return carry(torch.logaddexp(a_, b_), _jvp_logaddexp, (a, other), a_, b_)


def _jvp_logaddexp(da: Tensor | None, db: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    # The difference of two equal infinities is NaN, so equal operands share the weight explicitly.
    weight = torch.where(a == b, 0.5, (a - b).sigmoid())
    along_a = None if da is None else weight * da
    along_b = None if db is None else (1 - weight) * db
    return _sum_terms(along_a, along_b)


# The derivative f' of elementary functions y = f(x), by torch's name, and whether f' is a function of y instead of x.
_DERIVATIVES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
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
    "erfc": (lambda x: -2 / sqrt(pi) * (-x * x).exp(), False),
    "log2": (lambda x: 1 / (log(2) * x), False),
    "log10": (lambda x: 1 / (log(10) * x), False),
    "log1p": (lambda x: 1 / (1 + x), False),
    "exp2": (lambda y: log(2) * y, True),
    "expm1": (lambda y: y + 1, True),
    "tan": (lambda y: 1 + y * y, True),
    "atan": (lambda x: 1 / (1 + x * x), False),
    "sinh": (torch.cosh, False),
    "cosh": (torch.sinh, False),
}


def _elementwise(name: str) -> Rule:
    """Return the rule of an elementary function: dy = f' dx."""
    f = getattr(torch, name)
    _, is_of_output = _DERIVATIVES[name]

    def apply(x: Dual) -> Array:
        y = f(x.p)
        return carry(y, _jvp_elementwise, (x,), name, y if is_of_output else x.p)

    return apply


def _jvp_elementwise(dx: Tensor, name: str, x_or_y: Tensor) -> Tensor:
    derivative, _ = _DERIVATIVES[name]
    return dx * derivative(x_or_y)


for _name in _DERIVATIVES:
    rule(getattr(torch, _name), getattr(Tensor, _name))(_elementwise(_name))
