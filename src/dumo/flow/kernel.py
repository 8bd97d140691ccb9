"""The tangent of softmax attention in one Triton kernel: no scores in memory, and one operator to a compiler.

`dumo.flow.attention` derives the formula. A program takes a block of queries and walks over blocks of keys,

    p = 2^(S log2 e - peak),    h = p * s (dq k^T + q dk^T),
    acc += p dv + h v,          m += rowsum h,

and writes dO = acc - m O. Where the primal's kernel gave its log-sum-exp, that is the peak and p are the weights.
Where it did not, the peak is the largest score so far, and acc and m are divided by the sum of p at the end.
No gradient flows through a tangent, so there is no backward kernel. Products are of the inputs' type, sums are fp32.

Importing this file imports Triton. Block sizes are looked up and not timed, so a machine gives the same bits each time.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# queries, keys, warps, and loads in flight of a program. The first that fits into shared memory is taken (ours).
BLOCKS = ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1), (16, 16, 4, 1))
HOPPER = 227 << 10  # bytes of shared memory a program can have on H100 and H200


def widths(size: int) -> tuple[int, int, int]:
    """A head's size, and one or two powers of two from 16 that cover it: 72 as 64 + 16, since 128 would be waste."""
    whole = max(16, triton.next_power_of_2(size))
    half = whole // 2
    rest = max(16, triton.next_power_of_2(size - half))
    return (size, half, rest) if half >= 16 and rest < half else (size, whole, 0)


def block(numbers: int, limit: int) -> tuple[int, int, int, int]:
    """The entry of BLOCKS for rows of `numbers` bytes: q and dq stay in memory, k, dk, v and dv pass through it."""
    fit = (b for b in BLOCKS if (2 * b[0] + 4 * b[1] * b[3]) * numbers <= limit)
    return next(fit, BLOCKS[-1])


