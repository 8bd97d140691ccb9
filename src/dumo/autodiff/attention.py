"""Softmax attention and its tangent: how O moves when q, k and v move by dq, dk and dv.

With the scores S = s q k^T, the weights P = softmax S over the keys, and O = P v,

    dS = s (dq k^T + q dk^T)
    dP = P * (dS - rowsum(P * dS)),                  the derivative of a softmax
    dO = dP v + P dv = H v + P dv - m O,             H = P * dS,  m = rowsum H,

for rowsum(P * dS) is one number per query, and P v is O, which the primal has computed: by any fused kernel.

Queries that see all keys need a plain softmax, so the tangent goes by chunks of them: memory grows linearly with the
tokens. A mask is a part of S that rests; a query that sees no key has P = 0, as torch has it. On a GPU one kernel
(`dumo.autodiff.kernel`) does it without scores in memory where nothing is masked. Scores are fp32 even for halves, for
their error grows with the logits (in bf16 2.9 % of dO at a standard deviation of 10, measured). All of this is ours.
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
HALF = (torch.float16, torch.bfloat16)
CHUNK = 256  # queries at a time (ours; 64 to 512 take the same time within a fifth, measured on a CPU)
TRITON = find_spec("triton") is not None and torch.version.cuda is not None

Queries = Float[Tensor, "*b n d"]
Keys = Float[Tensor, "*g m d"]  # of the queries' heads, or of fewer: one for several queries
Values = Float[Tensor, "*g m e"]
Mixed = Float[Tensor, "*b n e"]
LogSum = Float[Tensor, "*b n"]
Mask = Bool[Tensor, "..."] | Float[Tensor, "..."]  # expands to (*b, n, m): what is seen, or what is added to the scores


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    scale: float | None = None,
    mask: Mask | None = None,
    causal: bool = False,
    grouped: bool = False,
) -> tuple[Mixed, LogSum | None]:
    """`F.scaled_dot_product_attention` to the bit, and the log-sum-exp of the scores where its kernel gives that.

    That is flash attention on CUDA, where all queries see all keys. A compiler chooses the kernel later, and cuDNN's
    keeps it to itself: then None.
    """
    if q.is_cuda and not (mask is not None or causal or grouped or torch.compiler.is_compiling()):
        if torch.is_autocast_enabled("cuda") and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        if q.shape[-1] % 8 == 0 and aten._fused_sdp_choice(q, k, v, scale=scale) == FLASH:  # other sizes are padded
            o, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
            return o, lse
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped), None


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
    """dO for o, lse = attend(q, k, v, scale, mask, causal), in o's type and layout, without gradients. None is zero.

    The kernel of a GPU is for queries that see all keys; with a mask it goes by chunks there, too.
    """
    if dq is None and dk is None and dv is None:
        return torch.zeros_like(o)
    s = q.shape[-1] ** -0.5 if scale is None else scale
    with _as_typed(o.device.type):
        q, k, v = q.to(o.dtype), _each(k, q, o.dtype), _each(v, q, o.dtype)
        dq = dq if dq is None else dq.to(o.dtype)
        dk, dv = (x if x is None else _each(x, q, o.dtype) for x in (dk, dv))
        if mask is None and not causal and _has_kernel(q, v):
            from dumo.autodiff.kernel import attention_tangent

            return attention_tangent(q, k, v, dq, dk, dv, o, lse, s)
        return _by_chunks(q, k, v, dq, dk, dv, o, s, mask, causal)


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
    """As `tangent`, with gradients: of the formula as it stands, all scores in memory, for no kernel has them."""
    s = q.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.promote_types(o.dtype, torch.float32)
    with _as_typed(o.device.type):
        q, k, v, o_ = q.to(exact), _each(k, q, exact), _each(v, q, exact), o.to(exact)
        dq = dq if dq is None else dq.to(exact)
        dk, dv = (x if x is None else _each(x, q, exact) for x in (dk, dv))
        p = _weights(s * q @ k.mT, _seen(mask, causal, slice(None), o, k))
        out = torch.zeros_like(o_) if dv is None else p @ dv
        moved = ([] if dq is None else [dq @ k.mT]) + ([] if dk is None else [q @ dk.mT])
        for ds in moved:
            h = s * p * ds
            out = out + h @ v - h.sum(-1, keepdim=True) * o_
        return out.to(o.dtype)


def _by_chunks(
    q: Queries, k: Keys, v: Values, dq: Queries | None, dk: Keys | None, dv: Values | None, o: Mixed, scale: float,
    mask: Mask | None, causal: bool,
) -> Mixed:  # fmt: skip
    stored = o.dtype if o.is_cuda else torch.promote_types(o.dtype, torch.float32)  # only CUDA sums halves in fp32

    def flat(x: Tensor) -> Tensor:
        return x.reshape(-1, *x.shape[-2:]).to(stored)

    out, q, k, v = torch.empty_like(o), flat(q), flat(k), flat(v)
    dq, dk, dv = (x if x is None else flat(x) for x in (dq, dk, dv))
    for first in range(0, o.shape[-2], CHUNK):
        rows = slice(first, first + CHUNK)
        old, moved = o[..., rows, :], None if dq is None else dq[:, rows]
        seen = _seen(mask, causal, rows, o, k)
        out[..., rows, :] = _chunk(q[:, rows], k, v, moved, dk, dv, flat(old), scale, seen).view(old.shape)
    return out


def _chunk(
    q: Queries, k: Keys, v: Values, dq: Queries | None, dk: Keys | None, dv: Values | None, o: Mixed, scale: float,
    seen: Mask | None,
) -> Mixed:  # fmt: skip
    p = _weights(_sum([(q, k.mT)], scale), seen)
    mixed = [] if dv is None else [(p.to(v.dtype), dv)]
    moved = [] if dq is None else [(dq, k.mT)]
    moved += [] if dk is None else [(q, dk.mT)]
    if not moved:
        return _sum(mixed)
    h = _sum(moved, scale).mul_(p)
    return _sum([*mixed, (h.to(v.dtype), v)]) - h.sum(-1, keepdim=True) * o


def _each(x: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values in this type, for each head of the queries."""
    x = x.to(dtype)
    return x if x.shape[:-2] == q.shape[:-2] else x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)


