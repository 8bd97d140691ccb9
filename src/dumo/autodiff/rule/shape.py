"""Rules of views, copies and other linear maps, concatenation, assignment, selection, comparisons and constants."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dumo.autodiff.dual import Dual, NoRule, Rule, carry, differentiate, mark_view, pair, primal, rule, tangent
from dumo.types import Array

# Tensor methods that are linear in their first operand and may return a view of it.
_VIEWS = (
    "view reshape view_as reshape_as expand expand_as flatten unflatten squeeze unsqueeze permute transpose movedim "
    "swapaxes __getitem__ narrow select chunk split split_with_sizes unbind"
)
# Tensor methods that are linear in their first operand and return a copy.
_COPIES = (
    "contiguous clone index_select gather repeat repeat_interleave tile roll flip tril triu to float double half "
    "bfloat16 type_as sum mean cumsum neg __neg__"
)
_RESAMPLERS = (F.interpolate, F.avg_pool2d, F.adaptive_avg_pool2d, F.pixel_shuffle, F.pixel_unshuffle, F.unfold, F.fold)
_COMPLEX_VIEWS = (torch.view_as_complex, torch.view_as_real)


def _view_as_complex(dx: Tensor) -> Tensor:
    return torch.view_as_complex(dx.contiguous())


# A tangent may have another memory layout than its primal, so a view of the primal may need a copy of the tangent.
_JVP_OF_VIEW: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.view: Tensor.reshape,
    Tensor.view_as: Tensor.reshape_as,
    torch.view_as_complex: _view_as_complex,
}


def _linear_map(function: Callable[..., Any]) -> Rule:
    """Return the rule of a function that is linear in its first operand. It may return several tensors, as `chunk`."""
    jvp = _JVP_OF_VIEW.get(function, function)
    makes_view = function.__name__ in _VIEWS.split() or function in _COMPLEX_VIEWS

    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        primal_args = tuple(primal(a) for a in args)
        primal_kwargs = {name: primal(a) for name, a in kwargs.items()}
        out = function(primal(x), *primal_args, **primal_kwargs)
        # Return the same Dual, because a later assignment must be visible in both.
        if isinstance(x, Dual) and out is x.p:
            return x
        # Several views.
        if not isinstance(out, Tensor):
            duals: list[Array] = []
            for i, part in enumerate(out):
                duals.append(carry(part, _jvp_part, (x,), jvp, primal_args, primal_kwargs, i))
                mark_view(duals[i], x)
            return tuple(duals)
        # Integers: a view reinterprets the bits, a copy is constant almost everywhere.
        if isinstance(x, Dual) and not (out.is_floating_point() or out.is_complex()):
            if makes_view:
                raise NoRule(f"{function.__name__} to {out.dtype}")
            return out
        mapped = carry(out, _jvp_linear_map, (x,), jvp, primal_args, primal_kwargs)
        if makes_view:
            mark_view(mapped, x)
        return mapped

    return apply


def _jvp_linear_map(
    dx: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    return function(dx, *args, **kwargs)


def _jvp_part(
    dx: Tensor, function: Callable[..., Sequence[Tensor]], args: tuple[Any, ...], kwargs: dict[str, Any], i: int
) -> Tensor:
    return function(dx, *args, **kwargs)[i]


for _name in f"{_VIEWS} {_COPIES}".split():
    _method = getattr(Tensor, _name)
    # torch.compile does not support Tensor.unflatten.
    _map = torch.unflatten if _name == "unflatten" else _method
    rule(*(f for f in (_method, getattr(torch, _name, None)) if callable(f)))(_linear_map(_map))
for _function in (*_RESAMPLERS, *_COMPLEX_VIEWS):
    rule(_function)(_linear_map(_function))


@rule(F.pad)
def pad(x: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Array:
    """Pad the tangent with zeros, because the fill value is a constant."""
    return carry(F.pad(x.p, pad, mode, value), F.pad, (x,), tuple(pad), mode)


@rule(torch.cat, torch.concat)
def cat(tensors: Sequence[Array], dim: int = 0) -> Array:
    """Concatenate the tangents, zeros for tensors without one."""
    primals = [primal(x) for x in tensors]
    return carry(torch.cat(primals, dim), _jvp_cat, tuple(tensors), [p.shape for p in primals], dim)


def _jvp_cat(*arguments: Any) -> Tensor:
    """Compute the JVP from the tangents, the shapes of all primals, and the axis."""
    *tangents, shapes, dim = arguments
    return torch.cat(_filled_with_zeros(tangents, shapes), dim)


def _filled_with_zeros(tangents: Sequence[Tensor | None], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Replace None by zeros of the primal's shape; at least one tangent is not None."""
    like = next(dx for dx in tangents if dx is not None)
    return [like.new_zeros(shape) if dx is None else dx for dx, shape in zip(tangents, shapes, strict=True)]


@rule(torch.stack)
def stack(tensors: Sequence[Array], dim: int = 0) -> Array:
    """Stack the tangents, zeros for tensors without one."""
    return carry(torch.stack([primal(x) for x in tensors], dim), _jvp_stack, tuple(tensors), dim)


def _jvp_stack(*arguments: Any) -> Tensor:
    """Compute the JVP from the tangents, all of one shape, and the axis."""
    *tangents, dim = arguments
    like = next(dx for dx in tangents if dx is not None)
    return torch.stack([torch.zeros_like(like) if dx is None else dx for dx in tangents], dim)