@triton.jit
def _at(x, stride, b, h, rows, n, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):
    """Addresses of WIDTH columns of some rows, and which of them exist."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = (b * stride[0] + h * stride[1] + rows[:, None] * stride[2]) * UNIT + cols[None, :] * stride[3]
    return x + at, (rows[:, None] < n) & (cols[None, :] < D[0])


@triton.jit
def _load(x, stride, b, h, rows, n, D: tl.constexpr, UNIT: tl.constexpr):
    """Some rows, in the one or two parts of `widths`; zero outside."""
    at, there = _at(x, stride, b, h, rows, n, D, 0, D[1], UNIT)
    left = tl.load(at, mask=there, other=0.0)
    if D[2] == 0:
        return left, None
    else:
        at, there = _at(x, stride, b, h, rows, n, D, D[1], D[2], UNIT)
        return left, tl.load(at, mask=there, other=0.0)


@triton.jit
def _scores(a, b, s):
    """s + a b^T."""
    s = tl.dot(a[0], tl.trans(b[0]), s, input_precision="ieee")
    return s if a[1] is None else tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")


@triton.jit
def _mix(p, v, acc):
    """acc + p v."""
    p = p.to(v[0].dtype)
    left = tl.dot(p, v[0], acc[0], input_precision="ieee")
    return left, None if v[1] is None else tl.dot(p, v[1], acc[1], input_precision="ieee")


@triton.jit
def _kernel(
    q, k, v, dq, dk, dv, o, out, q_s, k_s, v_s, dq_s, dk_s, dv_s, o_s, out_s, lse, scale, heads, n, keys,
    D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """M queries against all keys, N at a time. D and E are the `widths` of k and v; strides of rows count in UNITs."""
    blocks = tl.cdiv(n, M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    rows = tl.program_id(0) % blocks * M + tl.arange(0, M)

    here = _load(q, q_s, b, h, rows, n, D, UNIT)
    if dq is not None:
        moved = _load(dq, dq_s, b, h, rows, n, D, UNIT)
    if lse is None:
        peak = tl.full((M,), float("-inf"), tl.float32)
    else:
        peak = tl.load(lse + head * n + rows, mask=rows < n, other=0.0) * 1.4426950408889634  # log2 e
    total, mean = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, E[1]), tl.float32), None if E[2] == 0 else tl.zeros((M, E[2]), tl.float32)

    for first in range(0, keys, N):
        cols = first + tl.arange(0, N)
        key = _load(k, k_s, b, h, cols, keys, D, UNIT)
        s = _scores(here, key, tl.zeros((M, N), tl.float32)) * (scale * 1.4426950408889634)
        s = tl.where(cols[None, :] < keys, s, float("-inf"))
        if lse is None:
            top = tl.maximum(peak, tl.max(s, 1))
            fade = tl.exp2(peak - top)
            acc = acc[0] * fade[:, None], None if acc[1] is None else acc[1] * fade[:, None]
            total, mean, peak = total * fade, mean * fade, top
        p = tl.exp2(s - peak[:, None])
        total += tl.sum(p, 1)
        if dv is not None:
            acc = _mix(p, _load(dv, dv_s, b, h, cols, keys, E, UNIT), acc)
        if dq is not None or dk is not None:
            ds = tl.zeros((M, N), tl.float32)
            if dq is not None:
                ds = _scores(moved, key, ds)
            if dk is not None:
                ds = _scores(here, _load(dk, dk_s, b, h, cols, keys, D, UNIT), ds)
            ds *= p * scale
            mean += tl.sum(ds, 1)
            acc = _mix(ds, _load(v, v_s, b, h, cols, keys, E, UNIT), acc)

    share = 1.0 / total if lse is None else total * 0.0 + 1.0
    old = _load(o, o_s, b, h, rows, n, E, UNIT)
    at, there = _at(out, out_s, b, h, rows, n, E, 0, E[1], UNIT)
    tl.store(at, (acc[0] - mean[:, None] * old[0]) * share[:, None], mask=there)
    if E[2] > 0:
        at, there = _at(out, out_s, b, h, rows, n, E, E[1], E[2], UNIT)
        tl.store(at, (acc[1] - mean[:, None] * old[1]) * share[:, None], mask=there)


@torch.library.custom_op("dumo::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    o: Tensor,
    lse: Tensor | None,
    scale: float,
) -> Tensor:
    """dO, laid out as o: q and dq (b, h, n, d), k and dk (b, h, m, d), v and dv (b, h, m, e), o (b, h, n, e), lse (b, h, n).

    All of one type, with any strides. A tangent that is None is zero, and its products are skipped.
    """
    out, heads = torch.empty_like(o), q.shape[1]
    given = (q, k, v, dq, dk, dv, o, out)
    unit = gcd(8, *(s for x in given if x is not None for s in x.stride()[:3]))  # lets 16 bytes be loaded at once
    strides = [x if x is None else (*(s // unit for s in x.stride()[:3]), x.stride(3)) for x in given]
    limit = HOPPER
    if q.is_cuda:
        limit = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    D, E = widths(q.shape[3]), widths(v.shape[3])
    M, N, warps, stages = block(max(sum(D[1:]), sum(E[1:])) * q.element_size(), limit)
    with torch.cuda.device_of(q):
        _kernel[(triton.cdiv(q.shape[2], M) * q.shape[0] * heads,)](
            *given, *strides, lse if lse is None else lse.contiguous(), scale, heads, q.shape[2], k.shape[2],
            D, E, M, N, unit, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@attention_tangent.register_fake
def _(q, k, v, dq, dk, dv, o, lse, scale):
    return torch.empty_like(o)


@register_flop_formula(torch.ops.dumo.attention_tangent)
def flops(q, k, v, dq, dk, dv, *rest, **more) -> int:
    """Two per multiply-add of the products that are made: up to three of q and k, up to two with v."""
    b, h, n, d = q
    of_keys = 1 + (dq is not None) + (dk is not None)
    of_values = (dv is not None) + (dq is not None or dk is not None)
    return 2 * b * h * n * k[2] * (of_keys * d + of_values * v[3])
