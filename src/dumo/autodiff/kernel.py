"""The tangent of softmax attention in one Triton kernel, which keeps no scores in memory.

`dumo.autodiff.attention`, which derives the formula, calls `attention_tangent`. It chooses block sizes that fit into
shared memory, and launches `_kernel`, one program per block of queries. A program iterates over blocks of keys,

    p = 2^(S log2 e - peak),    h = p * s (dq k^T + q dk^T),
    acc += p dv + h v,          m += rowsum h,

and writes dO = acc - m O. If the primal's kernel returned the log-sum-exp, that is the peak, and p are the weights.
Otherwise the peak is the largest score so far, and acc and m are divided by the sum of all p at the end. Tangents have
no gradient, so there is no backward kernel. Products are in the dtype of the inputs, sums in fp32.

Importing this file imports Triton. Block sizes come from a table and not from autotuning, so results are reproducible.
"""
# Triton functions have no Python types.
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

_Shape = tuple[int, ...]

# The shared memory per program on H100 and H200.
H100_SHARED_BYTES = 227 << 10
_NUM_WARPS = 8
# (queries, keys, stages) per program; the first that fits into shared memory is used (our choice).
_BLOCK_SIZES = ((128, 64, 3), (128, 64, 2), (64, 64, 2), (64, 32, 2), (32, 32, 1))
# The smallest dimension of `tl.dot`.
_MIN_WIDTH = 16


def covering_widths(size: int) -> tuple[int, int, int]:
    """Return a head's size, and one or two powers of two that cover it: 64 and 16 for 72, instead of 128.

    Each width is at least 16; the second is 0 if one is enough.
    """
    one_width = max(_MIN_WIDTH, 1 << (size - 1).bit_length())
    half_width = one_width // 2
    rest_width = max(_MIN_WIDTH, 1 << (size - half_width - 1).bit_length())
    if rest_width < half_width:
        return size, half_width, rest_width
    return size, one_width, 0


def _block_sizes(row_bytes: int, shared_bytes: int) -> tuple[int, int, int]:
    """Return the first of _BLOCK_SIZES that fits into shared memory: q and dq, and `stages` blocks of k, dk, v, dv."""
    for queries, keys, stages in _BLOCK_SIZES:
        if (2 * queries + 4 * keys * stages) * row_bytes <= shared_bytes:
            return queries, keys, stages
    return _BLOCK_SIZES[-1]


@triton.jit
@no_type_check
def _addresses(x, stride, b, h, rows, n, d: tl.constexpr, first: tl.constexpr, width: tl.constexpr, unit: tl.constexpr):
    """Return the addresses of `width` columns of some rows from column `first`, and the mask of those in (n, d[0])."""
    cols = first + tl.arange(0, width)
    offsets = (b * stride[0] + h * stride[1] + rows[:, None] * stride[2]) * unit + cols[None, :] * stride[3]
    return x + offsets, (rows[:, None] < n) & (cols[None, :] < d[0])


@triton.jit
@no_type_check
def _load(x, stride, b, h, rows, n, d: tl.constexpr, unit: tl.constexpr):
    """Load some rows in the two parts of `covering_widths`, zero outside of (n, d[0]).

    If there is one part, the second repeats it and is not used.
    """
    addresses, is_inside = _addresses(x, stride, b, h, rows, n, d, 0, d[1], unit)
    left = tl.load(addresses, mask=is_inside, other=0.0)
    right = left  # Triton 3.6 does not support None in a tuple
    if d[2] > 0:
        addresses, is_inside = _addresses(x, stride, b, h, rows, n, d, d[1], d[2], unit)
        right = tl.load(addresses, mask=is_inside, other=0.0)
    return left, right


@triton.jit
@no_type_check
def _add_scores(a, b, s, d: tl.constexpr):
    """Return s + a b^T, for rows in the two parts of `covering_widths`."""
    s = tl.dot(a[0], tl.trans(b[0]), s, input_precision="ieee")
    if d[2] > 0:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@triton.jit
@no_type_check
def _add_mixed(p, v, acc, e: tl.constexpr):
    """Return acc + p v, for rows of v in the two parts of `covering_widths`."""
    p = p.to(v[0].dtype)
    left = tl.dot(p, v[0], acc[0], input_precision="ieee")
    right = acc[1]
    if e[2] > 0:
        right = tl.dot(p, v[1], right, input_precision="ieee")
    return left, right


@triton.jit
@no_type_check
def _scale_rows(acc, factor):
    """Multiply each row of acc by its factor."""
    return acc[0] * factor[:, None], acc[1] * factor[:, None]


