"""The Inception Score of splits of images, from sums that can be merged over batches and ranks.

With the classifier's p(y | x) for each image x, the score of a split is (Salimans et al. 2016)

    exp mean_x KL(p(y | x) || p(y)) = exp(H[p(y)] - mean_x H[p(y | x)])

It ranges from 1, if all p(y | x) are equal, to the number of classes. It needs three sums over images: their number,
p(y | x), and the entropy of p(y | x). Smaller splits have lower scores, so a smaller last split is ignored.

`InceptionScore.of` computes the sums of a batch, `+` merges them, and `value` returns the score.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor


@dataclass(frozen=True)
class InceptionScore:
    """The sums of s splits over k classes.

    count: the number of images.
    entropy: the sum of H[p(y | x)], in nats.
    mass: the sum of p(y | x).
    """

    count: Float64[Tensor, " s"]
    entropy: Float64[Tensor, " s"]
    mass: Float64[Tensor, "s k"]

    @classmethod
    def of(
        cls, logits: Float[Tensor, "n k"], index: Int64[Tensor, " n"], *, size: int, splits: int
    ) -> "InceptionScore":
        """Compute the sums of images with these logits and numbers `index` in [0, size * splits).

        Each split has `size` images with consecutive numbers.
        """
        p = logits.double().softmax(1)
        membership = torch.nn.functional.one_hot(index.to(p.device) // size, splits).T.double()  # (s, n)
        return cls(membership.sum(1), membership @ torch.special.entr(p).sum(1), membership @ p)

    def __add__(self, other: "InceptionScore") -> "InceptionScore":
        """Return the sums over both sets of images."""
        return InceptionScore(self.count + other.count, self.entropy + other.entropy, self.mass + other.mass)

    def value(self) -> tuple[float, float | None]:
        """Return the mean score over the full splits, and its population sd (divided by n, not n - 1).

        The sd is None if there is only one full split. At least one split must have images.
        """
        is_full = self.count == self.count.max()
        count = self.count[is_full]
        marginal_entropy = torch.special.entr(self.mass[is_full] / count[:, None]).sum(1)
        scores = (marginal_entropy - self.entropy[is_full] / count).exp()
        sd = scores.std(correction=0).item() if len(scores) > 1 else None
        return scores.mean().item(), sd
