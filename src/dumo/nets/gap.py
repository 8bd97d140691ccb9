"""A second time r for a pretrained model that has learned one time t: an embedding of the gap t - r (ours).

    temb(t, r) = E(t) + G(t - r),    G = 0 at the start

E is the model's own embedder of time, and G the `GapEmbedder`, which is trained. So u(x, t, r) begins as v(x, t), to
the bit, whatever the model does with temb.

G has the layers of E, with its last layer at zero. Its first layer begins as a copy of E's and reads the same waves, of
up to 1000 rad per unit, because that layer has learned to tell these apart. So G has the low-pass of E, too: where r
rests, the gap runs as quickly as t, and du/dt would again have the waves that were cut from E. A model of a diffusion
embeds the index of its time, but its gap is one of times, as objectives measure their steps.

For an export, `fit_fixed_times` corrects E so that it alone gives E + G at a list of passes, with one r for each t.
With h_k the input of E's last layer at t_k, that layer's W changes by the least D for which

    (W + D) h_k + b = E(t_k) + G(t_k - r_k),    k = 1 ... K

D has rank K at most. The step is well determined if the h_k differ enough, which the condition number of their matrix
says; what counts is the error that is left after rounding, which is measured.

`dumo.nets.dualized` calls both entrances, `GapEmbedder` and `fit_fixed_times`.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dumo.nets.lowpass import frequencies, linear_layers, waves
from dumo.types import Array, Time, UserError

# The relative error of an embedding of time up to which an export counts as the trained net (ours).
_MAX_EMBEDDING_ERROR = 1e-5


class GapEmbedder(nn.Module):
    """The embedding G of the gap t - r. All of its layers are trained."""

    frequencies: Tensor

    def __init__(self, embedder: nn.Module, max_frequency: float) -> None:
        """Copy the embedder E, with its low-pass if it has one. `max_frequency` is of its quickest wave, in rad."""
        super().__init__()
        self.layers = copy.deepcopy(embedder).requires_grad_(True)
        _, first_layer, last_layer = linear_layers(self.layers)
        for p in last_layer.parameters():
            nn.init.zeros_(p)
        wave_frequencies = frequencies(first_layer.in_features, max_frequency).float()
        self.register_buffer("frequencies", wave_frequencies.to(first_layer.weight.device), persistent=False)

    def forward(self, gap: Time) -> Array:
        """Embed the gaps t - r, (b,), and return (b, width)."""
        return self.layers(waves(gap, self.frequencies))

    @torch.no_grad()
    def copy_first_layer(self, embedder: nn.Module) -> None:
        """Copy the first layer of the embedder E once more, after its weights were loaded or refit."""
        _, gap_layer, _ = linear_layers(self.layers)
        _, time_layer, _ = linear_layers(embedder)
        for gap_weight, time_weight in zip(gap_layer.parameters(), time_layer.parameters(), strict=True):
            gap_weight.copy_(time_weight)


@dataclass(frozen=True)
class FixedTimes:
    """A corrected last layer, with which E alone gives E + G at the times of a list of passes.

    An error is that of the embedding, |a - b| / |b|, at the worst of these times. The names of the floats are keys in
    an export's dumo.json.
    """

    passes: int  # the number of times
    condition: float  # the condition number of the last layer's inputs at these times
    error: float  # of the corrected embedder, with all weights in the type in which they are written
    half: float  # of the corrected embedder, with all weights rounded to bf16
    stock: float  # of the uncorrected embedder, against itself in float32, with all weights rounded to bf16
    layer: nn.Linear

    def __str__(self) -> str:
        """Describe it in one line."""
        times = "time" if self.passes == 1 else "times"
        return (
            f"{self.passes} fixed {times} of one r each: condition number {self.condition:.3g}, "
            f"off by {self.error:.1g}, in bf16 by {self.half:.1g} (without the correction {self.stock:.1g})"
        )


@torch.no_grad()
def fit_fixed_times(embedder: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> FixedTimes:
    """Correct the last layer of an embedder, so that it maps the waves x (k, waves) to `target` (k, width).

    The embedder stays as it is. Everything is computed in float64, for weights that are then rounded to `dtype`; the
    layers before the last are rounded first. Raises UserError where the error is above `_MAX_EMBEDDING_ERROR` and twice
    that of rounding alone.
    """
    x = x.double()
    rounded_embedder = _round_weights(embedder, dtype)
    _, _, last = linear_layers(embedder)
    layer, condition = _corrected_last_layer(rounded_embedder, last, x, target.double())
    corrected = copy.deepcopy(embedder)
    _, _, corrected_layer = linear_layers(corrected)
    corrected_layer.weight = layer.weight

    # errors after rounding
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
    is_exact = result.error <= max(_MAX_EMBEDDING_ERROR, 2 * rounding_error)  # False for nan, too
    if not is_exact:
        raise UserError(
            f"these passes are too near to one another for one embedding of time ({result}): ask for fewer by "
            "--nfe, or sample by dumo sample"
        )
    return result


def _corrected_last_layer(embedder: nn.Module, last: nn.Linear, x: Tensor, target: Tensor) -> tuple[nn.Linear, float]:
    """Return a copy of the layer `last`, changed by the least D, and the condition number of its inputs.

    `embedder` has `last` rounded, and maps the waves x (k, waves) to embeddings of which `target` (k, width) differs.
    """
    layer = copy.deepcopy(last)
    h = _last_layer_inputs(embedder, x)  # (k, features)

    # least squares of the least norm: step = pinv(h) (target - embedding)
    left, singular_values, right = torch.linalg.svd(h, full_matrices=False)
    residual = target - embedder(x)
    step = right.T @ ((left.T @ residual) / singular_values[:, None])  # (features, width)

    new_weight = layer.weight.double() + step.T
    layer.weight = nn.Parameter(new_weight.float(), False)
    condition = float(singular_values[0] / singular_values[-1])
    return layer, condition


def _round_weights(embedder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy an embedder with its weights rounded to `dtype`. The copy computes in float64."""
    return copy.deepcopy(embedder).to(dtype).double()


def _last_layer_inputs(embedder: nn.Module, x: Tensor) -> Tensor:
    """Return what the embedder's last layer reads, (k, features), for the waves x (k, waves)."""
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
