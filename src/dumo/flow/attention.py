"""The tangent of softmax attention."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """The output, and its log-sum-exp where known."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale), None


def tangent(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    o: Tensor, lse: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Its tangent."""
    dq, dk, dv = (torch.zeros_like(x) if d is None else d for d, x in ((dq, q), (dk, k), (dv, v)))
    p = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    h = p * (dq @ k.transpose(-1, -2) + q @ dk.transpose(-1, -2)) * scale
    return h @ v + p @ dv - h.sum(-1, keepdim=True) * o