def _seen(mask: Mask | None, causal: bool, rows: slice, o: Tensor, k: Tensor) -> Mask | None:
    """The mask of some queries, (*b, rows, m). A causal one lets the i-th query see keys up to the i-th."""
    n, m = o.shape[-2], k.shape[-2]
    if causal:
        first = rows.start or 0
        last = n if rows.stop is None else min(rows.stop, n)  # torch 2.11 cannot trace `slice.indices`
        mask = torch.ones(last - first, m, dtype=torch.bool, device=o.device).tril(first)
        return mask.expand(*o.shape[:-2], -1, -1)
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask.to(o.dtype)  # as autocast does
    return mask.expand(*o.shape[:-1], m)[..., rows, :]


def _weights(s: Tensor, seen: Mask | None) -> Tensor:
    """The softmax of the scores; zero for a query that sees no key."""
    if seen is None:
        return s.softmax(-1)
    masked = s.view(seen.shape)
    masked = torch.where(seen, masked, -inf) if seen.dtype == torch.bool else masked + seen
    return aten._safe_softmax(masked, -1).view(s.shape)


def _sum(pairs: Sequence[tuple[Tensor, Tensor]], scale: float = 1.0) -> Tensor:
    """The sum of scale a b over pairs, in fp32 where they are halves."""
    total = pairs[0][0].new_zeros(())
    for i, (a, b) in enumerate(pairs):
        if a.dtype in HALF:
            new = torch.bmm(a, b, out_dtype=torch.float32).mul_(scale)
            total = total.add_(new) if i else new
        else:  # beta = 0: the first total is not read
            total = torch.baddbmm(total, a, b, beta=int(i > 0), alpha=scale, out=total if i else None)
    return total


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    """Triton, halves, tensor cores that take bf16, and heads that fit into shared memory."""
    fits = q.ndim == 4 and max(q.shape[-1], v.shape[-1]) <= 256
    return TRITON and q.is_cuda and fits and q.dtype in HALF and torch.cuda.get_device_properties(q.device).major >= 8


def _as_typed(device: str) -> AbstractContextManager[object]:
    """Inside, numbers keep their types: no autocast, where the device has one."""
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()
