"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): a matrix moves by its orthogonalized momentum.

If the momentum of a matrix is U S V^T, the step is along U V^T: as far in rare directions as in common ones. Matrix
products approximate it: the odd polynomial p(s) = a s + b s^3 + c s^5, applied five times to the singular values,
brings all between about .001 and 1 to somewhere from .7 to 1.2.

`torch.optim.Muon` makes the same steps, but takes fused matrices for one, and rounds to bf16 on a CPU, too, so that a
sharded matrix makes another step than a whole one.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dumo.training.layout import laid, whole

Matrices = Float[Tensor, "parts rows columns"]

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c: Jordan et al.'s
STEPS = 5  # iterations: Jordan et al.'s
EPS = 1e-7  # theirs: the least norm that is divided by
AS_ADAMW = 0.2  # as far as AdamW moves a matrix, so that one lr serves both: Moonlight (Liu et al. 2025), Eq. 4


def orthogonal(m: Matrices) -> Matrices:
    """Each matrix with its singular values brought near 1 by Newton-Schulz iterations, in its dtype.

    Singular values below about a thousandth of a matrix's norm stay smaller.
    """
    a, b, c = COEFFICIENTS
    x = m.mT if m.shape[1] > m.shape[2] else m
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)  # so that no singular value is above 1
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if m.shape[1] > m.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices, and another optimizer for all else, as one: one list of groups, one memory.

    A group of matrices has `parts`, the number of matrices stacked in each: they are orthogonalized one by one, which
    Jordan et al. find better for queries, keys and values. A convolution's filters are rows. The momentum of a sharded
    matrix is gathered, one matrix at a time, so that the step is that of one process.
    """

    def __init__(
        self, matrices: Mapping[int, Sequence[nn.Parameter]], rest: torch.optim.Optimizer | None, **options: object
    ) -> None:
        """`matrices` by their parts; `options` are lr, momentum and weight_decay."""
        self.rest = rest
        groups = [{"params": [*params], "parts": parts, **options} for parts, params in matrices.items()]
        super().__init__([*groups, *(rest.param_groups if rest else ())], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ANN401, as torch's
        """Move all parameters that have a gradient; no closure is called."""
        for group in self.param_groups:
            for p in group["params"] if "parts" in group else ():
                if p.grad is not None:
                    self.move(p, p.grad, group)
        if self.rest:
            self.rest.state, self.rest.param_groups = self.state, [g for g in self.param_groups if "parts" not in g]
            self.rest.step()

    def move(self, p: nn.Parameter, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Move one matrix: decay, then a step along its orthogonalized momentum."""
        memory, momentum = self.state[p], group["momentum"]
        if not memory:
            memory["momentum_buffer"] = torch.zeros_like(p)
        mean = memory["momentum_buffer"].lerp_(grad, 1 - momentum)
        mean = whole(grad.lerp(mean, momentum))  # Nesterov's
        mean = mean.bfloat16() if mean.is_cuda else mean  # bf16 does (Jordan et al.)
        step = orthogonal(mean.flatten(1).unflatten(0, (group["parts"], -1)))
        far = group["lr"] * (AS_ADAMW * sqrt(max(step.shape[1:])))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(laid(step.reshape(p.shape).to(p.dtype), p), alpha=-far)
