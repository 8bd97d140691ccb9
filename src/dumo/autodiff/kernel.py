"""The tangent of softmax attention in one Triton kernel: no scores in memory, and one operator to a compiler.

`dumo.autodiff.attention` derives the formula. A program takes a block of queries and walks over blocks of keys,

    p = 2^(S log2 e - peak),    h = p * s (dq k^T + q dk^T),
    acc += p dv + h v,          m += rowsum h,

and writes dO = acc - m O. Where the primal's kernel gave its log-sum-exp, that is the peak, and p are the weights.
Where it did not, the peak is the largest score so far, and acc and m are divided by the sum of all p at the end.
No gradient flows through a tangent, so there is no backward kernel. Products are of the inputs' type, sums are fp32.

Importing this file imports Triton. Blocks are looked up and not timed, so a machine gives the same bits each time.
"""
# The functions of Triton are no Python: what they take and return has no type here.
# ruff: noqa: ANN001, ANN202
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportMissingImports=false, reportUntypedFunctionDecorator=false

from math import gcd
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]

HOPPER = 227 << 10  # bytes of shared memory that a program can have on H100 and H200
# Queries, keys and loads in flight of a program of WARPS; the first that fits into shared memory is taken (ours).
BLOCKS, WARPS = ((128, 64, 3), (128, 64, 2), (64, 64, 2), (64, 32, 2), (32, 32, 1)), 8


def cover(size: int) -> tuple[int, int, int]:
    """A head's size, and one or two powers of two from 16 that cover it: 72 takes 64 + 16, where 128 would be waste."""
    whole = max(16, 1 << (size - 1).bit_length())
    half = whole // 2
    rest = max(16, 1 << (size - half - 1).bit_length())
    return (size, half, rest) if rest < half else (size, whole, 0)


def block(row: int, limit: int) -> tuple[int, int, int]:
    """The entry of BLOCKS for rows of that many bytes: q and dq stay in memory, and k, dk, v and dv pass through it."""
    return next((b for b in BLOCKS if (2 * b[0] + 4 * b[1] * b[2]) * row <= limit), BLOCKS[-1])


@triton.jit
@no_type_check
def _at(x, stride, b, h, rows, n, d: tl.constexpr, first: tl.constexpr, width: tl.constexpr, unit: tl.constexpr):
    """Addresses of some columns of some rows, and which of them exist."""
    cols = first + tl.arange(0, width)
    at = (b * stride[0] + h * stride[1] + rows[:, None] * stride[2]) * unit + cols[None, :] * stride[3]
    return x + at, (rows[:, None] < n) & (cols[None, :] < d[0])


@triton.jit
@no_type_check
def _load(x, stride, b, h, rows, n, d: tl.constexpr, unit: tl.constexpr):
    """Some rows, in the two parts of `cover`, zero outside.

    With one part the second repeats the first and is not used.
    """
    at, there = _at(x, stride, b, h, rows, n, d, 0, d[1], unit)
    left = tl.load(at, mask=there, other=0.0)
    right = left  # Triton 3.6 does not take None inside a tuple
    if d[2] > 0:
        at, there = _at(x, stride, b, h, rows, n, d, d[1], d[2], unit)
        right = tl.load(at, mask=there, other=0.0)
    return left, right


@triton.jit
@no_type_check
def _scores(a, b, s, d: tl.constexpr):
    """s + a b^T."""
    s = tl.dot(a[0], tl.trans(b[0]), s, input_precision="ieee")
    if d[2] > 0:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@triton.jit
@no_type_check
def _mix(p, v, acc, e: tl.constexpr):
    """acc + p v."""
    p = p.to(v[0].dtype)
    left = tl.dot(p, v[0], acc[0], input_precision="ieee")
    right = acc[1]
    if e[2] > 0:
        right = tl.dot(p, v[1], right, input_precision="ieee")
    return left, right


@triton.jit
@no_type_check
def _times(acc, share):
    """Every row of acc times its share."""
    return acc[0] * share[:, None], acc[1] * share[:, None]


