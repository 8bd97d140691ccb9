"""A second time for a model that has learned one: an embedding of the gap t - r, added to its own of t (ours).

    temb(t, r) = E(t) + G(t - r),    G = 0 at the start,

so u(x, t, r) begins as v(x, t), to the bit, whatever the model does with temb. G has the layers of E, its last at zero.
It reads the gap in the waves in which E reads t, of up to 1000 rad per unit: at r = 0 both see the same numbers, and
the first layer, which begins as a copy of E's, has learned to tell these apart. So the low-pass of E is that of G, too:
with r at rest the gap runs as quickly as t, and du/dt would have the waves that were cut from E. A model of a diffusion
embeds an index; its gap is one of times, in which the objective measures its steps.

A list of passes has one r for each t, so at these K times one embedder can say the sum (`fixed`). With h_k what its
last layer reads at t_k, that layer's W and b change by the least D and d for which

    (W + D) h_k + b + d = E(t_k) + G(t_k - r_k),    k = 1 ... K,

a step of rank K at most. It is as well determined as the h_k differ from one another, which the condition number of
their matrix says; what counts is the error that is left after rounding, which is measured.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dumo.nets.lowpass import frequencies, layers, waves
from dumo.nets.twin import bias_or_none
from dumo.types import Array, Time, UserError

EXACT = 1e-5  # of an embedding, relative, beyond which it is not the one that was trained: ours


class GapEmbedder(nn.Module):
    """The embedding G; all of it is trained."""

    frequencies: Tensor

    def __init__(self, embedder: nn.Module, turn: float) -> None:
        """As the embedder E, behind its low-pass if it has one. Its quickest wave has `turn` rad per unit of time."""
        super().__init__()
        self.layers = copy.deepcopy(embedder).requires_grad_(True)
        _, one, two = layers(self.layers)
        for p in two.parameters():
            nn.init.zeros_(p)
        w = frequencies(one.in_features, turn).float()
        self.register_buffer("frequencies", w.to(one.weight.device), persistent=False)

    def forward(self, gap: Time) -> Array:
        """(b,) -> (b, width)."""
        return self.layers(waves(gap, self.frequencies))

    @torch.no_grad()
    def follow(self, embedder: nn.Module) -> None:
        """Begin with the first layer of E as it is now."""
        for mine, theirs in zip(layers(self.layers)[1].parameters(), layers(embedder)[1].parameters(), strict=True):
            mine.copy_(theirs)


@dataclass(frozen=True)
class Fixed:
    """The sum of both embeddings in one embedder, at the times of a list of passes."""

    passes: int  # times: the rank of the step at most
    condition: float  # of what the last layer reads at these times
    error: float  # of the embedding, |a - b| / |b| at the worst of them, in the type in which weights are written
    half: float  # the same where all weights are then rounded to bf16
    stock: float  # what rounding to bf16 does to the embedder that is not corrected
    layer: nn.Linear  # the last

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.passes} fixed time{'s' * (self.passes > 1)} of one r each: condition number {self.condition:.3g}, "
            f"off by {self.error:.1g}, in bf16 by {self.half:.1g} (without the correction {self.stock:.1g})"
        )


@torch.no_grad()
def fixed(embedder: nn.Module, x: Tensor, wanted: Tensor, dtype: torch.dtype) -> Fixed:
    """The last layer of an embedder, corrected so that of the waves x (k, waves) it makes `wanted` (k, width).

    In float64, for weights that are then rounded to `dtype`; those before it are rounded first. Raises UserError where
    that is not what it makes of them.
    """
    one = rounded(embedder, dtype)
    h = hidden(one, x.double())
    last = copy.deepcopy(layers(embedder)[2])
    bias = bias_or_none(last)
    if bias is not None:  # as one number more, as large as the others are together
        h = torch.cat([h, h.square().sum(1).mean().sqrt().expand(len(h), 1)], 1)
    left, sizes, right = torch.linalg.svd(h, full_matrices=False)
    step = right.T @ ((left.T @ (wanted.double() - one(x.double()))) / sizes[:, None])
    last.weight = nn.Parameter((last.weight.double() + step[: last.in_features].T).float(), False)
    if bias is not None:
        last.bias = nn.Parameter((bias.double() + h[0, -1] * step[-1]).float(), False)
    new = copy.deepcopy(embedder)
    new_last = layers(new)[2]
    new_last.weight = last.weight
    new_last.bias = last.bias
    uncorrected = rounded(embedder, torch.float32)(x.double())
    rounding_error = off(rounded(embedder, dtype), x, uncorrected)  # of the model as it is
    layer = Fixed(
        len(h),
        float(sizes[0] / sizes[-1]),
        off(rounded(new, dtype), x, wanted),
        off(rounded(new, torch.bfloat16), x, wanted),
        off(rounded(embedder, torch.bfloat16), x, uncorrected),
        last,
    )
    if not layer.error <= max(EXACT, 2 * rounding_error):
        raise UserError(
            f"these passes are too near to one another for one embedding of time ({layer}): ask for fewer by --nfe, or "
            "sample by dumo sample"
        )
    return layer


def rounded(embedder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose weights are those of this type, and which computes in float64."""
    return copy.deepcopy(embedder).to(dtype).double()


def hidden(embedder: nn.Module, x: Tensor) -> Tensor:
    """What the last layer reads."""
    seen = list[Tensor]()
    handle = layers(embedder)[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embedder(x)
    handle.remove()
    return seen[0]


def off(embedder: nn.Module, x: Tensor, wanted: Tensor) -> float:
    """How far what it makes of x is from what is wanted, relatively, where that is most."""
    return float(((embedder(x.double()) - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
