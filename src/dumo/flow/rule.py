"""Tangent rules: for every operation, how a small change of its inputs changes its output.

A rule computes the primal by the very call that the net made, and hands `carry` a function that moves the tangent:
`_gelu(dx, x)` is the change of gelu at x for a change dx. These functions are of this module and take all they need as
arguments, so that they can be kept as data and run later. Where an operation is linear, it moves its own tangent.

To add an operation: write its rule below, decorated with the functions of torch that a net calls it by.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dumo.flow import attention
from dumo.flow.dual import ALONE, RULES, Dual, Name, NoRule, Rule, carry, primal
from dumo.types import Array

aten = torch.ops.aten
OPERATORS = "abs add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg getitem eq ne lt le gt ge"


METHODS: dict[Name, list[str]] = {}  # the names that Tensor knows a function by
for _name in dir(Tensor):
    if callable(_f := getattr(Tensor, _name)) and (not _name.startswith("__") or _name.strip("_") in OPERATORS.split()):
        METHODS.setdefault(_f, []).append(_name)


def rule(*functions: Name) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of these functions of torch; of methods of Tensor, a method of Dual too.

    Where an argument is annotated as Dual, it is the first, and no other may move.
    """

    def register(f: Rule) -> Rule:
        for function in functions:
            RULES[function] = f
            if Dual in f.__annotations__.values():
                ALONE.add(function)
            for name in METHODS.get(function, ()):
                setattr(Dual, name, f)
        return f

    return register


# Linear maps of one argument: the same map moves the tangent.

LINEAR = (
    "view reshape view_as reshape_as expand expand_as flatten unflatten squeeze unsqueeze permute transpose movedim "
    "swapaxes contiguous clone __getitem__ narrow select index_select chunk split split_with_sizes unbind repeat "
    "repeat_interleave tile roll flip to float double half bfloat16 type_as sum mean cumsum neg __neg__"
)
RESAMPLE = (F.interpolate, F.avg_pool2d, F.adaptive_avg_pool2d, F.pixel_shuffle, F.pixel_unshuffle, F.unfold, F.fold)
COMPLEX = (torch.view_as_complex, torch.view_as_real)  # rotary embeddings, in some nets


def _as_complex(dx: Tensor) -> Tensor:
    return torch.view_as_complex(dx.contiguous())


# A tangent lies in memory as it likes, where a view of the primal may count on its order.
COPY: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.view: Tensor.reshape,
    Tensor.view_as: Tensor.reshape_as,
    torch.view_as_complex: _as_complex,
}


def _again(
    dx: Tensor, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], i: int | None
) -> Tensor:
    out = function(dx, *args, **kwargs)
    return out if i is None else out[i]


def _linear_map(function: Callable[..., Any]) -> Rule:
    again = COPY.get(function, function)

    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(primal(a) for a in args), {name: primal(a) for name, a in kwargs.items()}
        out = function(primal(x), *args, **kwargs)
        if isinstance(out, Tensor):
            if isinstance(x, Dual) and not (out.is_floating_point() or out.is_complex()):
                raise NoRule(f"{function.__name__} to {out.dtype}")
            return carry(out, _again, (x,), again, args, kwargs, None)
        return tuple(carry(p, _again, (x,), again, args, kwargs, i) for i, p in enumerate(out))

    return apply


for _name in LINEAR.split():
    _method = getattr(Tensor, _name)
    _map = torch.unflatten if _name == "unflatten" else _method  # this one method does not compile
    rule(*(f for f in (_method, getattr(torch, _name, None)) if callable(f)))(_linear_map(_map))
for _function in (*RESAMPLE, *COMPLEX):
    rule(_function)(_linear_map(_function))


