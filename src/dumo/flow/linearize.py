"""Passes of a net that give its heads and their derivatives, for the slopes of `dumo.flow.slope`.

A linearization is `(heads, along)`: the heads of one training pass, and a function `along(w)` that returns the
derivative of each head as x moves with velocity w and t with velocity 1. There are three ways to make it:

    linearize_by_tape    the pass keeps what the derivatives need; `along` computes them from that, once
    linearize_by_ride    w is known before the pass, which computes the derivatives on its way; `along` returns them
    linearize_by_passes  a plain pass; `along` makes passes of its own

In the first two the net's inputs are Duals (`dumo.autodiff.dual`), and a derivative is the tangent of a head.

What autograd records: the heads, always. The derivatives of a linearization, never, since losses regress on them: the
tangents of a Dual are unrecorded by default, `ref` runs without gradients, and w is detached. This holds for a ride,
too, although its pass is that of the net in training.

`heads_and_end_derivatives` differentiates in r, the end of a jump. It is for losses that hold a derivative themselves,
so autograd records that, unless `recorded` is False. `tangent_or_zeros` reads a derivative off a head of any dual pass.

Where the derivative is wanted of some rows only (`Moving`), dual inputs and passes are of these rows, and the others
get zeros. `split_rows` and `merge_rows` take a batch apart and put it together.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from dumo.autodiff import dual, tape
from dumo.autodiff import rule as rule  # its import registers the rules of torch's operations for Duals
from dumo.autodiff.dual import pair, primal, teach_others
from dumo.autodiff.general import whatever_the_slope
from dumo.autodiff.tape import Later
from dumo.flow import dropout
from dumo.types import Array, Cond, Frozen, Heads, Net, Sample, Time
from dumo.types.batch_rows import index, split_by_moving

Along = Callable[[Sample], Heads]  # w (b, ...) -> the derivative of each head along w
Moving = Sequence[bool]  # (b,), the rows whose derivative is wanted: no tensor, so that shapes are static

_RowIndex = Int[Tensor, " k"] | slice  # of some rows of a batch
_ALL_ROWS = slice(None)


@runtime_checkable
class Derivatives(Protocol):
    """The derivatives of ref's heads along w by passes of their own, as `BaseSlope.derivatives` gives them."""

    def __call__(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads: ...


# ---------------------------------------------------------------------------------------------------- linearizations


def linearize_by_tape(
    derivatives: Derivatives, net: Net, ref: Frozen, x: Sample, c: Cond, *, t: Time, **inputs: Time
) -> tuple[Heads, Along]:
    """One pass of net whose inputs move in a direction that is set later; `along` sets it, and plays the tape.

    Needs that ref has the weights of net. `along` raises RuntimeError when it is called again. Where sharded weights
    are gone by then, it warns and calls `derivatives`.
    """
    dx = Later(x.shape, x.dtype)
    dt = Later(t.shape, t.dtype)
    dual_heads = net(pair(x, dx), c, t=pair(t, dt), **inputs)
    tangents = [dual.tangent(head) for head in dual_heads]
    ends = [tangent for tangent in tangents if isinstance(tangent, Later)]

    def along(w: Sample) -> Heads:
        if dx.value is not None:
            raise RuntimeError("along was called twice: a tape plays once, for all heads")
        dx.value = w.detach()
        dt.value = torch.ones_like(t)
        if not (torch.compiler.is_compiling() or tape.is_complete(ends)):
            warnings.warn(
                "du/dt takes a pass of its own, so a step is a fifth longer: sharded weights are given back after it. "
                "Keep them: fully_shard(..., reshard_after_forward=False), in dumo train train.reshard=false",
                stacklevel=3,
            )
            return derivatives(ref, x, c, w, t=t, **inputs)
        play = tape.compiled_play() if getattr(ref.module, "compile_tangents", False) else tape.play
        play(ends)
        return tuple(tangent_or_zeros(head) for head in dual_heads)

    return tuple(primal(head) for head in dual_heads), along


def linearize_by_ride(
    net: Net, x: Sample, c: Cond, *, toward: Sample, moving: Moving | None, t: Time, **inputs: Time
) -> tuple[Heads, Along]:
    """One pass of net whose inputs move along `toward`; where only some rows move, a second pass for the others.

    `along` raises ValueError for any direction but `toward`.
    """

    def moving_pass(rows: _RowIndex) -> Heads:
        return dual_pass(net, x[rows], c[rows], toward[rows], t=t[rows], **_rows_of_each(inputs, rows))

    def resting_pass(rows: _RowIndex) -> Heads:
        return net(x[rows], c[rows], t=t[rows], **_rows_of_each(inputs, rows))

    heads, derivatives = _heads_and_derivatives(moving_pass, resting_pass, moving, x)

    def along(w: Sample) -> Heads:
        if w is not toward:
            raise ValueError("along(w): w must be the direction that the pass was given as `toward`")
        return derivatives

    return heads, along


def linearize_by_passes(
    derivatives: Derivatives,
    net: Net,
    ref: Frozen,
    x: Sample,
    c: Cond,
    *,
    moving: Moving | None,
    t: Time,
    **inputs: Time,
) -> tuple[Heads, Along]:
    """One plain pass of net; `along` calls `derivatives` on the rows that move, and makes no pass where none does.

    `along` may be called for several directions.
    """
    heads = net(x, c, t=t, **inputs)
    moving_rows, resting_rows = split_rows(moving, len(x))

    @torch.no_grad()  # w may have gradients, and a central difference computes with it
    def along(w: Sample) -> Heads:
        if not resting_rows:
            return derivatives(ref, x, c, w, t=t, **inputs)
        if not moving_rows:
            return tuple(torch.zeros_like(head) for head in heads)
        i = index(moving_rows, x.device)
        j = index(resting_rows, x.device)
        with dropout.rows(i):
            moving_derivatives = derivatives(ref, x[i], c[i], w[i], t=t[i], **_rows_of_each(inputs, i))
        merged: list[Tensor] = []
        for derivative, head in zip(moving_derivatives, heads, strict=True):
            merged.append(merge_rows(derivative, torch.zeros_like(head[j]), moving_rows, resting_rows))
        return tuple(merged)

    return heads, along


# ------------------------------------------------------------------------------------------------------- dual passes


def dual_pass(net: Net, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads:
    """The heads, as Duals, of a pass in which x moves along w and t by 1. Autograd does not record their tangents."""
    return net(pair(x, w.detach()), c, t=pair(t, torch.ones_like(t)), **inputs)


def heads_and_end_derivatives(
    net: Net, x: Sample, c: Cond, *, r: Time, moving: Moving | None = None, recorded: bool = True, **inputs: Time
) -> tuple[Heads, Heads]:
    """The net's heads and their derivatives in r, the end of a jump, both with gradients. x, t and all else rest.

    moving: the rows whose derivative is wanted, which get a pass of their own; None: all. The others get zeros.
    recorded: whether the derivatives have gradients; the heads always have.

    It is a dual pass, with reverse-mode around it: of what r reaches in the net, it costs two passes, and so does its
    backward pass where derivatives are recorded. Not by `torch.func.jvp`: reverse-mode around that is silently wrong
    through `F.layer_norm` (torch 2.13, pytorch #196700), and kernels of fused attention differentiate once.
    """
    teach_others()

    def moving_pass(rows: _RowIndex) -> Heads:
        r_moving = r[rows]
        dual_r = pair(r_moving, torch.ones_like(r_moving), recorded=recorded)
        return net(x[rows], c[rows], r=dual_r, **_rows_of_each(inputs, rows))

    def resting_pass(rows: _RowIndex) -> Heads:
        return net(x[rows], c[rows], r=r[rows], **_rows_of_each(inputs, rows))

    with whatever_the_slope():
        return _heads_and_derivatives(moving_pass, resting_pass, moving, x)


def _heads_and_derivatives(
    moving_pass: Callable[[_RowIndex], Heads],
    resting_pass: Callable[[_RowIndex], Heads],
    moving: Moving | None,
    x: Sample,
) -> tuple[Heads, Heads]:
    """The heads of all rows of x, and their derivatives, which are zero on the rows that rest.

    moving_pass: makes a dual pass of some rows, and returns Duals.
    resting_pass: makes a plain pass of some rows.
    """
    moving_rows, resting_rows = split_rows(moving, len(x))
    if not resting_rows:
        dual_heads = moving_pass(_ALL_ROWS)
        return tuple(primal(head) for head in dual_heads), tuple(tangent_or_zeros(head) for head in dual_heads)
    if not moving_rows:
        plain_heads = resting_pass(_ALL_ROWS)
        return plain_heads, tuple(torch.zeros_like(head) for head in plain_heads)
    i = index(moving_rows, x.device)
    j = index(resting_rows, x.device)
    with dropout.rows(i):
        dual_heads = moving_pass(i)
    with dropout.rows(j):
        plain_heads = resting_pass(j)
    head_pairs = list(zip(dual_heads, plain_heads, strict=True))
    heads = tuple(merge_rows(primal(a), b, moving_rows, resting_rows) for a, b in head_pairs)
    derivatives = tuple(
        merge_rows(tangent_or_zeros(a), torch.zeros_like(b), moving_rows, resting_rows) for a, b in head_pairs
    )
    return heads, derivatives


def tangent_or_zeros(head: Array) -> Tensor:
    """The tangent of a head that a dual pass returned: zeros for one that the moving inputs do not reach."""
    tangent = dual.tangent(head)
    if isinstance(tangent, Later):
        tangent = tangent.value
    if tangent is None:
        return torch.zeros_like(primal(head))
    return tangent


# -------------------------------------------------------------------------------------------------------------- rows


def split_rows(moving: Moving | None, n: int) -> tuple[list[int], list[int]]:
    """The places of the rows that move, and of those that rest, each in order; None: all n move."""
    return split_by_moving([True] * n if moving is None else moving)


def merge_rows(
    moving_values: Tensor, resting_values: Tensor, moving_rows: list[int], resting_rows: list[int]
) -> Tensor:
    """The values of all rows in their order, in the dtype of `moving_values`, where `split_rows` has parted them."""
    source = [0] * (len(moving_rows) + len(resting_rows))  # of each row of the result: its place in `parted`
    for place, row in enumerate([*moving_rows, *resting_rows]):
        source[row] = place
    parted = torch.cat([moving_values, resting_values.to(moving_values.dtype)])
    return parted[index(source, moving_values.device)]


def _rows_of_each(inputs: Mapping[str, Tensor], rows: _RowIndex) -> dict[str, Tensor]:
    """These rows of each input."""
    return {name: values[rows] for name, values in inputs.items()}
