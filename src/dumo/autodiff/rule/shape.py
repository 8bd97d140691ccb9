"""Linear maps of one argument, whose own map moves the tangent; joins, choices and comparisons."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dumo.autodiff.dual import Dual, NoRule, Rule, carry, differentiate, pair, primal, rule, tangent
from dumo.types import Array

VIEWS = (  # what may show the numbers of another
    "view reshape view_as reshape_as expand expand_as flatten unflatten squeeze unsqueeze permute transpose movedim "
    "swapaxes __getitem__ narrow select chunk split split_with_sizes unbind"
)
COPIES = (
    "contiguous clone index_select repeat repeat_interleave tile roll flip to float double half bfloat16 type_as sum "
    "mean cumsum neg __neg__"
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
    again, view = COPY.get(function, function), function.__name__ in VIEWS.split() or function in COMPLEX

    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(primal(a) for a in args), {name: primal(a) for name, a in kwargs.items()}
        out = function(primal(x), *args, **kwargs)
        if isinstance(x, Dual) and out is x.p:
            return x  # not another: what is assigned to the one must be seen in the other
        if isinstance(out, Tensor):
            if isinstance(x, Dual) and not (out.is_floating_point() or out.is_complex()):
                raise NoRule(f"{function.__name__} to {out.dtype}")
            moved = carry(out, _again, (x,), again, args, kwargs, None)
            return _mark_view(moved) if view else moved
        return tuple(_mark_view(carry(p, _again, (x,), again, args, kwargs, i)) for i, p in enumerate(out))

    return apply


def _mark_view(x: Array) -> Array:
    if isinstance(x, Dual):
        x.is_view = True
    return x


for _name in f"{VIEWS} {COPIES}".split():
    _method = getattr(Tensor, _name)
    _map = torch.unflatten if _name == "unflatten" else _method  # this one method does not compile
    rule(*(f for f in (_method, getattr(torch, _name, None)) if callable(f)))(_linear_map(_map))
for _function in (*RESAMPLE, *COMPLEX):
    rule(_function)(_linear_map(_function))


@rule(F.pad)
def pad(x: Dual, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Array:
    """Whatever the border is filled with, it does not move."""
    return carry(F.pad(x.p, pad, mode, value), F.pad, (x,), tuple(pad), mode)


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


@rule("pad_sequence")
def pad_sequence(
    sequences: Iterable[Array], batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Array:
    """As stack; whatever the rest is filled with, it does not move."""
    rows = tuple(sequences)
    ps = [primal(x) for x in rows]
    out = torch.nn.utils.rnn.pad_sequence(ps, batch_first, padding_value, padding_side)
    return carry(out, _pad_sequence, rows, [p.shape for p in ps], batch_first, padding_side)


def _pad_sequence(*rest: Any) -> Tensor:
    *moved, shapes, batch_first, side = rest
    like = next(d for d in moved if d is not None)
    rows = [like.new_zeros(s) if d is None else d for d, s in zip(moved, shapes, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first, 0.0, side)


@rule(Tensor.__setitem__)
def assign(x: Any, place: Any, value: Any) -> None:
    """`x[place] = value`, by a copy that takes the place of x's primal: rules may have kept the old one for later.

    So each assignment costs a copy of x, and a view taken of x before does not see it. Raises NoRule where x is a view,
    whose base would not see it, or a tensor that cannot move.
    """
    if not isinstance(x, Dual):
        if tangent(value) is not None:
            raise NoRule("Tensor.__setitem__ of what moves to what does not")
        x[place] = primal(value)
        return
    if x.is_view:
        raise NoRule("Tensor.__setitem__ of a view")
    p = x.p.clone()
    p[place] = primal(value)
    moved = carry(p, _assign, (x, value), place, p.shape)
    x.p, x.t, x.recorded = p, tangent(moved), isinstance(moved, Dual) and moved.recorded


def _assign(dx: Tensor | None, dy: Tensor | None, place: Any, shape: Sequence[int]) -> Tensor:
    out = cast(Tensor, dy).new_zeros(shape) if dx is None else dx.clone()
    out[place] = 0.0 if dy is None else dy
    return out


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
    return carry(x.p.masked_fill(mask, value), torch.masked_fill, (x,), mask, 0.0)


@rule(torch.clamp, torch.clip, Tensor.clamp, Tensor.clip)
def clamp(x: Any, min: Any = None, max: Any = None) -> Array:
    """It moves where it is between the bounds, numbers or tensors at rest; bounds that move as `differentiate`."""
    if isinstance(min, Dual) or isinstance(max, Dual) or not isinstance(x, Dual):
        return differentiate(torch.clamp, x, min, max)
    inside = torch.ones_like(x.p, dtype=torch.bool)
    if min is not None:
        inside = inside & (x.p >= min)
    if max is not None:
        inside = inside & (x.p <= max)
    return carry(torch.clamp(x.p, min, max), _inside, (x,), inside)


def _inside(dx: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, dx, 0.0)


# Comparisons, and constants like another tensor: of primals. The outcome is constant almost everywhere: no tangent.


def _compare(function: Callable[..., Tensor]) -> Rule:
    def apply(a: Any, other: Any) -> Tensor:
        return function(primal(a), primal(other))

    return apply


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _functions = [getattr(torch, _name), getattr(Tensor, _name), getattr(Tensor, f"__{_name}__")]
    rule(*_functions)(_compare(getattr(torch, _name)))


def _of_primal(function: Callable[..., Any]) -> Rule:
    def apply(x: Dual, *args: Any, **kwargs: Any) -> Any:
        return function(x.p, *args, **kwargs)

    return apply


def _constant(function: Callable[..., Tensor]) -> Rule:
    """A Dual at rest: what moves may be assigned to it."""

    def apply(x: Dual, *args: Any, **kwargs: Any) -> Any:
        out = function(x.p, *args, **kwargs)
        return pair(out, None) if out.is_floating_point() or out.is_complex() else out

    return apply


for _name in ("zeros", "ones", "full", "empty"):
    for _function in (getattr(torch, f"{_name}_like"), getattr(Tensor, f"new_{_name}")):
        rule(_function)(_constant(_function))
rule(Tensor.new_tensor)(_of_primal(Tensor.new_tensor))
rule(Tensor.is_contiguous)(_of_primal(Tensor.is_contiguous))
