"""Rules of layers: linear ones, activations, dropout, norms, attention (`dumo.autodiff.rule` says how rules are made).

Norms compute in float32 at least, and so do their pushes, save a layer norm of halves on a CPU: torch gives its
statistics in halves there.
"""

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
from dumo.autodiff.rule.algebra import push_product
from dumo.types import Array

aten = torch.ops.aten
# Of F.selu, as torch has them (Klambauer et al. 2017, Eq. 14).
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


@rule(F.linear)
def linear(x: Dual, weight: Tensor, bias: Tensor | None = None) -> Array:
    """d(x W^T + b) = dx W^T: one product. torch's forward mode makes two, the second of zeros for dW."""
    return carry(F.linear(x.p, weight, bias), F.linear, (x,), weight)


def _convolution(function: Callable[..., Tensor]) -> Rule:
    """The rule of a convolution: of dx by the same weights and options, without the bias."""

    def apply(x: Dual, weight: Tensor, bias: Tensor | None = None, *options: Any, **named_options: Any) -> Array:
        value = function(x.p, weight, bias, *options, **named_options)
        return carry(value, _push_convolution, (x,), function, weight, options, named_options)

    return apply


for _axes in "123":  # conv1d, conv_transpose1d, and so on
    for _name in ("conv", "conv_transpose"):
        _function = getattr(F, f"{_name}{_axes}d")
        rule(_function)(_convolution(_function))


def _push_convolution(
    dx: Tensor,
    function: Callable[..., Tensor],
    weight: Tensor,
    options: tuple[Any, ...],
    named_options: dict[str, Any],
) -> Tensor:
    return function(dx, weight, None, *options, **named_options)


@rule(F.relu)
def relu(x: Dual, inplace: bool = False) -> Array:
    """As torch.relu. Raises NoRule in place."""
    refuse_inplace("relu", inplace)
    return RULES[torch.relu](x)


@rule(F.gelu)
def gelu(x: Dual, approximate: str = "none") -> Array:
    """By the kernel of the backward pass: of an elementwise function it is the forward derivative, too."""
    return carry(F.gelu(x.p, approximate=approximate), _push_gelu, (x,), x.p, approximate)


def _push_gelu(dx: Tensor, x: Tensor, approximate: str) -> Tensor:
    return aten.gelu_backward(dx, x, approximate=approximate)


@rule(F.silu)
def silu(x: Dual, inplace: bool = False) -> Array:
    """By the kernel of the backward pass, as gelu. Raises NoRule in place."""
    refuse_inplace("silu", inplace)
    return carry(F.silu(x.p), _push_silu, (x,), x.p)


