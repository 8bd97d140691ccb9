"""Normalizations without parameters: what follows each of them, a modulation, scales and shifts by the condition."""

from typing import Literal

from torch.nn import functional as F

from dumo.types import Array

Norm = Literal["layer", "rms"]
EPS = 1e-6  # DiT's


def normalize(h: Array, norm: Norm) -> Array:
    """Over the last axis: mean 0 and variance 1 (layer: DiT), or mean square 1 alone (rms: Zhang & Sennrich 2019)."""
    return F.layer_norm(h, h.shape[-1:], eps=EPS) if norm == "layer" else F.rms_norm(h, h.shape[-1:], eps=EPS)


def modulated(h: Array, norm: Norm, shift: Array, scale: Array) -> Array:
    """h (b, tokens, width), normalized, then scaled and shifted, each (b, 1, width)."""
    return normalize(h, norm) * (1 + scale) + shift
