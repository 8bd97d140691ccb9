"""DuMo and Drifting (Deng et al. 2026, arXiv 2602.04770): samples are attracted by data and repel each other.

Among the rows of a class in a group, sample x_i is attracted by data y_j and repelled by other samples x_k. With d the
distance from x_i, divided by its mean, and a radius R:

    A = sqrt(softmax over the neighbours of i * softmax over the samples),    of exp(-d / R)  (1)
    V_i = sum over j, k of   A+_ij A-_ik (y_j - x_k)                                          (2)

with A+ for data and A- for samples. V is antisymmetric in data and samples, so its mean is 0 if both have the same
distribution. The V of each radius is divided by its root mean square over the rows of the class, and they are summed.

With guidance omega > 1, data of all classes also repel samples, with omega - 1 times the total weight of other samples.
At equilibrium, samples have the density omega p(x | c) - (omega - 1) p(x).

It differs from the authors' `drift_loss.py` in six points:

- They compare features of a pretrained network; we compare pixels or latents, the data of the training.
- Their samples are attracted by the data of their own row, ours are not: the numbers of attracting and repelling rows
  are equal, and V is 0 up to rounding, not only on average, if the samples are the data.
- Masked pairs have affinity 0; theirs have the smallest affinity with themselves.
- The unit of distance and the root mean square are computed per class; theirs over all classes of a batch.
- V is in units of the data, not of the distance.
- Their network gets the guidance strength, which they draw; ours learns one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from dumo.objectives.base import Cond, Needs, Net, NoisyBatch, PerSample, Sample, Terms, descent_error, mean_square
from dumo.objectives.pull import Pull

WEIGHT = 0.05  # of the drift loss (our choice)
RADII = 0.02, 0.05, 0.2  # R, in units of the mean distance, as the authors
MIN_AFFINITY = 1e-6  # of the product of both softmaxes, as the authors
MIN_DIVISOR = 1e-4  # of distances and root mean squares (their code has its square)
MASKED_LOGIT = -1e4  # the logit of masked pairs

# A number for each of m samples and its k neighbours: first those that repel it, then the data of its class.
Pairs = Float[Tensor, "groups m k"]


class Drift(Pull):
    """DuMo's loss and the drift of its samples, without an extra head."""

    after: ClassVar[float] = 0.0  # it is most effective in a second stage with large batches (docs/log.md)
    kind: Literal["drift"] = "drift"
    # Rows of a group, which should contain about 25 rows per class; the authors use 64 rows of one class.
    size: int = Field(default=64, ge=2)
    # The guidance strength; the authors draw it from 1 to 4 with density omega^-3.
    omega: float = Field(default=1.0, ge=1)

    @property
    def needs(self) -> Needs:
        """The needs of `Pull`, and groups of rows that are compared with each other."""
        return replace(super().needs, group=self.size, compares_rows=True)

    def pull(self, net: Net, b: NoisyBatch, u: Sample) -> Terms:
        """Return the drift loss, without a pass of the network. The metric `force` is the rms of the drift."""
        v, force = drift((b.z - u).detach(), b.x, b.c, RADII, self.size, self.omega)
        return Terms(WEIGHT * mean_square(descent_error(u, v)), {}, {"force": force})


@torch.no_grad()
def drift(
    x: Sample, y: Sample, c: Cond, radii: Sequence[float], group: int, omega: float = 1.0
) -> tuple[Sample, PerSample]:
    """Return the drift V (2) of samples x (b, ...) towards data y, summed over radii, like x, and its force (b,).

    The V of each radius is divided by its root mean square over the rows of the class. The force is this root mean
    square, averaged over radii: 0 if samples and data agree. The batch is split into groups of `group` rows. In a
    group, rows of the same c interact; with omega > 1, data of all classes do.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    samples = x.to(exact).flatten(1).unflatten(0, (-1, group))
    data = y.to(exact).flatten(1).unflatten(0, (-1, group))
    same_class = _same_class(c, group).to(exact)
    not_itself = 1 - torch.eye(group, dtype=exact, device=x.device)
    class_weight = same_class * not_itself

    # The neighbours that repel a sample: other samples of its class and, with guidance, other data of any class.
    repelling = [samples]
    repelling_weights = [class_weight]
    if omega > 1:
        repelling.append(data)
        repelling_weights.append((omega - 1) * class_weight.mean(2, keepdim=True) * group / (group - 1) * not_itself)
    # The neighbours that attract it: other data of its class.
    neighbour = torch.cat([*repelling, data], 1)
    weight = torch.cat([*repelling_weights, class_weight], 2)

    distance = torch.cdist(samples, neighbour, compute_mode="donot_use_mm_for_euclid_dist")
    total_weight = (same_class @ weight.sum(2, keepdim=True)).clamp(min=1)
    # The mean distance in the class.
    unit = (same_class @ (distance * weight).sum(2, keepdim=True)) / total_weight
    unit = unit.clamp(min=MIN_DIVISOR)

    v = torch.zeros_like(samples)
    force = torch.zeros_like(unit)
    for radius in radii:
        v_radius = _drift_by_radius(distance / unit / radius, weight, same_class, neighbour)
        v_radius = v_radius / unit * samples.shape[2] ** 0.5
        rms = (same_class @ v_radius.square().mean(2, keepdim=True) / same_class.sum(2, keepdim=True)).sqrt()
        v = v + v_radius / rms.clamp(min=MIN_DIVISOR)
        force = force + rms / len(radii)
    return v.flatten(0, 1).view(x.shape).to(x.dtype), force.flatten()


def _same_class(c: Cond, group: int) -> Bool[Tensor, "groups m m"]:
    """Return whether both rows of each pair in a group have the same condition."""
    columns = c.flatten(1) if c.ndim > 1 else c[:, None]
    rows = columns.unflatten(0, (-1, group))
    return (rows[:, :, None] == rows[:, None]).all(-1)


def _drift_by_radius(
    scaled_distance: Pairs,
    weight: Pairs,
    same_class: Float[Tensor, "groups m m"],
    neighbour: Float[Tensor, "groups k d"],
) -> Float[Tensor, "groups m d"]:
    """Return V of each sample for one radius, from the distances d / R."""
    logits = (-scaled_distance).masked_fill(weight == 0, MASKED_LOGIT)
    a = (logits.softmax(2) * _column_softmax(logits, same_class)).clamp(min=MIN_AFFINITY).sqrt() * weight  # (1)
    repel, attract = a.split([a.shape[2] - a.shape[1], a.shape[1]], 2)
    pull = attract * repel.sum(2, keepdim=True)
    push = repel * attract.sum(2, keepdim=True)
    return torch.cat([-push, pull], 2) @ neighbour  # (2); coefficients of a row sum to 0


def _column_softmax(logits: Pairs, same_class: Float[Tensor, "groups m m"]) -> Pairs:
    """Return the softmax of each column over the rows of one condition."""
    # The first row of a condition stores the maximum over its rows.
    first_row = same_class.argmax(2, keepdim=True).expand_as(logits)
    largest = torch.full_like(logits, MASKED_LOGIT).scatter_reduce(1, first_row, logits, "amax").gather(1, first_row)
    e = (logits - largest).exp()
    return e / (same_class @ e)
