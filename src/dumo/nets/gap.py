"""Add a second time r to a pretrained model with one time t, by an embedding of the gap t - r (ours).

    temb(t, r) = E(t) + G(t - r),    initially G = 0

E is the model's time embedder, and G the trained `GapEmbedder`. u(x, t, r) is therefore initially bit-identical to
v(x, t).

G has the layers of E, with its last layer initialized to zero. Its first layer is a copy of E's, with the same waves of
up to 1000 rad per unit, because that layer has learned to distinguish them. G also has the low-pass of E, because at
constant r the gap changes with t, and du/dt would otherwise contain the frequencies that were removed from E. A
diffusion model embeds the index of its time, but the gap is a difference of times.

For an export, `fit_fixed_times` corrects E so that it returns E + G at a list of passes, with one r for each t. With
h_k the input of E's last layer at t_k, its weight W changes by the smallest D such that

    (W + D) h_k + b = E(t_k) + G(t_k - r_k),    k = 1 ... K

D has rank at most K. It is well determined if the condition number of the h_k is small; the error after rounding is
measured.

`dumo.nets.dualized` uses `GapEmbedder` and `fit_fixed_times`.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dumo.nets.lowpass import frequencies, linear_layers, waves
from dumo.types import Array, Time, UserError

# The largest relative error of the time embedding in an export (our choice).
_MAX_EMBEDDING_ERROR = 1e-5


class GapEmbedder(nn.Module):
    """The embedding G of the gap t - r. All of its weights are trained."""

    frequencies: Tensor

    def __init__(self, embedder: nn.Module, max_frequency: float) -> None:
        """Copy the embedder E, with its low-pass if it has one. `max_frequency` is its highest frequency, in rad."""
        super().__init__()
        self.layers = copy.deepcopy(embedder).requires_grad_(True)
        _, first_layer, last_layer = linear_layers(self.layers)
        for p in last_layer.parameters():
            nn.init.zeros_(p)
        wave_frequencies = frequencies(first_layer.in_features, max_frequency).float()
        self.register_buffer("frequencies", wave_frequencies.to(first_layer.weight.device), persistent=False)

    def forward(self, gap: Time) -> Array:
        """Embed the gaps (b,) as (b, width)."""
        return self.layers(waves(gap, self.frequencies))

    @torch.no_grad()
    def copy_first_layer(self, embedder: nn.Module) -> None:
        """Copy the first layer of the embedder E again, after its weights were loaded or refit."""
        _, gap_layer, _ = linear_layers(self.layers)
        _, time_layer, _ = linear_layers(embedder)
        for gap_weight, time_weight in zip(gap_layer.parameters(), time_layer.parameters(), strict=True):
            gap_weight.copy_(time_weight)


@dataclass(frozen=True)
class FixedTimes:
    """A corrected last layer, with which E returns E + G at the times of a list of passes.

    The errors are |a - b| / |b| of the embedding, at the worst time. The names of the floats are keys in an export's
    dumo.json.

    passes: the number of times.
    condition: the condition number of the last layer's inputs at these times.
    error: of the corrected embedder, with weights in the dtype of the export.
    half: of the corrected embedder, with weights rounded to bf16.
    stock: of the uncorrected embedder with weights rounded to bf16, against itself in float32.
    """

    passes: int
    condition: float
    error: float
    half: float
    stock: float
    layer: nn.Linear

    def __str__(self) -> str:
        """Describe the result in one line."""
        times = "time" if self.passes == 1 else "times"
        return (
            f"{self.passes} fixed {times} with one r each: condition number {self.condition:.3g}, "
            f"error {self.error:.1g}, in bf16 {self.half:.1g} (without the correction {self.stock:.1g})"
        )


@torch.no_grad()
def fit_fixed_times(embedder: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> FixedTimes:
    """Correct the last layer of a copy of an embedder, so that it maps the waves x (k, waves) to `target` (k, width).

    It computes in float64, for weights that are then rounded to `dtype`; the layers before the last are rounded first.
    Raises UserError if the error is above `_MAX_EMBEDDING_ERROR` and twice the rounding error.
    """
    x = x.double()
    rounded_embedder = _round_weights(embedder, dtype)
    _, _, last = linear_layers(embedder)
    layer, condition = _corrected_last_layer(rounded_embedder, last, x, target.double())
    corrected = copy.deepcopy(embedder)
    _, _, corrected_layer = linear_layers(corrected)
    corrected_layer.weight = layer.weight

    # Measure the errors after rounding.
    uncorrected_output = _round_weights(embedder, torch.float32)(x)
    rounding_error = _max_error(rounded_embedder, x, uncorrected_output)
    result = FixedTimes(
        passes=len(x),
        condition=condition,
        error=_max_error(_round_weights(corrected, dtype), x, target),
        half=_max_error(_round_weights(corrected, torch.bfloat16), x, target),
        stock=_max_error(_round_weights(embedder, torch.bfloat16), x, uncorrected_output),
        layer=layer,
    )
    # False for NaN.
    is_exact = result.error <= max(_MAX_EMBEDDING_ERROR, 2 * rounding_error)
    if not is_exact:
        raise UserError(
            f"the times of these passes are too close for one time embedding ({result}): use a smaller --nfe, or "
            "sample with dumo sample"
        )
    return result


def _corrected_last_layer(embedder: nn.Module, last: nn.Linear, x: Tensor, target: Tensor) -> tuple[nn.Linear, float]:
    """Return a copy of the layer `last`, changed by D, and the condition number of its inputs.

    embedder: has `last` rounded, and maps the waves x (k, waves) to embeddings that should be `target` (k, width).
    """
    layer = copy.deepcopy(last)
    h = _last_layer_inputs(embedder, x)

    # Minimum-norm least squares: step = pinv(h) (target - embedding), (features, width).
    left, singular_values, right = torch.linalg.svd(h, full_matrices=False)
    residual = target - embedder(x)
    step = right.T @ ((left.T @ residual) / singular_values[:, None])

    new_weight = layer.weight.double() + step.T
    layer.weight = nn.Parameter(new_weight.float(), False)
    condition = float(singular_values[0] / singular_values[-1])
    return layer, condition


def _round_weights(embedder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy an embedder with its weights rounded to `dtype`. The copy computes in float64."""
    return copy.deepcopy(embedder).to(dtype).double()


def _last_layer_inputs(embedder: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs (k, features) of the embedder's last layer for the waves x (k, waves)."""
    inputs = list[Tensor]()
    _, _, last = linear_layers(embedder)
    handle = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    embedder(x)
    handle.remove()
    return inputs[0]


def _max_error(embedder: nn.Module, x: Tensor, target: Tensor) -> float:
    """Return the largest relative error of the embeddings of waves x (k, waves), against `target` (k, width)."""
    errors = (embedder(x) - target).norm(dim=1) / target.norm(dim=1)
    return float(errors.max())
