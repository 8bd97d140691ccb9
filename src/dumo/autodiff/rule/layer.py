"""Layers: linear ones, activations, norms, dropout, attention."""

from collections.abc import Callable, Sequence
from functools import cache
from math import inf, sqrt
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dumo.autodiff import attention
from dumo.autodiff.dual import RULES, Dual, NoRule, Rule, carry, differentiate, primal, refuse_inplace, rule, tangent
from dumo.autodiff.rule.algebra import leibniz
from dumo.types import Array

aten = torch.ops.aten


@rule(F.linear)
def linear(x: Dual, weight: Tensor, bias: Tensor | None = None) -> Array:
    """d(x W^T + b) = dx W^T: one product. Forward-mode differentiation makes two, the second with zeros for dW."""
    return carry(F.linear(x.p, weight, bias), F.linear, (x,), weight)


def _convolution(function: Callable[..., Tensor]) -> Rule:
    """Linear, but for the bias."""

    def apply(x: Dual, weight: Tensor, bias: Tensor | None = None, *how: Any, **named: Any) -> Array:
        return carry(function(x.p, weight, bias, *how, **named), _convolve, (x,), function, weight, how, named)

    return apply


for _axes in "123":
    for _name in ("conv", "conv_transpose"):
        _function = getattr(F, f"{_name}{_axes}d")
        rule(_function)(_convolution(_function))


def _convolve(
    dx: Tensor, convolution: Callable[..., Tensor], weight: Tensor, how: tuple[Any, ...], named: dict[str, Any]
) -> Tensor:
    return convolution(dx, weight, None, *how, **named)


@rule(F.relu)
def relu(x: Dual, inplace: bool = False) -> Array:
    """Raises NoRule in place."""
    refuse_inplace("relu", inplace)
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
    refuse_inplace("silu", inplace)
    return carry(F.silu(x.p), _silu, (x,), x.p)


