"""Passes of a network that return its heads and their derivatives, for the slopes of `dumo.flow.slope`.

A linearization is `(heads, along)`: the heads of one training pass, and a function `along(w)` that returns the
derivative of each head along dx/dt = w:

    linearize_deferred  `along` computes the derivatives once, from tensors saved by the pass
    linearize_fused     the pass computes the derivatives along a w given in advance; `along` returns them
    linearize_separate  `along` makes extra passes

The first two pass Duals (`dumo.autodiff.dual`) to the network, and the tangents of the heads are the derivatives.

Autograd records the heads but not the derivatives, which losses use as regression targets: tangents are not recorded by
default, `ref` runs without gradients, and w is detached.

`heads_and_end_derivatives` differentiates with respect to r, the end of a jump, for losses that contain the derivative.
Autograd records it unless `recorded` is False. `tangent_or_zeros` returns the tangent of a head of any dual pass.

If only some rows need a derivative (`Moving`), dual passes are made of these rows only, and the derivatives of the
remaining rows are zero. `split_rows` and `merge_rows` split a batch accordingly.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from dumo.autodiff import dual, tape
from dumo.autodiff import rule as rule  # registers the rules of torch's operations for Duals
from dumo.autodiff.dual import accept_duals, pair, primal
from dumo.autodiff.fallback import without_slope_advice
from dumo.autodiff.tape import DeferredTangent
from dumo.flow import dropout
from dumo.types import Array, Cond, Frozen, Heads, Net, NoisyBatch, Sample, Time, unwrap
from dumo.types.batch_rows import index, split_by_moving

# w (b, ...) -> the derivative of each head along w
Along = Callable[[Sample], Heads]
# The rows that need a derivative, (b,). It is not a tensor, so that shapes are static.
Moving = Sequence[bool]

_RowIndex = Int[Tensor, " k"] | slice
_ALL_ROWS = slice(None)


@runtime_checkable
class Derivatives(Protocol):
    """Compute the derivatives of ref's heads along w in separate passes, as `BaseSlope.derivatives`."""

    def __call__(self, ref: Frozen, x: Sample, c: Cond, w: Sample, /, *, t: Time, **inputs: Time) -> Heads: ...


# ---------------------------------------------------------------------------------------------------- linearizations


def linearize_deferred(
    derivatives: Derivatives, net: Net, ref: Frozen, x: Sample, c: Cond, *, t: Time, **inputs: Time
) -> tuple[Heads, Along]:
    """Make one pass of net with deferred tangents; `along` sets the input tangents and evaluates them.

    ref must have the weights of net. `along` raises RuntimeError if it is called again. If sharded weights have been
    freed by then, it warns and calls `derivatives`.
    """
    dx = DeferredTangent(x.shape, x.dtype)
    dt = DeferredTangent(t.shape, t.dtype)
    dual_heads = net(pair(x, dx), c, t=pair(t, dt), **inputs)
    tangents = [dual.tangent(head) for head in dual_heads]
    outputs = [tangent for tangent in tangents if isinstance(tangent, DeferredTangent)]

    def along(w: Sample) -> Heads:
        if dx.value is not None:
            raise RuntimeError("along(w) was called twice: call it once, for all heads")
        dx.value = w.detach()
        dt.value = torch.ones_like(t)
        if not (torch.compiler.is_compiling() or tape.is_complete(outputs)):
            warnings.warn(
                "du/dt needs a separate pass, a fifth of a step, because sharded weights are freed after the forward "
                "pass: set fully_shard(..., reshard_after_forward=False), or train.reshard=false in dumo train",
                stacklevel=3,
            )
            return derivatives(ref, x, c, w, t=t, **inputs)
        evaluate = tape.compiled_evaluate() if getattr(ref.module, "compile_tangents", False) else tape.evaluate
        evaluate(outputs)
        return tuple(tangent_or_zeros(head) for head in dual_heads)

    return tuple(primal(head) for head in dual_heads), along


def linearize_fused(
    net: Net,
    x: Sample,
    c: Cond,
    *,
    direction: Sample,
    moving: Moving | None,
    resting: Heads | None = None,
    t: Time,
    **inputs: Time,
) -> tuple[Heads, Along]:
    """Make one pass of net with tangents along `direction`. Rows that are not `moving` get a second, plain pass.

    resting: the heads of the second pass, if it has been made already.

    `along` raises ValueError for any w other than `direction`.
    """

    def moving_pass(rows: _RowIndex) -> Heads:
        return dual_pass(net, x[rows], c[rows], direction[rows], t=t[rows], **_rows_of_each(inputs, rows))

    def resting_pass(rows: _RowIndex) -> Heads:
        if resting is not None:
            return resting
        return net(x[rows], c[rows], t=t[rows], **_rows_of_each(inputs, rows))

    heads, derivatives = _heads_and_derivatives(moving_pass, resting_pass, moving, x)

    def along(w: Sample) -> Heads:
        if w is not direction:
            raise ValueError("along(w): w must be the tensor that was passed as `direction`")
        return derivatives

    return heads, along