@triton.jit
@no_type_check
def _kernel(
    q, k, v, dq, dk, dv, o, out, qs, ks, vs, dqs, dks, dvs, os, outs, lse, scale, heads, n, m,
    d: tl.constexpr, e: tl.constexpr, bn: tl.constexpr, bm: tl.constexpr, unit: tl.constexpr,
):  # fmt: skip
    """Write dO for bn of n queries, iterating over m keys in blocks of bm.

    qs, ks ... are the strides of q, k ...; all but the last are in multiples of `unit`. d and e are the
    `covering_widths` of the heads of k and v.
    """
    num_blocks = tl.cdiv(n, bn)
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    b = head // heads
    h = head % heads
    rows = tl.program_id(0) % num_blocks * bn + tl.arange(0, bn)

    query = _load(q, qs, b, h, rows, n, d, unit)
    if dq is not None:
        query_tangent = _load(dq, dqs, b, h, rows, n, d, unit)
    peak = tl.full((bn,), float("-inf"), tl.float32)
    if lse is not None:
        peak = tl.load(lse + head * n + rows, mask=rows < n, other=0.0) * 1.4426950408889634  # log2 e
    total = tl.zeros((bn,), tl.float32)
    mean = tl.zeros((bn,), tl.float32)
    left = tl.full((bn, e[1]), 0.0, tl.float32)
    right = tl.full((bn, 16 if e[2] == 0 else e[2]), 0.0, tl.float32)  # unused if there is one part
    acc = left, right

    for first in range(0, m, bm):
        cols = first + tl.arange(0, bm)
        key = _load(k, ks, b, h, cols, m, d, unit)
        s = _add_scores(query, key, tl.zeros((bn, bm), tl.float32), d) * (scale * 1.4426950408889634)
        s = tl.where(cols[None, :] < m, s, float("-inf"))
        if lse is None:
            top = tl.maximum(peak, tl.max(s, 1))
            fade = tl.exp2(peak - top)
            peak = top
            total = total * fade
            mean = mean * fade
            acc = _scale_rows(acc, fade)
        p = tl.exp2(s - peak[:, None])
        if lse is None:
            total += tl.sum(p, 1)
        if dv is not None:
            acc = _add_mixed(p, _load(dv, dvs, b, h, cols, m, e, unit), acc, e)
        if dq is not None or dk is not None:
            ds = tl.zeros((bn, bm), tl.float32)
            if dq is not None:
                ds = _add_scores(query_tangent, key, ds, d)
            if dk is not None:
                ds = _add_scores(query, _load(dk, dks, b, h, cols, m, d, unit), ds, d)
            ds *= p * scale
            mean += tl.sum(ds, 1)
            acc = _add_mixed(ds, _load(v, vs, b, h, cols, m, e, unit), acc, e)

    if lse is None:
        mean = mean / total
        acc = _scale_rows(acc, 1.0 / total)
    output = _load(o, os, b, h, rows, n, e, unit)
    addresses, is_inside = _addresses(out, outs, b, h, rows, n, e, 0, e[1], unit)
    tl.store(addresses, acc[0] - mean[:, None] * output[0], mask=is_inside)
    if e[2] > 0:
        addresses, is_inside = _addresses(out, outs, b, h, rows, n, e, e[1], e[2], unit)
        tl.store(addresses, acc[1] - mean[:, None] * output[1], mask=is_inside)


@torch.library.custom_op("dumo::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, o: Tensor,
    lse: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Compute dO, in the shape and layout of o (b, h, n, e).

    q, dq: (b, h, n, d); k, dk: (b, h, m, d); v, dv: (b, h, m, e); lse: (b, h, n).
    All but lse (fp32) have one dtype, and any strides. The products of a tangent that is None are skipped.
    """
    b, h, n, _ = q.shape
    out = torch.empty_like(o)
    tensors = (q, k, v, dq, dk, dv, o, out)
    outer_strides = [stride for x in tensors if x is not None for stride in x.stride()[:3]]
    # Strides are passed in multiples of `unit`, so that the compiler can load 16 bytes at once.
    unit = gcd(8, *outer_strides)
    strides = [x if x is None else (*(stride // unit for stride in x.stride()[:3]), x.stride(3)) for x in tensors]
    d = covering_widths(q.shape[3])
    e = covering_widths(v.shape[3])
    # Without a GPU, for Triton's interpreter and ahead-of-time compilation, assume an H100.
    shared_bytes = H100_SHARED_BYTES
    if q.is_cuda:
        shared_bytes = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    row_bytes = max(sum(d[1:]), sum(e[1:])) * q.element_size()
    bn, bm, stages = _block_sizes(row_bytes, shared_bytes)
    num_programs = triton.cdiv(n, bn) * b * h
    # Triton launches on the current device.
    with torch.cuda.device_of(q):
        _kernel[(num_programs,)](
            *tensors, *strides, lse if lse is None else lse.contiguous(), scale, h, n, k.shape[2],
            d, e, bn, bm, unit, num_warps=_NUM_WARPS, num_stages=stages,
        )  # fmt: skip
    return out


@attention_tangent.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dq: object, dk: object, dv: object, o: Tensor, *_: object) -> Tensor:
    return torch.empty_like(o)


@register_flop_formula(torch.ops.dumo.attention_tangent)
def _flops(q: _Shape, k: _Shape, v: _Shape, dq: object, dk: object, dv: object, *_: object, **__: object) -> int:
    """Count the floating-point operations, two per multiply-add. The arguments are shapes."""
    b, h, n, d = q
    key_products = 1 + (dq is not None) + (dk is not None)
    value_products = (dv is not None) + (dq is not None or dk is not None)
    return 2 * b * h * n * k[2] * (key_products * d + value_products * v[3])
