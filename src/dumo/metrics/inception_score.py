"""The Inception Score of a stream of logits, in sums that can be merged.

With p(y | x) the classifier's softmax and p(y) its mean over a split of the images, the score of the split is

    exp mean_x KL(p(y | x) || p(y)) = exp(H[p(y)] - mean_x H[p(y | x)])         (Salimans et al. 2016),

from 1 (all answers alike) to the number of classes (sure of each image, and all classes alike often). So a split needs
three sums only: how many images, their p(y | x), and their entropies. An image belongs to a split by its number, so
the score does not depend on batches or ranks. A split of fewer images scores less: the size is part of the measure.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from dumo.types import UserError


@dataclass(frozen=True)
class Score:
    """The sums of s splits over k classes; splits without images do not count."""

    count: Float64[Tensor, " s"]
    entropy: Float64[Tensor, " s"]  # sum of H[p(y | x)], in nats
    mass: Float64[Tensor, "s k"]  # sum of p(y | x)

    @classmethod
    def of(cls, logits: Float[Tensor, "n k"], index: Int64[Tensor, " n"], *, size: int, splits: int) -> "Score":
        """The sums of images numbered `index` in [0, size * splits), in splits of `size` images in a row."""
        p = logits.double().softmax(1)
        share = torch.nn.functional.one_hot(index.to(p.device) // size, splits).T.double()
        return cls(share.sum(1), share @ torch.special.entr(p).sum(1), share @ p)

    def __add__(self, other: "Score") -> "Score":
        """The sums over both sets of images."""
        return Score(self.count + other.count, self.entropy + other.entropy, self.mass + other.mass)

    def value(self) -> tuple[float, float]:
        """Mean and sd over the splits, the sd that of these splits themselves. Raises `UserError` without images."""
        full = self.count > 0
        if not full.any():
            raise UserError("an Inception Score of no images: give samples")
        count = self.count[full]
        marginal = torch.special.entr(self.mass[full] / count[:, None]).sum(1)
        scores = (marginal - self.entropy[full] / count).exp()
        return scores.mean().item(), scores.std(correction=0).item()
