"""DuMo and Drifting (Deng et al. 2026, arXiv 2602.04770): samples drift to data of their condition, and apart.

Of the rows of a class in a group, sample x_i is drawn to data y_j and held apart from other samples x_k. With d the
distance from x_i, in units of its mean, and a radius R:

    A = sqrt(softmax over what i sees * softmax over who sees it),    both of exp(-d / R)     (1)
    V_i = sum over j, k of   A+_ij A-_ik (y_j - x_k)                                          (2)

with A+ to data and A- to samples. V changes its sign when data and samples change places: where both have one
distribution, it is 0 on average. The V of each radius is divided by its root mean square over the rows of the class,
and they are added.

With guidance omega > 1 samples are apart from data of any class, too: these weigh omega - 1 times as much in all as
other samples do, and where V rests, samples have the density omega p(x | c) - (omega - 1) p(x).

As the authors' `drift_loss.py` but for six things:

- Theirs compares features of a pretrained net; ours what the net is trained on, pixels or latents.
- A sample of theirs sees the data of its own row, ours does not: so as many rows attract as repel, and where the
  samples are the data themselves V is 0 to rounding, not on average.
- What a sample does not see has affinity 0 here; theirs gives it the least with itself.
- Of several classes in a batch theirs takes one unit and one root mean square over all, ours one of each.
- V here is in units of the data, not of the distance.
- Their net is shown the strength of guidance, which they draw; ours learns one.
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

WEIGHT = 0.05  # of the pull; ours
RADII = 0.02, 0.05, 0.2  # R, in units of the mean distance; theirs
AFFINITY = 1e-6  # the least product of both softmaxes; theirs
LEAST = 1e-4  # of a root mean square that is divided by (their code, as its square)
FAR = -1e4  # the logarithm of a kernel between rows that do not see one another

# Of each of m samples with its k neighbours: first those that it is held apart from, then the data of its class.
Pairs = Float[Tensor, "groups m k"]


class Drift(Pull):
    """DuMo and the drift of its samples, which needs no head of its own."""

    after: ClassVar[float] = 0.0  # it does most in a second stage, in large batches (docs/log.md)
    kind: Literal["drift"] = "drift"
    size: int = Field(default=64, ge=2)  # rows of a group, which should have some 25 of each class; theirs 64 of one
    omega: float = Field(default=1.0, ge=1)  # of guidance; theirs: drawn from 1 to 4 by omega^-3

    @property
    def needs(self) -> Needs:
        """The needs of `Pull`, and the rows that belong together, whose samples are compared with their data."""
        return replace(super().needs, group=self.size, compares_rows=True)

    def pull(self, net: Net, b: NoisyBatch, u: Sample) -> Terms:
        """The drift towards the data. It makes no pass of the net; the note `force` tells how far samples are off."""
        v, force = drift((b.z - u).detach(), b.x, b.c, RADII, self.size, self.omega)
        return Terms(WEIGHT * mean_square(descent_error(u, v)), {}, {"force": force})


@torch.no_grad()
def drift(
    x: Sample, y: Sample, c: Cond, radii: Sequence[float], group: int, omega: float = 1.0
) -> tuple[Sample, PerSample]:
    """The drift V (2) of samples x (b, ...) towards data y, summed over radii, shaped like x; and its force, (b,).

    The V of each radius is divided by its root mean square over the rows of the class. The force is this root mean
    square, of the row's class, in mean over radii: 0 where samples and data agree. The batch is cut into groups of
    `group` rows. In a group, rows of the same c see one another; with omega > 1 they see all data of the group, too.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    samples = x.to(exact).flatten(1).unflatten(0, (-1, group))
    data = y.to(exact).flatten(1).unflatten(0, (-1, group))
    same_class = _same_class(c, group).to(exact)
    not_itself = 1 - torch.eye(group, dtype=exact, device=x.device)
    class_weight = same_class * not_itself  # 1 for the other rows of the class

    # What a sample is held apart from: other samples of its class and, with guidance, other data of any class.
    repelling = [samples]
    repelling_weights = [class_weight]
    if omega > 1:
        repelling.append(data)
        repelling_weights.append((omega - 1) * class_weight.mean(2, keepdim=True) * group / (group - 1) * not_itself)
    # Then what it is drawn to: other data of its class.
    neighbour = torch.cat([*repelling, data], 1)
    weight = torch.cat([*repelling_weights, class_weight], 2)

    distance = torch.cdist(samples, neighbour, compute_mode="donot_use_mm_for_euclid_dist")
    total_weight = (same_class @ weight.sum(2, keepdim=True)).clamp(min=1)
    unit = (same_class @ (distance * weight).sum(2, keepdim=True)) / total_weight  # the mean distance in the class
    unit = unit.clamp(min=LEAST)

    v = torch.zeros_like(samples)
    force = torch.zeros_like(unit)
    for radius in radii:
        v_radius = _drift_by_radius(distance / unit / radius, weight, same_class, neighbour)
        v_radius = v_radius / unit * samples.shape[2] ** 0.5
        rms = (same_class @ v_radius.square().mean(2, keepdim=True) / same_class.sum(2, keepdim=True)).sqrt()
        v = v + v_radius / rms.clamp(min=LEAST)
        force = force + rms / len(radii)
    return v.flatten(0, 1).view(x.shape).to(x.dtype), force.flatten()


def _same_class(c: Cond, group: int) -> Bool[Tensor, "groups m m"]:
    """For each pair of rows in a group, whether both have the same condition."""
    columns = c.flatten(1) if c.ndim > 1 else c[:, None]
    rows = columns.unflatten(0, (-1, group))
    return (rows[:, :, None] == rows[:, None]).all(-1)


def _drift_by_radius(
    scaled_distance: Pairs,
    weight: Pairs,
    same_class: Float[Tensor, "groups m m"],
    neighbour: Float[Tensor, "groups k d"],
) -> Float[Tensor, "groups m d"]:
    """V of each sample by one radius, from the distances d / R."""
    logits = (-scaled_distance).masked_fill(weight == 0, FAR)
    a = (logits.softmax(2) * _column_softmax(logits, same_class)).clamp(min=AFFINITY).sqrt() * weight  # (1)
    repel, attract = a.split([a.shape[2] - a.shape[1], a.shape[1]], 2)
    pull = attract * repel.sum(2, keepdim=True)
    push = repel * attract.sum(2, keepdim=True)
    return torch.cat([-push, pull], 2) @ neighbour  # (2); coefficients of a row sum to 0


def _column_softmax(logits: Pairs, same_class: Float[Tensor, "groups m m"]) -> Pairs:
    """The softmax of each column over the rows of one condition."""
    first_row = same_class.argmax(2, keepdim=True).expand_as(logits)  # represents the rows of its condition
    largest = torch.full_like(logits, FAR).scatter_reduce(1, first_row, logits, "amax").gather(1, first_row)
    e = (logits - largest).exp()
    return e / (same_class @ e)