def linearize_separate(
    derivatives: Derivatives,
    net: Net,
    ref: Frozen,
    x: Sample,
    c: Cond,
    *,
    moving: Moving | None,
    resting: Heads | None = None,
    t: Time,
    **inputs: Time,
) -> tuple[Heads, Along]:
    """Make one plain pass of net; `along` calls `derivatives` on the `moving` rows, if there are any.

    resting: the heads of the rows that are not `moving`, if their pass has been made already.

    `along` may be called for several directions.
    """
    moving_rows, resting_rows = split_rows(moving, len(x))
    if resting is None:
        heads = net(x, c, t=t, **inputs)
    elif not moving_rows:
        heads = resting
    else:
        k = index(moving_rows, x.device)
        with dropout.rows(k):
            moving_heads = net(x[k], c[k], t=t[k], **_rows_of_each(inputs, k))
        head_pairs = zip(moving_heads, resting, strict=True)
        heads = tuple(merge_rows(a, b, moving_rows, resting_rows) for a, b in head_pairs)

    # w may require gradients, and a central difference computes with it.
    @torch.no_grad()
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
    """Return the heads, as Duals, of a pass with tangents w for x and 1 for t, which autograd does not record."""
    return net(pair(x, w.detach()), c, t=pair(t, torch.ones_like(t)), **inputs)


def heads_and_end_derivatives(
    net: Net, x: Sample, c: Cond, *, r: Time, moving: Moving | None = None, recorded: bool = True, **inputs: Time
) -> tuple[Heads, Heads]:
    """Return the network's heads and their derivatives with respect to r, the end of a jump, both with gradients.

    moving: the rows that need a derivative, which get a separate pass; None means all. The derivatives of the remaining
        rows are zero.
    recorded: whether the derivatives have gradients, as the heads always do.

    This is a dual pass in reverse mode. Layers that depend on r cost twice as much, and so does the backward pass if
    derivatives are recorded. `torch.func.jvp` in reverse mode is silently wrong through `F.layer_norm` (torch 2.13,
    pytorch #196700), and fused attention kernels differentiate only once.
    """
    accept_duals()

    def moving_pass(rows: _RowIndex) -> Heads:
        r_moving = r[rows]
        dual_r = pair(r_moving, torch.ones_like(r_moving), recorded=recorded)
        return net(x[rows], c[rows], r=dual_r, **_rows_of_each(inputs, rows))

    def resting_pass(rows: _RowIndex) -> Heads:
        return net(x[rows], c[rows], r=r[rows], **_rows_of_each(inputs, rows))

    with without_slope_advice():
        return _heads_and_derivatives(moving_pass, resting_pass, moving, x)


def _heads_and_derivatives(
    moving_pass: Callable[[_RowIndex], Heads],
    resting_pass: Callable[[_RowIndex], Heads],
    moving: Moving | None,
    x: Sample,
) -> tuple[Heads, Heads]:
    """Return the heads of all rows of x, and their derivatives, which are zero on the rows that are not `moving`.

    moving_pass: makes a dual pass of some rows and returns Duals.
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
    """Return the tangent of a head of a dual pass; zeros if the head does not depend on the inputs with tangents."""
    tangent = dual.tangent(head)
    if isinstance(tangent, DeferredTangent):
        tangent = tangent.value
    if tangent is None:
        return torch.zeros_like(primal(head))
    return tangent


# -------------------------------------------------------------------------------------------------------------- rows


def rows_at_rest(net: Net, ref: Frozen, b: NoisyBatch) -> Int[Tensor, " k"] | None:
    """Return the indices of the rows with r = t, if the training pass of these rows can also be used as V(c).

    At r = t a mean velocity is the velocity, and dropout masks depend on the row. Return None if theta^- has other
    weights, or if no row has r = t by its position.
    """
    if ref.module is not unwrap(net) or b.moving is None or all(b.moving):
        return None
    return index(split_by_moving(b.moving)[1], b.t.device)


def heads_at_rest(net: Net, ref: Frozen, b: NoisyBatch, **inputs: Time) -> Heads | None:
    """Make the training pass of the rows with r = t if it can also be used as V(c) (`rows_at_rest`), or return None."""
    i = rows_at_rest(net, ref, b)
    if i is None:
        return None
    with dropout.rows(i):
        return net(b.x_t[i], b.c[i], t=b.t[i], r=b.r[i], **_rows_of_each(inputs, i))


def split_rows(moving: Moving | None, n: int) -> tuple[list[int], list[int]]:
    """Return the indices of the rows that are `moving`, and of the rest, in order. None means all n rows."""
    return split_by_moving([True] * n if moving is None else moving)


def merge_rows(
    moving_values: Tensor, resting_values: Tensor, moving_rows: list[int], resting_rows: list[int]
) -> Tensor:
    """Merge the values of rows that `split_rows` has split, in their order and in the dtype of `moving_values`."""
    source = [0] * (len(moving_rows) + len(resting_rows))
    for place, row in enumerate([*moving_rows, *resting_rows]):
        source[row] = place
    joined = torch.cat([moving_values, resting_values.to(moving_values.dtype)])
    return joined[index(source, moving_values.device)]


def _rows_of_each(inputs: Mapping[str, Tensor], rows: _RowIndex) -> dict[str, Tensor]:
    """Return some rows of each input."""
    return {name: values[rows] for name, values in inputs.items()}
