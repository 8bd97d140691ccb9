"""Rules of layers: linear layers, convolutions, activations, dropout, norms and attention.

Norms and their JVPs compute in at least float32, except a 16-bit layer norm on a CPU, whose statistics torch returns in
16 bits.
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
from dumo.autodiff.rule.algebra import jvp_product
from dumo.types import Array

aten = torch.ops.aten
# The constants of F.selu (Klambauer et al. 2017, Eq. 14).
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


@rule(F.linear)
def linear(x: Dual, weight: Tensor, bias: Tensor | None = None) -> Array:
    """d(x W^T + b) = dx W^T."""
    return carry(F.linear(x.p, weight, bias), F.linear, (x,), weight)


def _convolution(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of a convolution: the JVP convolves dx with the same weights and options, without the bias."""

    def apply(x: Dual, weight: Tensor, bias: Tensor | None = None, *options: Any, **named_options: Any) -> Array:
        value = function(x.p, weight, bias, *options, **named_options)
        return carry(value, _jvp_convolution, (x,), function, weight, options, named_options)

    return apply


for _axes in "123":
    for _name in ("conv", "conv_transpose"):
        _function = getattr(F, f"{_name}{_axes}d")
        rule(_function)(_convolution(_function))


def _jvp_convolution(
    dx: Tensor,
    function: Callable[..., Tensor],
    weight: Tensor,
    options: tuple[Any, ...],
    named_options: dict[str, Any],
) -> Tensor:
    return function(dx, weight, None, *options, **named_options)


@rule(F.relu)
def relu(x: Dual, inplace: bool = False) -> Array:
    """As torch.relu. Raises NoRule if in place."""
    refuse_inplace("relu", inplace)
    return RULES[torch.relu](x)


@rule(F.gelu)
def gelu(x: Dual, approximate: str = "none") -> Array:
    """Use the backward kernel, which is also the forward derivative of an elementwise function."""
    return carry(F.gelu(x.p, approximate=approximate), _jvp_gelu, (x,), x.p, approximate)


def _jvp_gelu(dx: Tensor, x: Tensor, approximate: str) -> Tensor:
    return aten.gelu_backward(dx, x, approximate=approximate)


@rule(F.silu)
def silu(x: Dual, inplace: bool = False) -> Array:
    """Use the backward kernel, as gelu. Raises NoRule if in place."""
    refuse_inplace("silu", inplace)
    return carry(F.silu(x.p), _jvp_silu, (x,), x.p)


def _jvp_silu(dx: Tensor, x: Tensor) -> Tensor:
    # If the tangent is recorded, it needs a gradient, which the backward kernel does not have.
    if torch.is_grad_enabled():
        y = x.sigmoid()
        return dx * y * (1 + x * (1 - y))
    return aten.silu_backward(dx, x)


@rule(F.mish)
def mish(x: Dual, inplace: bool = False) -> Array:
    """d(x tanh(s)) = (tanh(s) + x (1 - tanh(s)^2) sigmoid(x)) dx, s = softplus(x). Raises NoRule if in place."""
    refuse_inplace("mish", inplace)
    return carry(F.mish(x.p), _jvp_mish, (x,), x.p)


def _jvp_mish(dx: Tensor, x: Tensor) -> Tensor:
    y = F.softplus(x).tanh()
    return dx * (y + x * (1 - y * y) * x.sigmoid())


@rule(F.leaky_relu)
def leaky_relu(x: Dual, negative_slope: float = 0.01, inplace: bool = False) -> Array:
    """Multiply dx by 1 above zero, and by `negative_slope` elsewhere. Raises NoRule if in place."""
    refuse_inplace("leaky_relu", inplace)
    return carry(F.leaky_relu(x.p, negative_slope), _jvp_leaky_relu, (x,), x.p, negative_slope)


def _jvp_leaky_relu(dx: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    return torch.where(x > 0, dx, negative_slope * dx)


@rule(F.elu)
def elu(x: Dual, alpha: float = 1.0, inplace: bool = False) -> Array:
    """Multiply dx by 1 above zero, and by alpha exp(x) elsewhere. Raises NoRule if in place."""
    refuse_inplace("elu", inplace)
    return carry(F.elu(x.p, alpha), _jvp_elu, (x,), x.p, alpha)


def _jvp_elu(dx: Tensor, x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, dx, alpha * x.clamp(max=0).exp() * dx)


@rule(F.selu)
def selu(x: Dual, inplace: bool = False) -> Array:
    """As elu, times a scale (Klambauer et al. 2017). Raises NoRule if in place."""
    refuse_inplace("selu", inplace)
    return carry(F.selu(x.p), _jvp_selu, (x,), x.p)


def _jvp_selu(dx: Tensor, x: Tensor) -> Tensor:
    return _SELU_SCALE * _jvp_elu(dx, x, _SELU_ALPHA)


@rule(F.hardswish)
def hardswish(x: Dual, inplace: bool = False) -> Array:
    """Differentiate x clamp(x / 6 + 1 / 2, 0, 1). Raises NoRule if in place."""
    refuse_inplace("hardswish", inplace)
    return carry(F.hardswish(x.p), _jvp_hardswish, (x,), x.p)


def _jvp_hardswish(dx: Tensor, x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, (x / 3 + 0.5) * dx, dx))


