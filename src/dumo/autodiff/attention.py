"""Softmax attention and its tangent.

With the scores S = s q k^T, the weights P = softmax S over the keys, and O = P v, the tangents dq, dk, dv give

    dS = s (dq k^T + q dk^T)
    dP = P * (dS - rowsum(P * dS)),                  the derivative of a softmax
    dO = dP v + P dv = H v + P dv - m O,             H = P * dS,  m = rowsum H,

since rowsum(P * dS) is one number per query, and P v is O, which any fused kernel has computed for the primal.

The rule of attention (`dumo.autodiff.rule.layer`) calls `attend` for O, and one of two functions for dO:

- `tangent` records no gradients. It uses a Triton kernel (`dumo.autodiff.kernel`) on a GPU if there is no mask.
  Otherwise it processes chunks of queries, so memory grows linearly with the number of tokens.
- `recorded_tangent` records gradients, for losses that contain the derivative, and keeps all scores in memory.

A mask is a constant part of S; a query that attends to no key has P = 0, as in torch. Scores are fp32 also for 16-bit
inputs, because their error grows with the logits (in bf16 2.9 % of dO at a standard deviation of 10, measured). The
derivation is our own.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from math import inf

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dumo.autodiff.cast import has_autocast

aten = torch.ops.aten
# SDPBackend.FLASH_ATTENTION, as `_fused_sdp_choice` returns it.
FLASH = 1
_HALF_DTYPES = (torch.float16, torch.bfloat16)
# 64 to 512 take the same time within a fifth, measured on a CPU.
_QUERIES_PER_CHUNK = 256
_HAS_TRITON = find_spec("triton") is not None and torch.version.cuda is not None
# The largest head whose rows fit into shared memory in the Triton kernel.
_MAX_HEAD_SIZE = 256
# The major compute capability from which tensor cores support bf16.
_MIN_CAPABILITY = 8

# Queries, keys and values broadcast over the batch. Keys and values may have fewer heads than queries.
Queries = Float[Tensor, "*q n d"]
Keys = Float[Tensor, "*g m d"]
Values = Float[Tensor, "*g m e"]
Output = Float[Tensor, "*b n e"]
LogSum = Float[Tensor, "*b n"]
# Broadcasts to (*b, n, m): True if a query attends to a key, or a term added to the score.
Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
    grouped: bool = False,
) -> tuple[Output, LogSum | None]:
    """Return O, bit-identical to `F.scaled_dot_product_attention`, and the log-sum-exp of the scores or None.

    Only CUDA flash attention without a mask returns the log-sum-exp; torch.compile chooses the kernel later, and cuDNN
    does not return it. `grouped`: several query heads share a key head.
    """
    sees_all_keys = mask is None and not causal
    if q.is_cuda and sees_all_keys and not grouped and not torch.compiler.is_compiling():
        # Autocast does not apply to the aten operators below.
        if torch.is_autocast_enabled("cuda") and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        # torch would pad such heads for flash attention.
        has_padding = q.shape[-1] % 8 != 0
        same_batch = q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        if same_batch and not has_padding and aten._fused_sdp_choice(q, k, v, scale=scale) == FLASH:
            o, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
            return o, lse
    o = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
    return o, None


@torch.no_grad()
def tangent(
    q: Queries,
    k: Keys,
    v: Values,
    dq: Queries | None,
    dk: Keys | None,
    dv: Values | None,
    o: Output,
    lse: LogSum | None,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
) -> Output:
    """Compute dO without gradients, in the dtype and layout of o, for `o, lse = attend(q, k, v, scale, mask, causal)`.

    If dq, dk or dv is None, that tangent is zero.
    """
    if dq is None and dk is None and dv is None:
        return torch.zeros_like(o)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with _without_autocast(o.device.type):
        q = _for_each_output(q, o, o.dtype)
        k = _for_each_output(k, o, o.dtype)
        v = _for_each_output(v, o, o.dtype)
        dq = dq if dq is None else _for_each_output(dq, o, o.dtype)
        dk = dk if dk is None else _for_each_output(dk, o, o.dtype)
        dv = dv if dv is None else _for_each_output(dv, o, o.dtype)
        if mask is None and not causal and _has_kernel(q, v):
            from dumo.autodiff.kernel import attention_tangent

            return attention_tangent(q, k, v, dq, dk, dv, o, lse, factor)
        return _tangent_by_chunks(q, k, v, dq, dk, dv, o, factor, mask, causal)


def recorded_tangent(
    q: Queries,
    k: Keys,
    v: Values,
    dq: Queries | None,
    dk: Keys | None,
    dv: Values | None,
    o: Output,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
) -> Output:
    """Compute dO with gradients, in the dtype of o, for `o, _ = attend(q, k, v, scale, mask, causal)`.

    If dq, dk or dv is None, that tangent is zero. All scores are kept in memory.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.promote_types(o.dtype, torch.float32)
    with _without_autocast(o.device.type):
        q = _for_each_output(q, o, exact)
        k = _for_each_output(k, o, exact)
        v = _for_each_output(v, o, exact)
        exact_o = o.to(exact)
        p = _weights(factor * q @ k.mT, _visible_keys(mask, causal, slice(None), o, k))
        out = torch.zeros_like(exact_o) if dv is None else p @ _for_each_output(dv, o, exact)
        # The terms of dS / scale.
        score_tangents: list[Tensor] = []
        if dq is not None:
            score_tangents.append(_for_each_output(dq, o, exact) @ k.mT)
        if dk is not None:
            score_tangents.append(q @ _for_each_output(dk, o, exact).mT)
        for ds in score_tangents:
            h = factor * p * ds
            out = out + h @ v - h.sum(-1, keepdim=True) * exact_o
        return out.to(o.dtype)