@rule("pad_sequence")
def pad_sequence(
    sequences: Iterable[Array], batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Array:
    """Stack the tangents, padded with zeros; zeros for sequences without one."""
    rows = tuple(sequences)
    primals = [primal(x) for x in rows]
    out = torch.nn.utils.rnn.pad_sequence(primals, batch_first, padding_value, padding_side)
    return carry(out, _jvp_pad_sequence, rows, [p.shape for p in primals], batch_first, padding_side)


def _jvp_pad_sequence(*arguments: Any) -> Tensor:
    """Compute the JVP from the tangents, the shapes of all primals, `batch_first`, and the padded side."""
    *tangents, shapes, batch_first, side = arguments
    rows = _filled_with_zeros(tangents, shapes)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first, 0.0, side)


@rule(Tensor.__setitem__)
def assign(x: Any, place: Any, value: Any) -> None:
    """Assign `x[place] = value` in a copy that becomes the primal of x, because a deferred JVP may need the old one.

    Raises NoRule if x is a view or has a view in use, neither of which would see the change, and if x is a plain tensor
    and the value has a tangent.
    """
    if not isinstance(x, Dual):
        if tangent(value) is not None:
            raise NoRule("Tensor.__setitem__ of a Dual into a tensor")
        x[place] = primal(value)
        return
    if x.base is not None:
        raise NoRule("Tensor.__setitem__ on a view")
    if any(view() is not None for view in x.views):
        raise NoRule("Tensor.__setitem__ on a tensor with a view in use")
    x.views.clear()
    p = x.p.clone()
    p[place] = primal(value)
    assigned = carry(p, _jvp_assign, (x, value), place, p.shape)
    x.p = p
    x.t = tangent(assigned)
    x.recorded = isinstance(assigned, Dual) and assigned.recorded


def _jvp_assign(dx: Tensor | None, dy: Tensor | None, place: Any, shape: Sequence[int]) -> Tensor:
    """Compute the tangent of x, of this shape, after `x[place] = y`; at least one tangent is not None."""
    out = cast(Tensor, dy).new_zeros(shape) if dx is None else dx.clone()
    out[place] = 0.0 if dy is None else dy
    return out


@rule(torch.where)
def where(condition: Tensor, a: Any, other: Any) -> Array:
    """Select among the tangents as among the values; zeros for an operand without one."""
    return carry(torch.where(condition, primal(a), primal(other)), _jvp_where, (a, other), condition)


@rule(Tensor.where)
def where_method(a: Any, condition: Tensor, other: Any) -> Array:
    """As torch.where, with the condition second."""
    return where(condition, a, other)


def _jvp_where(da: Tensor | None, db: Tensor | None, condition: Tensor) -> Tensor:
    return torch.where(condition, 0.0 if da is None else da, 0.0 if db is None else db)


@rule(torch.masked_fill, Tensor.masked_fill)
def masked_fill(x: Dual, mask: Tensor, value: Any) -> Array:
    """Fill the tangent with zeros, because the value is a constant."""
    return carry(x.p.masked_fill(mask, value), torch.masked_fill, (x,), mask, 0.0)


@rule(torch.clamp, torch.clip, Tensor.clamp, Tensor.clip)
def clamp(x: Any, min: Any = None, max: Any = None) -> Array:
    """Keep dx if x is between the bounds, else zero. If a bound is a Dual, use torch's own derivative."""
    if isinstance(min, Dual) or isinstance(max, Dual) or not isinstance(x, Dual):
        return differentiate(torch.clamp, x, min, max)
    inside = torch.ones_like(x.p, dtype=torch.bool)
    if min is not None:
        inside = inside & (x.p >= min)
    if max is not None:
        inside = inside & (x.p <= max)
    return carry(torch.clamp(x.p, min, max), _jvp_clamp, (x,), inside)


def _jvp_clamp(dx: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, dx, 0.0)


# Functions that return integers or booleans, which are constant almost everywhere.
_DISCRETE = (
    "isnan isinf isfinite isposinf isneginf signbit argmax argmin argsort nonzero any all count_nonzero logical_not "
    "logical_and logical_or logical_xor searchsorted bucketize long int short bool"
)


def _on_primals(function: Callable[..., Any]) -> Rule:
    """Return the rule of a function whose result is constant almost everywhere: call it on the primals."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return function(*map(primal, args), **{name: primal(x) for name, x in kwargs.items()})

    return apply


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _functions = [getattr(torch, _name), getattr(Tensor, _name), getattr(Tensor, f"__{_name}__")]
    rule(*_functions)(_on_primals(getattr(torch, _name)))


for _name in _DISCRETE.split():
    for _function in (getattr(torch, _name, None), getattr(Tensor, _name, None)):
        if callable(_function) and not isinstance(_function, torch.dtype):
            rule(_function)(_on_primals(_function))


def _constant(function: Callable[..., Tensor]) -> Rule:
    """Return the rule of a function that creates a constant: a Dual without a tangent, to which one may be assigned."""

    def apply(x: Dual, *args: Any, **kwargs: Any) -> Any:
        out = function(x.p, *args, **kwargs)
        return pair(out, None) if out.is_floating_point() or out.is_complex() else out

    return apply


for _name in ("zeros", "ones", "full", "empty"):
    for _function in (getattr(torch, f"{_name}_like"), getattr(Tensor, f"new_{_name}")):
        rule(_function)(_constant(_function))
rule(Tensor.new_tensor)(_on_primals(Tensor.new_tensor))
rule(Tensor.is_contiguous)(_on_primals(Tensor.is_contiguous))
