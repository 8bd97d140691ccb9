"""Softmax attention and its tangent: how the output O moves when q, k and v move by dq, dk and dv.

With the scores S = s q k^T, the weights P = softmax S over the keys, and O = P v,

    dS = s (dq k^T + q dk^T)
    dP = P * (dS - rowsum(P * dS)),                  the derivative of a softmax
    dO = dP v + P dv = H v + P dv - m O,             H = P * dS,  m = rowsum H,

for rowsum(P * dS) is one number per query, and P v is O, which the primal has computed: by any fused kernel.

The rule of attention (`dumo.autodiff.rule.layer`) calls `attend` for O, and then one of two for dO:

- `tangent`, without gradients. It takes one Triton kernel (`dumo.autodiff.kernel`) on a GPU where nothing is masked.
  Else it goes by chunks of queries, so memory grows linearly with the tokens.
- `recorded_tangent`, with gradients and all scores in memory, where a loss holds the derivative itself.

A mask is a part of S that rests; a query that sees no key has P = 0, as torch has it. Scores are fp32 even for halves,
for their error grows with the logits (in bf16 2.9 % of dO at a standard deviation of 10, measured). All of this is
ours.
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
FLASH = 1  # SDPBackend.FLASH_ATTENTION, as the operator that chooses gives it
_HALF_DTYPES = (torch.float16, torch.bfloat16)
_QUERIES_PER_CHUNK = 256  # ours; 64 to 512 take the same time within a fifth, measured on a CPU
_HAS_TRITON = find_spec("triton") is not None and torch.version.cuda is not None
_MAX_HEAD_SIZE = 256  # of the Triton kernel: rows fit into shared memory
_MIN_CAPABILITY = 8  # major compute capability of GPUs whose tensor cores take bf16

Queries = Float[Tensor, "*q n d"]  # of the batch *b, or one for all of it; keys and values, too
Keys = Float[Tensor, "*g m d"]  # as many heads as the queries, or fewer: one for several
Values = Float[Tensor, "*g m e"]
Mixed = Float[Tensor, "*b n e"]
LogSum = Float[Tensor, "*b n"]
# Expands to (*b, n, m): True where a query sees a key, or what is added to its score.
Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
    grouped: bool = False,
) -> tuple[Mixed, LogSum | None]:
    """O, equal to `F.scaled_dot_product_attention` to the bit, and the log-sum-exp of the scores or None.

    Only flash attention on CUDA gives the log-sum-exp, where all queries see all keys. A compiler chooses the kernel
    later, and cuDNN's keeps it to itself. `grouped`: several heads of queries share a head of keys.
    """
    sees_all_keys = mask is None and not causal
    if q.is_cuda and sees_all_keys and not grouped and not torch.compiler.is_compiling():
        # flash attention below is called without autocast's help
        if torch.is_autocast_enabled("cuda") and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        has_padding = q.shape[-1] % 8 != 0  # torch pads such heads for flash attention
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
    o: Mixed,
    lse: LogSum | None,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
) -> Mixed:
    """dO, in o's dtype and layout, without gradients, for `o, lse = attend(q, k, v, scale, mask, causal)`.

    A tangent dq, dk or dv that is None is zero.
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
    o: Mixed,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
) -> Mixed:
    """dO, in o's dtype, with gradients: by the formula as it is, for no kernel has them. All scores are in memory.

    A tangent dq, dk or dv that is None is zero. `o` is the output of `attend(q, k, v, scale, mask, causal)`.
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
        score_tangents: list[Tensor] = []  # without their factor, the scale
        if dq is not None:
            score_tangents.append(_for_each_output(dq, o, exact) @ k.mT)
        if dk is not None:
            score_tangents.append(q @ _for_each_output(dk, o, exact).mT)
        for ds in score_tangents:
            h = factor * p * ds
            out = out + h @ v - h.sum(-1, keepdim=True) * exact_o
        return out.to(o.dtype)


def _tangent_by_chunks(
    q: Queries, k: Keys, v: Values, dq: Queries | None, dk: Keys | None, dv: Values | None, o: Mixed, scale: float,
    mask: Mask | None, causal: bool,
) -> Mixed:  # fmt: skip
    """dO, _QUERIES_PER_CHUNK rows at a time."""
    work_dtype = o.dtype if o.is_cuda else torch.promote_types(o.dtype, torch.float32)  # only CUDA sums halves in fp32

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
        # in one statement: a name for the result would keep it in memory while the next is computed
        out[..., rows, :] = _tangent_of_chunk(q[:, rows], k, v, dq_rows, dk, dv, flat(o_rows), scale, visible).view(
            o_rows.shape
        )
    return out


def _tangent_of_chunk(
    q: Queries, k: Keys, v: Values, dq: Queries | None, dk: Keys | None, dv: Values | None, o: Mixed, scale: float,
    visible: Mask | None,
) -> Mixed:  # fmt: skip
    """dO = H v + P dv - m O of some queries."""
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
    """Queries, keys or values in this dtype, with the batch and the heads of the output o.

    A head that several heads of queries share is repeated; what is given once for a batch is expanded.
    """
    x = x.to(dtype)
    batch = o.shape[:-2]
    if x.shape[:-2] == batch:
        return x
    if x.ndim > 2 and x.shape[-3] not in (1, batch[-1]):
        x = x.repeat_interleave(batch[-1] // x.shape[-3], -3)
    return x.expand(*batch, -1, -1)


def _visible_keys(mask: Mask | None, causal: bool, rows: slice, o: Tensor, k: Tensor) -> Mask | None:
    """The mask of some queries, (*b, rows, m); None: they see all keys. A causal one shows query i the keys up to i."""
    n = o.shape[-2]
    m = k.shape[-2]
    if causal:
        first = rows.start or 0
        last = n if rows.stop is None else min(rows.stop, n)  # torch 2.11 cannot trace `slice.indices`
        mask = torch.ones(last - first, m, dtype=torch.bool, device=o.device).tril(first)
        return mask.expand(*o.shape[:-2], -1, -1)
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        mask = mask.to(o.dtype)  # as autocast does
    return mask.expand(*o.shape[:-1], m)[..., rows, :]


def _weights(scores: Tensor, visible: Mask | None) -> Tensor:
    """The softmax of the scores; zero for a query that sees no key."""
    if visible is None:
        return scores.softmax(-1)
    masked = scores.view(visible.shape)
    masked = torch.where(visible, masked, -inf) if visible.dtype == torch.bool else masked + visible
    return aten._safe_softmax(masked, -1).view(scores.shape)


def _sum_of_products(pairs: Sequence[tuple[Tensor, Tensor]], scale: float = 1.0) -> Tensor:
    """The sum of scale a b over pairs (a, b) of batched matrices, in fp32 where they are halves."""
    total = pairs[0][0].new_zeros(())
    for i, (a, b) in enumerate(pairs):
        if a.dtype in _HALF_DTYPES:
            product = torch.bmm(a, b, out_dtype=torch.float32).mul_(scale)
            total = total.add_(product) if i else product
        elif i == 0:
            total = torch.baddbmm(total, a, b, beta=0, alpha=scale)  # beta = 0: the total is not read
        else:
            torch.baddbmm(total, a, b, alpha=scale, out=total)  # counters of operations do not know baddbmm_
    return total


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernel takes queries (b, h, n, d) and values (b, h, m, e): halves, on a GPU that is able."""
    if not _HAS_TRITON or not q.is_cuda or q.ndim != 4 or q.dtype not in _HALF_DTYPES:
        return False
    if max(q.shape[-1], v.shape[-1]) > _MAX_HEAD_SIZE:
        return False
    return torch.cuda.get_device_properties(q.device).major >= _MIN_CAPABILITY


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which operations keep the dtypes of their operands."""
    if has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