def _tangent_by_chunks(
    q: Queries, k: Keys, v: Values, dq: Queries | None, dk: Keys | None, dv: Values | None, o: Output, scale: float,
    mask: Mask | None, causal: bool,
) -> Output:  # fmt: skip
    """Compute dO, _QUERIES_PER_CHUNK rows at a time."""
    # Only CUDA accumulates products of 16-bit matrices in fp32.
    work_dtype = o.dtype if o.is_cuda else torch.promote_types(o.dtype, torch.float32)

    def flat(x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[-2:]).to(work_dtype)

    out = torch.empty_like(o)
    q = flat(q)
    k = flat(k)
    v = flat(v)
    dq = dq if dq is None else flat(dq)
    dk = dk if dk is None else flat(dk)
    dv = dv if dv is None else flat(dv)
    for first in range(0, o.shape[-2], _QUERIES_PER_CHUNK):
        rows = slice(first, first + _QUERIES_PER_CHUNK)
        o_rows = o[..., rows, :]
        dq_rows = None if dq is None else dq[:, rows]
        visible = _visible_keys(mask, causal, rows, o, k)
        # In one statement, because a variable would keep the result in memory while the next chunk is computed.
        out[..., rows, :] = _tangent_of_chunk(q[:, rows], k, v, dq_rows, dk, dv, flat(o_rows), scale, visible).view(
            o_rows.shape
        )
    return out


def _tangent_of_chunk(
    q: Queries, k: Keys, v: Values, dq: Queries | None, dk: Keys | None, dv: Values | None, o: Output, scale: float,
    visible: Mask | None,
) -> Output:  # fmt: skip
    """Compute dO = H v + P dv - m O for some queries."""
    p = _weights(_sum_of_products([(q, k.mT)], scale), visible)
    output_terms: list[tuple[Tensor, Tensor]] = []
    if dv is not None:
        output_terms.append((p.to(v.dtype), dv))
    score_terms: list[tuple[Tensor, Tensor]] = []
    if dq is not None:
        score_terms.append((dq, k.mT))
    if dk is not None:
        score_terms.append((q, dk.mT))
    if not score_terms:
        return _sum_of_products(output_terms)
    h = _sum_of_products(score_terms, scale).mul_(p)
    return _sum_of_products([*output_terms, (h.to(v.dtype), v)]) - h.sum(-1, keepdim=True) * o


def _for_each_output(x: Tensor, o: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert queries, keys or values to a dtype, and expand them to the batch and the heads of the output o.

    Key and value heads that several query heads share are repeated.
    """
    x = x.to(dtype)
    batch = o.shape[:-2]
    if x.shape[:-2] == batch:
        return x
    if x.ndim > 2 and x.shape[-3] not in (1, batch[-1]):
        x = x.repeat_interleave(batch[-1] // x.shape[-3], -3)
    return x.expand(*batch, -1, -1)


def _visible_keys(mask: Mask | None, causal: bool, rows: slice, o: Tensor, k: Tensor) -> Mask | None:
    """Return the mask of some queries, (*b, rows, m), or None. If causal, query i attends to the keys up to i."""
    n = o.shape[-2]
    m = k.shape[-2]
    if causal:
        first = rows.start or 0
        # torch 2.11 cannot trace `slice.indices`.
        last = n if rows.stop is None else min(rows.stop, n)
        mask = torch.ones(last - first, m, dtype=torch.bool, device=o.device).tril(first)
        return mask.expand(*o.shape[:-2], -1, -1)
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        mask = mask.to(o.dtype)
    return mask.expand(*o.shape[:-1], m)[..., rows, :]


def _weights(scores: Tensor, visible: Mask | None) -> Tensor:
    """Return the softmax of the scores; zeros for a query that attends to no key."""
    if visible is None:
        return scores.softmax(-1)
    masked = scores.view(visible.shape)
    masked = torch.where(visible, masked, -inf) if visible.dtype == torch.bool else masked + visible
    return aten._safe_softmax(masked, -1).view(scores.shape)


def _sum_of_products(pairs: Sequence[tuple[Tensor, Tensor]], scale: float = 1.0) -> Tensor:
    """Sum scale a b over pairs (a, b) of batched matrices, in fp32 for 16-bit matrices."""
    total = pairs[0][0].new_zeros(())
    for i, (a, b) in enumerate(pairs):
        if a.dtype in _HALF_DTYPES:
            product = torch.bmm(a, b, out_dtype=torch.float32).mul_(scale)
            total = total.add_(product) if i else product
        elif i == 0:
            # With beta = 0, the total is not read.
            total = torch.baddbmm(total, a, b, beta=0, alpha=scale)
        else:
            # FLOP counters do not support `baddbmm_`.
            torch.baddbmm(total, a, b, alpha=scale, out=total)
    return total


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernel supports queries (b, h, n, d) and values (b, h, m, e)."""
    if not _HAS_TRITON or not q.is_cuda or q.ndim != 4 or q.dtype not in _HALF_DTYPES:
        return False
    if max(q.shape[-1], v.shape[-1]) > _MAX_HEAD_SIZE:
        return False
    return torch.cuda.get_device_properties(q.device).major >= _MIN_CAPABILITY


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast."""
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