def _silu(dx: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # recorded: this kernel has no derivative of its own
        y = x.sigmoid()
        return dx * y * (1 + x * (1 - y))
    return aten.silu_backward(dx, x)


@rule(F.mish)
def mish(x: Dual, inplace: bool = False) -> Array:
    """x tanh(s), s = softplus(x): its slope is tanh(s) + x (1 - tanh(s)^2) sigmoid(x). Raises NoRule in place."""
    refuse_inplace("mish", inplace)
    return carry(F.mish(x.p), _mish, (x,), x.p)


def _mish(dx: Tensor, x: Tensor) -> Tensor:
    y = F.softplus(x).tanh()
    return dx * (y + x * (1 - y * y) * x.sigmoid())


@rule(F.leaky_relu)
def leaky_relu(x: Dual, negative_slope: float = 0.01, inplace: bool = False) -> Array:
    """Raises NoRule in place."""
    refuse_inplace("leaky_relu", inplace)
    return carry(F.leaky_relu(x.p, negative_slope), _leaky_relu, (x,), x.p, negative_slope)


def _leaky_relu(dx: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    return torch.where(x > 0, dx, negative_slope * dx)


@rule(F.elu)
def elu(x: Dual, alpha: float = 1.0, inplace: bool = False) -> Array:
    """Raises NoRule in place."""
    refuse_inplace("elu", inplace)
    return carry(F.elu(x.p, alpha), _elu, (x,), x.p, alpha)


def _elu(dx: Tensor, x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, dx, alpha * x.clamp(max=0).exp() * dx)


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


@rule(F.dropout)
def dropout(x: Dual, p: int | float = 0.5, training: bool = True, inplace: bool = False) -> Array:
    """The tangent meets the same mask. torch's generator moves as it does without a tangent. NoRule in place."""
    refuse_inplace("dropout", inplace)
    if p == 0 or not training:
        return x  # pyright: ignore[reportReturnType]
    mask = F.dropout(torch.ones_like(x.p), p)
    return carry(x.p * mask, leibniz, (x, None), torch.mul, None, mask)


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
    if x.recorded:  # to autograd the kernel's are constants
        exact, over = torch.promote_types(x.p.dtype, torch.float32), tuple(range(-len(normalized_shape), 0))
        variance, mean = torch.var_mean(x.p.to(exact), over, correction=0, keepdim=True)
        rstd = (variance + eps).rsqrt()
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


@rule(F.batch_norm)
def batch_norm(
    x: Dual,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Array:
    """By running statistics it is linear. In training rows mix, and the statistics change: NoRule."""
    if training or running_var is None:
        raise NoRule("batch_norm in training")
    out = F.batch_norm(x.p, running_mean, running_var, weight, bias, eps=eps)
    return carry(out, _batch_norm, (x,), running_var, weight, eps)


def _batch_norm(dx: Tensor, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return dx * scale.view(-1, *(1,) * (dx.ndim - 2)).to(dx.dtype)


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
    if p != 2 or x.p.is_complex():
        return differentiate(F.normalize, x, p, dim, eps)
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
    if ord != 2 or x.p.is_complex():
        return differentiate(torch.linalg.vector_norm, x, ord, dim, keepdim, dtype=dtype)
    n = torch.linalg.vector_norm(x.p, ord, dim, keepdim, dtype=dtype)
    return carry(n, _vector_norm, (x,), x.p, n, dim, keepdim)


def _vector_norm(dx: Tensor, x: Tensor, n: Tensor, dim: Any, keepdim: bool) -> Tensor:
    along = (x.to(n.dtype) * dx.to(n.dtype)).sum(dim, keepdim)
    return torch.where(n > 0, along / torch.where(n > 0, n, 1.0), 0.0)  # 0 / 0 would have no gradient


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
    """See `dumo.autodiff.attention`; a mask that moves is differentiated by torch, dropout by its formula."""
    if is_causal and attn_mask is not None:
        raise NoRule("scaled_dot_product_attention with a mask and is_causal")
    if dropout_p:
        if enable_gqa:
            raise NoRule("scaled_dot_product_attention with dropout and enable_gqa")
        return _dropped_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if tangent(attn_mask) is not None:
        return differentiate(
            F.scaled_dot_product_attention, query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v, mask = (primal(x) for x in (query, key, value, attn_mask))
    scale = 1 / sqrt(q.shape[-1]) if scale is None else scale  # to the bit as torch does
    o, lse = attention.attend(q, k, v, scale, mask, is_causal, enable_gqa)
    return carry(o, _attend, (query, key, value), q, k, v, o, lse, scale, mask, is_causal)


def _dropped_attention(
    query: Any, key: Any, value: Any, mask: Any, p: float, causal: bool, scale: float | None
) -> Array:  # fmt: skip
    """softmax(q k / sqrt(d)) v, of whose weights some are dropped: as torch draws them on a CPU."""
    factor = sqrt(1 / sqrt(query.shape[-1]) if scale is None else scale)  # of each, as torch has it to the bit
    scores = (query * factor) @ (key.transpose(-2, -1) * factor)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill(~mask, -inf)
    if mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1), p) @ value


@cache
def _body(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that is written in Python, without the question whether another shall do its work."""
    assert isinstance(function, FunctionType), function
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


@rule(F.multi_head_attention_forward)
def multi_head_attention_forward(*args: Any, **named: Any) -> tuple[Array, Array | None]:
    """By its parts, which torch's own Python calls one after the other."""
    return _body(F.multi_head_attention_forward)(*args, **named)


def _attend(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    o: Tensor, lse: Tensor | None, scale: float, mask: Tensor | None, causal: bool,
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        return attention.recorded_tangent(q, k, v, dq, dk, dv, o, scale, mask, causal)
    return attention.tangent(q, k, v, dq, dk, dv, o, lse, scale, mask, causal)