@rule(F.softplus)
def softplus(x: Dual, beta: float = 1.0, threshold: float = 20.0) -> Array:
    """Use the backward kernel, as gelu."""
    return carry(F.softplus(x.p, beta, threshold), _jvp_softplus, (x,), x.p, beta, threshold)


def _jvp_softplus(dx: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    return aten.softplus_backward(dx, x, beta, threshold)


@rule(F.softmax)
def softmax_function(x: Dual, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Array:
    """As torch.softmax. `_stacklevel` is unused."""
    return softmax(x, dim, dtype)


@rule(torch.softmax, Tensor.softmax)
def softmax(x: Dual, dim: int, dtype: torch.dtype | None = None) -> Array:
    """dy = y (dx - sum y dx)."""
    y = torch.softmax(x.p, dim, dtype)
    return carry(y, _jvp_softmax, (x,), y, dim)


def _jvp_softmax(dx: Tensor, y: Tensor, dim: int) -> Tensor:
    y_dx = y * dx.to(y.dtype)
    return y_dx - y * y_dx.sum(dim, keepdim=True)


@rule(F.log_softmax)
def log_softmax_function(x: Dual, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Array:
    """As torch.log_softmax. `_stacklevel` is unused."""
    return log_softmax(x, dim, dtype)


@rule(torch.log_softmax, Tensor.log_softmax)
def log_softmax(x: Dual, dim: int, dtype: torch.dtype | None = None) -> Array:
    """dy = dx - sum e^y dx."""
    y = torch.log_softmax(x.p, dim, dtype)
    return carry(y, _jvp_log_softmax, (x,), y, dim)


def _jvp_log_softmax(dx: Tensor, y: Tensor, dim: int) -> Tensor:
    dx = dx.to(y.dtype)
    return dx - (y.exp() * dx).sum(dim, keepdim=True)


@rule(F.dropout)
def dropout(x: Dual, p: int | float = 0.5, training: bool = True, inplace: bool = False) -> Array:
    """d(x mask) = dx mask, with one mask for both. Raises NoRule if in place."""
    refuse_inplace("dropout", inplace)
    if p == 0 or not training:
        return x  # pyright: ignore[reportReturnType]
    mask = F.dropout(torch.ones_like(x.p), p)
    return carry(x.p * mask, jvp_product, (x, None), torch.mul, None, mask)


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
    # Autograd treats the kernel's statistics as constants, so recompute them if the tangent is recorded.
    if x.recorded:
        exact = torch.promote_types(x.p.dtype, torch.float32)
        variance, mean = torch.var_mean(x.p.to(exact), _last_axes(num_axes), correction=0, keepdim=True)
        rstd = (variance + eps).rsqrt()
    # Without weight and bias, the output is y.
    if weight is None and bias is None:
        return carry(out, _jvp_layer_norm, (x,), out, None, rstd, None, num_axes)
    return carry(out, _jvp_layer_norm, (x,), x.p, mean, rstd, weight, num_axes)


def _jvp_layer_norm(
    dx: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, num_axes: int
) -> Tensor:
    """Compute the JVP of a norm over the last `num_axes` axes. If the mean is None, x is normalized already."""
    axes = _last_axes(num_axes)
    dx = dx.to(rstd.dtype)
    y = x if mean is None else (x - mean) * rstd
    mean_y_dx = (y * dx).mean(axes, keepdim=True)
    dy = (dx - dx.mean(axes, keepdim=True)).addcmul_(y.to(dx.dtype), mean_y_dx, value=-1).mul_(rstd)
    return dy if weight is None else dy * weight


def _last_axes(num_axes: int) -> tuple[int, ...]:
    """Return the indices of the last axes, such as (-2, -1)."""
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
    """d((x - mean) rstd w + b) = dx rstd w, with running statistics, which are constants.

    Raises NoRule in training mode, in which rows depend on each other and the statistics change.
    """
    if training or running_var is None:
        raise NoRule("batch_norm in training")
    out = F.batch_norm(x.p, running_mean, running_var, weight, bias, eps=eps)
    return carry(out, _jvp_batch_norm, (x,), running_var, weight, eps)


def _jvp_batch_norm(dx: Tensor, variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return dx * scale.view(-1, *(1,) * (dx.ndim - 2)).to(dx.dtype)


@rule(F.rms_norm)
def rms_norm(x: Dual, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Array:
    """With y = x / rms(x):  dy = (dx - y mean(y dx)) / rms(x)."""
    out = F.rms_norm(x.p, list(normalized_shape), weight, eps)
    return carry(out, _jvp_rms_norm, (x,), x.p, weight, eps, len(normalized_shape))


def _jvp_rms_norm(dx: Tensor, x: Tensor, weight: Tensor | None, eps: float | None, num_axes: int) -> Tensor:
    axes = _last_axes(num_axes)
    exact = torch.promote_types(x.dtype, torch.float32)
    eps = torch.finfo(exact).eps if eps is None else eps
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
    return carry(F.normalize(x.p, p, dim, eps), _jvp_normalize, (x,), x.p, dim, eps)


def _jvp_normalize(dx: Tensor, x: Tensor, dim: int, eps: int | float) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact)
    dx = dx.to(exact)
    n = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    inverse = n.clamp_min(eps).reciprocal()
    y = x * inverse
    return (dx - (n > eps) * y * (y * dx).sum(dim, keepdim=True)) * inverse


@rule(torch.linalg.vector_norm)
def vector_norm(x: Dual, ord: int | float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    """d|x| = sum(x dx) / |x| for the Euclidean norm; zero at zero, as in autograd."""
    if ord != 2 or x.p.is_complex():
        return differentiate(torch.linalg.vector_norm, x, ord, dim, keepdim, dtype=dtype)
    n = torch.linalg.vector_norm(x.p, ord, dim, keepdim, dtype=dtype)
    return carry(n, _jvp_vector_norm, (x,), x.p, n, dim, keepdim)


def _jvp_vector_norm(dx: Tensor, x: Tensor, n: Tensor, dim: Any, keepdim: bool) -> Tensor:
    x_dx = (x.to(n.dtype) * dx.to(n.dtype)).sum(dim, keepdim)
    # 0 / 0 would have a NaN gradient.
    return torch.where(n == 0, 0.0, x_dx / torch.where(n == 0, 1.0, n))


@rule(F.group_norm)
def group_norm(
    x: Dual, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Array:
    """As layer_norm, over all pixels and the channels of a group."""
    out = F.group_norm(x.p, num_groups, weight, bias, eps)
    return carry(out, _jvp_group_norm, (x,), x.p, num_groups, weight, eps)


def _jvp_group_norm(dx: Tensor, x: Tensor, groups: int, weight: Tensor | None, eps: float) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    shape = x.shape
    group_shape = (shape[0], groups, -1)
    x = x.to(exact).reshape(group_shape)
    dx = dx.to(exact).reshape(group_shape)
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    dy = _jvp_layer_norm(dx, x, mean, rstd, None, 1).view(shape)
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
    """Use `dumo.autodiff.attention`; for a mask with a tangent torch's own derivative, for dropout single operations.

    Raises NoRule for a mask with `is_causal`, which torch refuses, and for dropout with `enable_gqa`.
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
        # The same bits as torch's default.
        scale = 1 / sqrt(q.shape[-1])
    o, lse = attention.attend(q, k, v, scale, mask, is_causal, enable_gqa)
    return carry(o, _jvp_attention, (query, key, value), q, k, v, o, lse, scale, mask, is_causal)


def _jvp_attention(
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    o: Tensor, lse: Tensor | None, scale: float, mask: Tensor | None, causal: bool,
) -> Tensor:  # fmt: skip
    # Gradients are enabled if the tangent is recorded.
    if torch.is_grad_enabled():
        return attention.recorded_tangent(q, k, v, dq, dk, dv, o, scale, mask, causal)
    return attention.tangent(q, k, v, dq, dk, dv, o, lse, scale, mask, causal)


def _dropped_attention(
    query: Any, key: Any, value: Any, mask: Any, p: float, causal: bool, scale: float | None
) -> Array:  # fmt: skip
    """Compute dropout(softmax(q k^T / sqrt(d) + mask)) v by the operations that torch uses on a CPU, on Duals."""
    if scale is None:
        scale = 1 / sqrt(query.shape[-1])
    # As torch, scale queries and keys separately.
    root = sqrt(scale)
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
    """Return a copy of a torch function, written in Python, that runs its body on Duals.

    The original would find a Dual by `has_torch_function` and call its rule again, in an infinite recursion.
    """
    assert isinstance(function, FunctionType), function
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


@rule(F.multi_head_attention_forward)
def multi_head_attention_forward(*args: Any, **named: Any) -> tuple[Array, Array | None]:
    """Run torch's Python implementation, which calls operations that have rules."""
    return _body(F.multi_head_attention_forward)(*args, **named)