def _push_silu(dx: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # the tangent is recorded, and this kernel has no derivative of its own
        y = x.sigmoid()
        return dx * y * (1 + x * (1 - y))
    return aten.silu_backward(dx, x)


@rule(F.mish)
def mish(x: Dual, inplace: bool = False) -> Array:
    """x tanh(s), s = softplus(x): its slope is tanh(s) + x (1 - tanh(s)^2) sigmoid(x). Raises NoRule in place."""
    refuse_inplace("mish", inplace)
    return carry(F.mish(x.p), _push_mish, (x,), x.p)


def _push_mish(dx: Tensor, x: Tensor) -> Tensor:
    y = F.softplus(x).tanh()
    return dx * (y + x * (1 - y * y) * x.sigmoid())


@rule(F.leaky_relu)
def leaky_relu(x: Dual, negative_slope: float = 0.01, inplace: bool = False) -> Array:
    """Its slope is 1 above zero, and `negative_slope` else. Raises NoRule in place."""
    refuse_inplace("leaky_relu", inplace)
    return carry(F.leaky_relu(x.p, negative_slope), _push_leaky_relu, (x,), x.p, negative_slope)


def _push_leaky_relu(dx: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    return torch.where(x > 0, dx, negative_slope * dx)


@rule(F.elu)
def elu(x: Dual, alpha: float = 1.0, inplace: bool = False) -> Array:
    """Its slope is 1 above zero, and alpha exp(x) else. Raises NoRule in place."""
    refuse_inplace("elu", inplace)
    return carry(F.elu(x.p, alpha), _push_elu, (x,), x.p, alpha)


def _push_elu(dx: Tensor, x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, dx, alpha * x.clamp(max=0).exp() * dx)


@rule(F.selu)
def selu(x: Dual, inplace: bool = False) -> Array:
    """Scale times elu (Klambauer et al. 2017). Raises NoRule in place."""
    refuse_inplace("selu", inplace)
    return carry(F.selu(x.p), _push_selu, (x,), x.p)


def _push_selu(dx: Tensor, x: Tensor) -> Tensor:
    return _SELU_SCALE * _push_elu(dx, x, _SELU_ALPHA)


@rule(F.hardswish)
def hardswish(x: Dual, inplace: bool = False) -> Array:
    """x clamp(x / 6 + 1 / 2, 0, 1). Raises NoRule in place."""
    refuse_inplace("hardswish", inplace)
    return carry(F.hardswish(x.p), _push_hardswish, (x,), x.p)


def _push_hardswish(dx: Tensor, x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, (x / 3 + 0.5) * dx, dx))


@rule(F.softplus)
def softplus(x: Dual, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """By the kernel of the backward pass, as gelu."""
    return carry(F.softplus(x.p, beta, threshold), _push_softplus, (x,), x.p, beta, threshold)


def _push_softplus(dx: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    return aten.softplus_backward(dx, x, beta, threshold)


@rule(F.softmax)
def softmax_function(x: Dual, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Array:
    """As torch.softmax; the parameter without a use here is of torch's warnings."""
    return softmax(x, dim, dtype)


@rule(torch.softmax, Tensor.softmax)
def softmax(x: Dual, dim: int, dtype: torch.dtype | None = None) -> Array:
    """dy = y (dx - sum y dx)."""
    y = torch.softmax(x.p, dim, dtype)
    return carry(y, _push_softmax, (x,), y, dim)


def _push_softmax(dx: Tensor, y: Tensor, dim: int) -> Tensor:
    y_dx = y * dx.to(y.dtype)
    return y_dx - y * y_dx.sum(dim, keepdim=True)


@rule(F.log_softmax)
def log_softmax_function(x: Dual, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Array:
    """As torch.log_softmax; the parameter without a use here is of torch's warnings."""
    return log_softmax(x, dim, dtype)


@rule(torch.log_softmax, Tensor.log_softmax)
def log_softmax(x: Dual, dim: int, dtype: torch.dtype | None = None) -> Array:
    """dy = dx - sum e^y dx."""
    y = torch.log_softmax(x.p, dim, dtype)
    return carry(y, _push_log_softmax, (x,), y, dim)


def _push_log_softmax(dx: Tensor, y: Tensor, dim: int) -> Tensor:
    dx = dx.to(y.dtype)
    return dx - (y.exp() * dx).sum(dim, keepdim=True)


@rule(F.dropout)
def dropout(x: Dual, p: int | float = 0.5, training: bool = True, inplace: bool = False) -> Array:
    """d(x mask) = dx mask: torch's generator draws one mask for both. Raises NoRule in place."""
    refuse_inplace("dropout", inplace)
    if p == 0 or not training:
        return x  # pyright: ignore[reportReturnType]
    mask = F.dropout(torch.ones_like(x.p), p)
    return carry(x.p * mask, push_product, (x, None), torch.mul, None, mask)


@rule(F.layer_norm)
def layer_norm(
    x: Dual,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Array:
    """With y = (x - mean) rstd, before weight and bias:  dy = rstd (dx - mean(dx) - y mean(y dx))."""
    num_axes = len(normalized_shape)
    out, mean, rstd = torch.native_layer_norm(x.p, list(normalized_shape), weight, bias, eps)
    if x.recorded:  # to autograd the kernel's statistics are constants
        exact = torch.promote_types(x.p.dtype, torch.float32)
        variance, mean = torch.var_mean(x.p.to(exact), _last_axes(num_axes), correction=0, keepdim=True)
        rstd = (variance + eps).rsqrt()
    if weight is None and bias is None:  # the output is y itself
        return carry(out, _push_layer_norm, (x,), out, None, rstd, None, num_axes)
    return carry(out, _push_layer_norm, (x,), x.p, mean, rstd, weight, num_axes)


def _push_layer_norm(
    dx: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, num_axes: int
) -> Tensor:
    """The change of the output, normalized over the last `num_axes` axes; without a mean x is normalized already."""
    axes = _last_axes(num_axes)
    dx = dx.to(rstd.dtype)
    y = x if mean is None else (x - mean) * rstd
    mean_y_dx = (y * dx).mean(axes, keepdim=True)
    dy = (dx - dx.mean(axes, keepdim=True)).addcmul_(y.to(dx.dtype), mean_y_dx, value=-1).mul_(rstd)
    return dy if weight is None else dy * weight


def _last_axes(num_axes: int) -> tuple[int, ...]:
    """The numbers of the last axes: (-2, -1) of two."""
    return tuple(range(-num_axes, 0))


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
    """d((x - mean) rstd w + b) = dx rstd w, by running statistics, which are constants.

    Raises NoRule in training, where rows mix and the statistics change.
    """
    if training or running_var is None:
        raise NoRule("batch_norm in training")
    out = F.batch_norm(x.p, running_mean, running_var, weight, bias, eps=eps)
    return carry(out, _push_batch_norm, (x,), running_var, weight, eps)


def _push_batch_norm(dx: Tensor, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return dx * scale.view(-1, *(1,) * (dx.ndim - 2)).to(dx.dtype)


@rule(F.rms_norm)
def rms_norm(x: Dual, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Array:
    """With y = x / rms(x):  dy = (dx - y mean(y dx)) / rms(x)."""
    out = F.rms_norm(x.p, list(normalized_shape), weight, eps)
    return carry(out, _push_rms_norm, (x,), x.p, weight, eps, len(normalized_shape))


def _push_rms_norm(dx: Tensor, x: Tensor, weight: Tensor | None, eps: float | None, num_axes: int) -> Tensor:
    axes = _last_axes(num_axes)
    exact = torch.promote_types(x.dtype, torch.float32)
    eps = torch.finfo(exact).eps if eps is None else eps  # torch's default
    x = x.to(exact)
    dx = dx.to(exact)
    rrms = (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    y = x * rrms
    dy = (dx - y * (y * dx).mean(axes, keepdim=True)) * rrms
    return dy if weight is None else dy * weight


@rule(F.normalize)
def normalize(x: Dual, p: int | float = 2.0, dim: int = 1, eps: int | float = 1e-12) -> Array:
    """With n = max(|x|, eps) and y = x / n:  dy = (dx - y sum(y dx)) / n; dx / eps below eps."""
    if p != 2 or x.p.is_complex():
        return differentiate(F.normalize, x, p, dim, eps)
    return carry(F.normalize(x.p, p, dim, eps), _push_normalize, (x,), x.p, dim, eps)


def _push_normalize(dx: Tensor, x: Tensor, dim: int, eps: int | float) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    dx = dx.to(exact)
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
    return carry(n, _push_vector_norm, (x,), x.p, n, dim, keepdim)


def _push_vector_norm(dx: Tensor, x: Tensor, n: Tensor, dim: Any, keepdim: bool) -> Tensor:
    x_dx = (x.to(n.dtype) * dx.to(n.dtype)).sum(dim, keepdim)
    return torch.where(n == 0, 0.0, x_dx / torch.where(n == 0, 1.0, n))  # 0 / 0 would have no gradient


@rule(F.group_norm)
def group_norm(
    x: Dual, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Array:
    """As layer_norm, over the channels of a group and all pixels."""
    out = F.group_norm(x.p, num_groups, weight, bias, eps)
    return carry(out, _push_group_norm, (x,), x.p, num_groups, weight, eps)


def _push_group_norm(dx: Tensor, x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    shape = x.shape
    group_shape = (shape[0], groups, -1)
    x = x.to(exact).reshape(group_shape)
    dx = dx.to(exact).reshape(group_shape)
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    dy = _push_layer_norm(dx, x, mean, rstd, None, 1).view(shape)
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
    """By `dumo.autodiff.attention`; where the mask moves, by torch's own derivative; with dropout, by its parts.

    Raises NoRule for what torch refuses, a mask with `is_causal`, and for dropout with `enable_gqa`.
    """
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
    q = primal(query)
    k = primal(key)
    v = primal(value)
    mask = primal(attn_mask)
    if scale is None:
        scale = 1 / sqrt(q.shape[-1])  # to the bit as torch has it
    o, lse = attention.attend(q, k, v, scale, mask, is_causal, enable_gqa)
    return carry(o, _push_attention, (query, key, value), q, k, v, o, lse, scale, mask, is_causal)


def _push_attention(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    o: Tensor, lse: Tensor | None, scale: float, mask: Tensor | None, causal: bool,
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled():  # the tangent is recorded
        return attention.recorded_tangent(q, k, v, dq, dk, dv, o, scale, mask, causal)
    return attention.tangent(q, k, v, dq, dk, dv, o, lse, scale, mask, causal)


def _dropped_attention(
    query: Any, key: Any, value: Any, mask: Any, p: float, causal: bool, scale: float | None
) -> Array:  # fmt: skip
    """dropout(softmax(q k^T / sqrt(d) + mask)) v, by operations on Duals: the very ones that torch makes on a CPU."""
    if scale is None:
        scale = 1 / sqrt(query.shape[-1])
    root = sqrt(scale)  # torch scales queries and keys, to the bit
    scores = (query * root) @ (key.transpose(-2, -1) * root)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill(~mask, -inf)
    if mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1), p) @ value


@cache
def _body(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function of torch, written in Python, that does its own work on Duals.

    The original first asks `has_torch_function`, finds a Dual, and hands the call back to its rule, without an end.
    """
    assert isinstance(function, FunctionType), function
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


@rule(F.multi_head_attention_forward)
def multi_head_attention_forward(*args: Any, **named: Any) -> tuple[Array, Array | None]:
    """By its parts: torch's own Python calls operations that have rules."""
    return _body(F.multi_head_attention_forward)(*args, **named)
