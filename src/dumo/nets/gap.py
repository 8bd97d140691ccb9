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

The entrances are `GapEmbedder`, which is trained, and `fixed`, for an export; `dumo.nets.dualized` calls both.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dumo.nets.lowpass import frequencies, linear_layers, waves
from dumo.nets.twin import bias_or_none
from dumo.runtime.door import option
from dumo.types import Array, Time, UserError

EXACT = 1e-5  # the relative error of an embedding up to which it counts as the one that was trained (ours)


class GapEmbedder(nn.Module):
    """The embedding G; all of it is trained."""

    frequencies: Tensor

    def __init__(self, embedder: nn.Module, max_frequency: float) -> None:
        """Copy the embedder E and its low-pass, if any. Its quickest wave has `max_frequency` rad per unit of time."""
        super().__init__()
        self.layers = copy.deepcopy(embedder).requires_grad_(True)
        _, first_layer, last_layer = linear_layers(self.layers)
        for p in last_layer.parameters():
            nn.init.zeros_(p)
        w = frequencies(first_layer.in_features, max_frequency).float()
        self.register_buffer("frequencies", w.to(first_layer.weight.device), persistent=False)

    def forward(self, gap: Time) -> Array:
        """Embed the gaps t - r, (b,), and return (b, width)."""
        return self.layers(waves(gap, self.frequencies))

    @torch.no_grad()
    def follow(self, embedder: nn.Module) -> None:
        """Copy the first layer of the embedder E as it is now, after its weights were loaded or refit."""
        _, own_layer, _ = linear_layers(self.layers)
        _, embedder_layer, _ = linear_layers(embedder)
        for own, source in zip(own_layer.parameters(), embedder_layer.parameters(), strict=True):
            own.copy_(source)


@dataclass(frozen=True)
class Fixed:
    """A last layer with which one embedder gives the sum of both embeddings, at the times of a list of passes.

    Errors are of the embedding, |a - b| / |b|, at the worst of these times.
    """

    passes: int  # the number of times
    condition: float  # the condition number of what the last layer reads at these times
    error: float  # with all weights in the type in which they are written
    half: float  # with all weights then rounded to bf16
    stock: float  # of the embedder without the correction, by rounding it to bf16
    layer: nn.Linear

    def __str__(self) -> str:
        """Describe it in one line."""
        times = "time" if self.passes == 1 else "times"
        return (
            f"{self.passes} fixed {times} of one r each: condition number {self.condition:.3g}, "
            f"off by {self.error:.1g}, in bf16 by {self.half:.1g} (without the correction {self.stock:.1g})"
        )


@torch.no_grad()
def fixed(embedder: nn.Module, x: Tensor, wanted: Tensor, dtype: torch.dtype) -> Fixed:
    """Correct the last layer of an embedder so that it maps the waves x (k, waves) to `wanted` (k, width).

    The embedder is left as it is. All is computed in float64, for weights that are then rounded to `dtype`; the layers
    before the last are rounded first. Raises UserError where the error is larger than `EXACT` and rounding explain.
    """
    x = x.double()
    rounded_embedder = _rounded(embedder, dtype)
    last = copy.deepcopy(linear_layers(embedder)[2])
    bias = bias_or_none(last)

    # the least change of weight and bias; the bias is one number more of h, as large as the others are together
    h = _last_layer_inputs(rounded_embedder, x)
    if bias is not None:
        h = torch.cat([h, h.square().sum(1).mean().sqrt().expand(len(h), 1)], 1)
    left, sizes, right = torch.linalg.svd(h, full_matrices=False)
    missing = wanted.double() - rounded_embedder(x)
    step = right.T @ ((left.T @ missing) / sizes[:, None])
    last.weight = nn.Parameter((last.weight.double() + step[: last.in_features].T).float(), False)
    if bias is not None:
        last.bias = nn.Parameter((bias.double() + h[0, -1] * step[-1]).float(), False)

    # what is left after rounding
    corrected = copy.deepcopy(embedder)
    corrected_last = linear_layers(corrected)[2]
    corrected_last.weight = last.weight
    corrected_last.bias = last.bias
    uncorrected_output = _rounded(embedder, torch.float32)(x)
    rounding_error = _max_error(rounded_embedder, x, uncorrected_output)  # of the model as it is
    result = Fixed(
        passes=len(h),
        condition=float(sizes[0] / sizes[-1]),
        error=_max_error(_rounded(corrected, dtype), x, wanted),
        half=_max_error(_rounded(corrected, torch.bfloat16), x, wanted),
        stock=_max_error(_rounded(embedder, torch.bfloat16), x, uncorrected_output),
        layer=last,
    )
    if not result.error <= max(EXACT, 2 * rounding_error):  # a nan is refused, too
        raise UserError(
            f"these passes are too near to one another for one embedding of time ({result}): ask for fewer by "
            f"{option('nfe')}, or sample by dumo sample"
        )
    return result


def _rounded(embedder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy an embedder with its weights rounded to `dtype`. The copy computes in float64."""
    return copy.deepcopy(embedder).to(dtype).double()


def _last_layer_inputs(embedder: nn.Module, x: Tensor) -> Tensor:
    """Return what the embedder's last layer reads, (k, features), for the waves x (k, waves)."""
    inputs = list[Tensor]()
    last = linear_layers(embedder)[2]
    handle = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    embedder(x)
    handle.remove()
    return inputs[0]


def _max_error(embedder: nn.Module, x: Tensor, wanted: Tensor) -> float:
    """Return the largest relative error of the embeddings of waves x (k, waves), against `wanted` (k, width)."""
    errors = (embedder(x) - wanted).norm(dim=1) / wanted.norm(dim=1)
    return float(errors.max())
