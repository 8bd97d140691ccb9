"""The Inception Score of splits of images, from sums that can be merged over batches and ranks.

Of one split, with the classifier's p(y | x) of each image x (Salimans et al. 2016):

    exp mean_x KL(p(y | x) || p(y)) = exp(H[p(y)] - mean_x H[p(y | x)])

It goes from 1, where all answers are alike, to the number of classes. It needs three sums: how many images, their
p(y | x), and their entropies. A split of fewer images scores less: its size is part of the measure, and a last split
that is smaller does not count.

`InceptionScore.of` computes the sums of a batch, `+` merges them, and `value` is the score.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


@dataclass(frozen=True)
class InceptionScore:
    """The sums of s splits over k classes; only the splits that have the most images count."""

    count: Float64[Tensor, " s"]  # images
    entropy: Float64[Tensor, " s"]  # sum of H[p(y | x)], in nats
    mass: Float64[Tensor, "s k"]  # sum of p(y | x)

    @classmethod
    def of(
        cls, logits: Float[Tensor, "n k"], index: Int64[Tensor, " n"], *, size: int, splits: int
    ) -> "InceptionScore":
        """The sums of images with these logits and numbers `index` in [0, size * splits).

        A split is `size` images with consecutive numbers.
        """
        p = logits.double().softmax(1)
        membership = torch.nn.functional.one_hot(index.to(p.device) // size, splits).T.double()  # (s, n)
        return cls(membership.sum(1), membership @ torch.special.entr(p).sum(1), membership @ p)

    def __add__(self, other: "InceptionScore") -> "InceptionScore":
        """The sums over both sets of images."""
        return InceptionScore(self.count + other.count, self.entropy + other.entropy, self.mass + other.mass)

    def value(self) -> tuple[float, float | None]:
        """The mean of the score over the full splits, and its sd over them as a whole population (over n, not n - 1).

        The sd is None where only one split counts. At least one split must have images.
        """
        is_full = self.count == self.count.max()
        count = self.count[is_full]
        marginal_entropy = torch.special.entr(self.mass[is_full] / count[:, None]).sum(1)
        scores = (marginal_entropy - self.entropy[is_full] / count).exp()
        sd = scores.std(correction=0).item() if len(scores) > 1 else None
        return scores.mean().item(), sd
