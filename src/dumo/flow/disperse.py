"""Dispersive loss (Wang and He 2025, arXiv 2506.09027): what a net makes of its samples inside is to lie apart.

Contrastive learning pulls pairs together and pushes all else apart. The regression of a flow does the first, so the
second is left: with h_i what a block in the middle made of row i, of n rows that belong together,

    log mean_ij exp(-d_ij / tau),        d_ij = mean square of h_i - h_j        (InfoNCE, l2, without positives)

which is 0 where all h are one and, the further they are apart, the lower, down to -log n.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import lcm, log
from typing import Annotated

import torch
from pydantic import Field

from dumo.types import Array, Needs, PerSample, Spec, Terms


class Disperse(Spec):
    """So many neighbouring rows of the global batch are pushed apart, whatever the cuts: ranks give what one gives."""

    weight: float = Field(default=0.5, gt=0)  # its lambda
    tau: float = Field(default=0.5, gt=0)  # its temperature
    after: float = Field(default=0.25, gt=0, le=1)  # the share of the blocks that h has behind it: its best, of SiT
    group: int = Field(default=16, ge=2)  # rows; ours, its are all of a device

    def __call__(self, h: Array) -> PerSample:
        """The loss of each row, that of its group, for h (b, ...). Raises ValueError where rows are no whole groups."""
        if len(h) % self.group:
            raise ValueError(f"{len(h)} rows are no whole groups of {self.group}")
        rows = h.flatten(1).unflatten(0, (-1, self.group))
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        d = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square() / rows.shape[2]
        found = (-d / self.tau).flatten(1).logsumexp(1) - 2 * log(self.group)
        return found.repeat_interleave(self.group)


Dispersed = Annotated[Disperse | None, Field(exclude_if=lambda disperse: disperse is None)]


def looking(needs: Needs, disperse: Disperse | None) -> Needs:
    """Needs, and that the net shows what is inside, where this is to be dispersed."""
    return needs if disperse is None else replace(needs, inside=disperse.after, group=lcm(needs.group, disperse.group))


def dispersed(terms: Terms, disperse: Disperse | None, answers: Sequence[Array]) -> Terms:
    """Terms, and in the loss and the notes the dispersion of the net's last answer; as they are for None."""
    if disperse is None:
        return terms
    loss = disperse(answers[-1])
    return Terms(terms.loss + disperse.weight * loss, terms.parts, {**terms.notes, "dispersion": loss.detach()})