@triton.jit
@no_type_check
def _kernel(
    q, k, v, dq, dk, dv, o, out, qs, ks, vs, dqs, dks, dvs, os, outs, lse, scale, heads, n, m,
    d: tl.constexpr, e: tl.constexpr, bn: tl.constexpr, bm: tl.constexpr, unit: tl.constexpr,
):  # fmt: skip
    """bn of n queries against m keys, bm at a time; d and e `cover` k and v; strides, but the last, count in units."""
    blocks = tl.cdiv(n, bn)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    rows = tl.program_id(0) % blocks * bn + tl.arange(0, bn)

    query = _load(q, qs, b, h, rows, n, d, unit)
    if dq is not None:
        moved = _load(dq, dqs, b, h, rows, n, d, unit)
    peak = tl.full((bn,), float("-inf"), tl.float32)
    if lse is not None:
        peak = tl.load(lse + head * n + rows, mask=rows < n, other=0.0) * 1.4426950408889634  # log2 e
    total, mean = tl.zeros((bn,), tl.float32), tl.zeros((bn,), tl.float32)
    left = tl.full((bn, e[1]), 0.0, tl.float32)
    right = tl.full((bn, 16 if e[2] == 0 else e[2]), 0.0, tl.float32)  # unused where one part covers
    acc = left, right

    for first in range(0, m, bm):
        cols = first + tl.arange(0, bm)
        key = _load(k, ks, b, h, cols, m, d, unit)
        s = _scores(query, key, tl.zeros((bn, bm), tl.float32), d) * (scale * 1.4426950408889634)
        s = tl.where(cols[None, :] < m, s, float("-inf"))
        if lse is None:
            top = tl.maximum(peak, tl.max(s, 1))
            fade = tl.exp2(peak - top)
            peak, total, mean, acc = top, total * fade, mean * fade, _times(acc, fade)
        p = tl.exp2(s - peak[:, None])
        if lse is None:
            total += tl.sum(p, 1)
        if dv is not None:
            acc = _mix(p, _load(dv, dvs, b, h, cols, m, e, unit), acc, e)
        if dq is not None or dk is not None:
            ds = tl.zeros((bn, bm), tl.float32)
            if dq is not None:
                ds = _scores(moved, key, ds, d)
            if dk is not None:
                ds = _scores(query, _load(dk, dks, b, h, cols, m, d, unit), ds, d)
            ds *= p * scale
            mean += tl.sum(ds, 1)
            acc = _mix(ds, _load(v, vs, b, h, cols, m, e, unit), acc, e)

    if lse is None:
        mean, acc = mean / total, _times(acc, 1.0 / total)
    old = _load(o, os, b, h, rows, n, e, unit)
    at, there = _at(out, outs, b, h, rows, n, e, 0, e[1], unit)
    tl.store(at, acc[0] - mean[:, None] * old[0], mask=there)
    if e[2] > 0:
        at, there = _at(out, outs, b, h, rows, n, e, e[1], e[2], unit)
        tl.store(at, acc[1] - mean[:, None] * old[1], mask=there)


@torch.library.custom_op("dumo::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, o: Tensor,
    lse: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """dO, laid out as o (b, h, n, e). q, dq: (b, h, n, d); k, dk: (b, h, m, d); v, dv: (b, h, m, e); lse: (b, h, n).

    All but lse (fp32) are of one type, and of any strides. A tangent that is None is zero: its products are skipped.
    """
    out, (b, h, n, _) = torch.empty_like(o), q.shape
    given = (q, k, v, dq, dk, dv, o, out)
    unit = gcd(8, *(s for x in given if x is not None for s in x.stride()[:3]))  # so that 16 bytes load at once
    strides = (x if x is None else (*(s // unit for s in x.stride()[:3]), x.stride(3)) for x in given)
    d, e = cover(q.shape[3]), cover(v.shape[3])
    memory = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin if q.is_cuda else HOPPER
    bn, bm, stages = block(max(sum(d[1:]), sum(e[1:])) * q.element_size(), memory)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _kernel[(triton.cdiv(n, bn) * b * h,)](
            *given, *strides, lse if lse is None else lse.contiguous(), scale, h, n, k.shape[2],
            d, e, bn, bm, unit, num_warps=WARPS, num_stages=stages,
        )  # fmt: skip
    return out


@attention_tangent.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dq: object, dk: object, dv: object, o: Tensor, *_: object) -> Tensor:
    return torch.empty_like(o)


@register_flop_formula(torch.ops.dumo.attention_tangent)
def flops(q: Shape, k: Shape, v: Shape, dq: object, dk: object, dv: object, *_: object, **__: object) -> int:
    """Operations of the products that are made, two per multiply-add; shapes for tensors."""
    b, h, n, d = q
    with_keys = 1 + (dq is not None) + (dk is not None)
    with_values = (dv is not None) + (dq is not None or dk is not None)
    return 2 * b * h * n * k[2] * (with_keys * d + with_values * v[3])