@rule(F.pad)
def pad(x: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Array:
    """Whatever the border is filled with, it does not move."""
    return carry(F.pad(x.p, pad, mode, value), _pad, (x,), tuple(pad), mode)


def _pad(dx: Tensor, pad: tuple[int, ...], mode: str) -> Tensor:
    return F.pad(dx, pad, mode)


@rule(torch.cat, torch.concat)
def cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    """What does not move adds zeros."""
    ps = [primal(x) for x in tensors]
    return carry(torch.cat(ps, dim), _cat, tuple(tensors), [p.shape for p in ps], dim)


def _cat(*rest: Any) -> Tensor:
    *moved, shapes, dim = rest
    like = next(d for d in moved if d is not None)
    return torch.cat([like.new_zeros(s) if d is None else d for d, s in zip(moved, shapes, strict=True)], dim)


@rule(torch.stack)
def stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    """As cat."""
    return carry(torch.stack([primal(x) for x in tensors], dim), _stack, tuple(tensors), dim)


def _stack(*rest: Any) -> Tensor:
    *moved, dim = rest
    like = next(d for d in moved if d is not None)
    return torch.stack([torch.zeros_like(like) if d is None else d for d in moved], dim)


@rule(torch.where)
def where(condition: Tensor, a: Any, other: Any) -> Array:
    """Choose among tangents as among values."""
    return carry(torch.where(condition, primal(a), primal(other)), _where, (a, other), condition)


@rule(Tensor.where)
def where_method(a: Any, condition: Tensor, other: Any) -> Array:
    """As where."""
    return where(condition, a, other)


def _where(da: Tensor | None, db: Tensor | None, condition: Tensor) -> Tensor:
    return torch.where(condition, 0.0 if da is None else da, 0.0 if db is None else db)


@rule(torch.masked_fill, Tensor.masked_fill)
def masked_fill(x: Dual, mask: Tensor, value: Any) -> Array:
    """What is filled in does not move."""
    return carry(x.p.masked_fill(mask, value), _masked_fill, (x,), mask)


def _masked_fill(dx: Tensor, mask: Tensor) -> Tensor:
    return dx.masked_fill(mask, 0.0)


# Comparisons, and constants like another tensor: of primals. The outcome is constant almost everywhere: no tangent.


def _compare(function: Callable[..., Tensor]) -> Rule:
    def apply(a: Any, other: Any) -> Tensor:
        return function(primal(a), primal(other))

    return apply


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _functions = [getattr(torch, _name), getattr(Tensor, _name), getattr(Tensor, f"__{_name}__")]
    rule(*_functions)(_compare(getattr(torch, _name)))


def _constant(function: Callable[..., Any]) -> Rule:
    def apply(x: Dual, *args: Any, **kwargs: Any) -> Any:
        return function(x.p, *args, **kwargs)

    return apply


for _name in ("zeros", "ones", "full", "empty"):
    for _function in (getattr(torch, f"{_name}_like"), getattr(Tensor, f"new_{_name}")):
        rule(_function)(_constant(_function))
rule(Tensor.new_tensor)(_constant(Tensor.new_tensor))
rule(Tensor.is_contiguous)(_constant(Tensor.is_contiguous))


# Sums and products.


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
    return carry(p, _leibniz, (a, b), product, *kept)


def _leibniz(da: Tensor | None, db: Tensor | None, product: Callable[..., Tensor], a: Any, b: Any) -> Tensor:
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
    """d(a / b) = (da - (a / b) db) / b."""
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
def power(x: Dual, exponent: Any) -> Array:
    """d(x^n) = n x^(n - 1) dx, n a number; a tensor raises NoRule."""
    if not isinstance(exponent, int | float):
        raise NoRule("pow with a tensor as exponent")
    return carry(x.p**exponent, _power, (x,), x.p, exponent)


def _power(dx: Tensor, x: Tensor, n: int | float) -> Tensor:
    return n * x ** (n - 1) * dx if n else torch.zeros_like(dx)


# Functions of one number: their derivative from what went in (x), or from what came out (y).


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


def _elsewhere(name: str, inplace: bool) -> None:
    """Raise NoRule where the result is to overwrite the input, which other Duals may be views of."""
    if inplace:
        raise NoRule(f"{name} with inplace=True")


@rule(F.relu)
def relu(x: Dual, inplace: bool = False) -> Array:
    """Raises NoRule in place."""
    _elsewhere("relu", inplace)
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
    _elsewhere("silu", inplace)
    return carry(F.silu(x.p), _silu, (x,), x.p)


def _silu(dx: Tensor, x: Tensor) -> Tensor:
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


# Layers.


@rule(F.linear)
def linear(x: Dual, weight: Tensor, bias: Tensor | None = None) -> Array:
    """d(x W^T + b) = dx W^T: one product. Forward-mode differentiation makes two, the second with zeros for dW."""
    return carry(F.linear(x.p, weight, bias), F.linear, (x,), weight)


@rule(F.conv1d)
def conv1d(x: Dual, weight: Tensor, bias: Tensor | None = None, *how: Any, **named: Any) -> Array:
    """Linear, but for the bias."""
    return carry(F.conv1d(x.p, weight, bias, *how, **named), _convolve, (x,), F.conv1d, weight, how, named)


@rule(F.conv2d)
def conv2d(x: Dual, weight: Tensor, bias: Tensor | None = None, *how: Any, **named: Any) -> Array:
    """Linear, but for the bias."""
    return carry(F.conv2d(x.p, weight, bias, *how, **named), _convolve, (x,), F.conv2d, weight, how, named)


@rule(F.conv_transpose2d)
def conv_transpose2d(x: Dual, weight: Tensor, bias: Tensor | None = None, *how: Any, **named: Any) -> Array:
    """Linear, but for the bias."""
    return carry(
        F.conv_transpose2d(x.p, weight, bias, *how, **named), _convolve, (x,), F.conv_transpose2d, weight, how, named
    )


def _convolve(
    dx: Tensor, convolution: Callable[..., Tensor], weight: Tensor, how: tuple[Any, ...], named: dict[str, Any]
) -> Tensor:
    return convolution(dx, weight, None, *how, **named)


@rule(F.dropout)
def dropout(x: Dual, p: int | float = 0.5, training: bool = True, inplace: bool = False) -> Array:
    """The tangent meets the same mask. torch's generator moves as it does without a tangent. NoRule in place."""
    _elsewhere("dropout", inplace)
    if p == 0 or not training:
        return x  # pyright: ignore[reportReturnType]
    mask = F.dropout(torch.ones_like(x.p), p)
    return carry(x.p * mask, _leibniz, (x, None), torch.mul, None, mask)


@rule(F.layer_norm)
def layer_norm(
    x: Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Array:
    """With y = (x - mean) rstd:  dy = rstd (dx - mean(dx) - y mean(y dx))."""
    out, mean, rstd = torch.native_layer_norm(x.p, list(normalized_shape), weight, bias, eps)
    plain = weight is None and bias is None
    return carry(
        out, _layer_norm, (x,), out if plain else x.p, None if plain else mean, rstd, weight, len(normalized_shape)
    )


def _layer_norm(dx: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, axes: int) -> Tensor:
    over, dx = tuple(range(-axes, 0)), dx.to(rstd.dtype)
    y = x if mean is None else (x - mean) * rstd
    along = (y * dx).mean(over, keepdim=True)
    dy = (dx - dx.mean(over, keepdim=True)).addcmul_(y.to(dx.dtype), along, value=-1).mul_(rstd)
    return dy if weight is None else dy * weight


@rule(F.rms_norm)
def rms_norm(x: Dual, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Array:
    """With y = x / rms(x):  dy = (dx - y mean(y dx)) / rms(x)."""
    out = F.rms_norm(x.p, list(normalized_shape), weight, eps)
    return carry(out, _rms_norm, (x,), x.p, weight, eps, len(normalized_shape))


def _rms_norm(dx: Tensor, x: Tensor, weight: Tensor | None, eps: float | None, axes: int) -> Tensor:
    over, exact = tuple(range(-axes, 0)), torch.promote_types(x.dtype, torch.float32)
    eps = torch.finfo(exact).eps if eps is None else eps
    x, dx = x.to(exact), dx.to(exact)
    inverse = (x.square().mean(over, keepdim=True) + eps).rsqrt()
    y = x * inverse
    dy = (dx - y * (y * dx).mean(over, keepdim=True)) * inverse
    return dy if weight is None else dy * weight


@rule(F.normalize)
def normalize(x: Dual, p: int | float = 2.0, dim: int = 1, eps: int | float = 1e-12) -> Array:
    """With n = max(|x|, eps) and y = x / n:  dy = (dx - y sum(y dx)) / n; dx / eps below eps."""
    if p != 2:
        raise NoRule(f"normalize with p={p}")
    return carry(F.normalize(x.p, p, dim, eps), _normalize, (x,), x.p, dim, eps)


def _normalize(dx: Tensor, x: Tensor, dim: int, eps: int | float) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    x, dx = x.to(exact), dx.to(exact)
    n = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    inverse = n.clamp_min(eps).reciprocal()
    y = x * inverse
    return (dx - (n > eps) * y * (y * dx).sum(dim, keepdim=True)) * inverse


@rule(torch.linalg.vector_norm)
def vector_norm(x: Dual, ord: int | float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    """d|x| = sum(x dx) / |x|, the Euclidean norm; zero at zero, as autograd has it."""
    if ord != 2:
        raise NoRule(f"vector_norm with ord={ord}")
    n = torch.linalg.vector_norm(x.p, ord, dim, keepdim, dtype=dtype)
    return carry(n, _vector_norm, (x,), x.p, n, dim, keepdim)


def _vector_norm(dx: Tensor, x: Tensor, n: Tensor, dim: Any, keepdim: bool) -> Tensor:
    along = (x.to(n.dtype) * dx.to(n.dtype)).sum(dim, keepdim)
    return torch.where(n > 0, along / n, 0.0)


@rule(F.group_norm)
def group_norm(
    x: Dual, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Array:
    """As layer_norm, over the channels of a group and all places."""
    out = F.group_norm(x.p, num_groups, weight, bias, eps)
    return carry(out, _group_norm, (x,), x.p, num_groups, weight, eps)


def _group_norm(dx: Tensor, x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    rows, shape = (x.shape[0], groups, -1), x.shape
    x, dx = x.to(exact).reshape(rows), dx.to(exact).reshape(rows)
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    dy = _layer_norm(dx, x, mean, rstd, None, 1).view(shape)
    return dy if weight is None else dy * weight.view(-1, *(1,) * (len(shape) - 2))


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: int | float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """See `dumo.flow.attention`. Raises NoRule for masks, dropout and grouped queries."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise NoRule("scaled_dot_product_attention with a mask, dropout or grouped queries")
    q, k, v = (primal(x) for x in (query, key, value))
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale  # to the bit as torch does
    o, lse = attention.attend(q, k, v, scale)
    return carry(o, _attend, (query, key, value), q, k, v, o, lse, scale)


def _attend(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    return attention.tangent(q, k, v, dq, dk, dv, o, lse, scale)
