"""Which noise goes with which data: paths that cross less, so that one velocity can follow them.

Among rows of one class, in groups of fixed places, noises change places so that the sum of squared distances between
data and noise is the least: optimal transport of a minibatch (Pooladian et al. 2023; Tong et al. 2024). The noises stay
the same, so x, z and the class keep their laws, and z stays independent of the class; that of x and z together is
another, and so is the flow, which still carries N(0, I) to the data.
"""

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from dumo.runtime.bound import ROWS
from dumo.types import Cond, Sample, Spec


class Coupling(Spec):
    """Optimal transport within a class, in groups of `group` neighbouring rows of the batch."""

    group: int = Field(ge=2, le=ROWS)  # the larger, the straighter; its cube is what it costs, per class

    def __call__(self, x: Sample, z: Sample, c: Cond) -> Sample:
        """The noises z in the order in which they go with x, of classes c before any is dropped; of whole groups.

        Found on the CPU, so a GPU is waited for. Where a number is not finite nothing is moved.
        """
        there = torch.unique(c.cpu(), dim=0, return_inverse=True)[1]
        data, noise = (side.detach().cpu().double().flatten(1) for side in (x, z))
        order = torch.arange(len(z))
        for group in order.clone().split(self.group):
            for k in there[group].unique():
                rows = group[there[group] == k]
                order[rows] = rows[assigned(data[rows], noise[rows])]
        return z[order.to(z.device)]


def assigned(x: Tensor, z: Tensor) -> Int64[Tensor, " n"]:
    """For each row of x the row of z that goes with it, by scipy."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    cost = torch.cdist(x, z).square()
    if not cost.isfinite().all():
        return torch.arange(len(x))
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
