"""What a run is asked now and then: do the parts of its loss pull the net the same way, and do its heads agree?

A step of length h down the gradient g_a of part a changes part b by -h |g_b| cos(g_a, g_b) to first order. So a cosine
of 1 says that what serves one part serves the other, 0 that they do not touch, and one below 0 that each undoes some
of the other's work. App. D of the paper claims that velocity and flow map do not conflict: this is the number to ask.

Along the exact flow the endpoint rests. That of DuMo is x_t - t u, and moves by v - (u + t du/dt). So the drift of the
endpoint along the net's own velocity is how far its two readings are from being of one flow.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from dumo import dist
from dumo.training.layout import whole
from dumo.types import Noised, Reads, Terms, mean_square

Gradient = list[Tensor | None]  # by parameter
H = 0.005  # half-step of the difference, as `dumo.flow.slope.CentralSlope`


@dataclass(frozen=True)
class Probe:
    """The gradients of the parts' means over the parameters that every part reaches, the trunk; and the drift."""

    norms: dict[str, float]  # by part, its weight in the loss left out
    cosines: dict[str, float]  # by two parts, as "v,u", in [-1, 1] to rounding; nan where no parameter is shared
    drift: float | None  # mean square of d/dt of the endpoint along the velocity; None where one is not to be read


def ask(net: nn.Module, reads: Reads, parts: Iterable[str], b: Noised, loss: Callable[[], Terms]) -> Probe | None:
    """Probe a net on these rows, of which `loss()` is the loss; None where there is nothing to compare.

    Each of two parts or more costs a loss and a backward pass, the drift three passes. Weights and buffers stay as they
    are, gradients that the parameters hold are dropped. All ranks must ask together; the answer is of all their rows.
    """
    kept = [(buffer, buffer.clone()) for buffer in net.buffers()]
    norms, cosines = compare(net, parts, loss)
    moved = drift(reads, b)
    for buffer, old in kept:
        buffer.copy_(old)
    return Probe(norms, cosines, moved) if cosines or moved is not None else None


def compare(
    net: nn.Module, parts: Iterable[str], loss: Callable[[], Terms]
) -> tuple[dict[str, float], dict[str, float]]:
    """Norms and cosines of the gradients, as `Probe` has them; of a single part, none."""
    names = list(parts)
    if len(names) < 2:
        return {}, {}
    found = [gradient(net, name, loss) for name in names]
    net.zero_grad()
    shared = [row for row in zip(*found, strict=True) if all(g is not None and number(g.abs().sum()) for g in row)]

    def product(i: int, j: int) -> float:
        return math.fsum(number((row[i] * row[j]).sum()) for row in shared)

    norms = [math.sqrt(product(i, i)) for i in range(len(names))]
    cosines = {
        f"{names[i]},{names[j]}": product(i, j) / (norms[i] * norms[j]) if shared else math.nan
        for i, j in combinations(range(len(names)), 2)
    }
    return dict(zip(names, norms, strict=True)), cosines


def gradient(net: nn.Module, part: str, loss: Callable[[], Terms]) -> Gradient:
    """Of the mean of one part of a loss, zero where it is of others alone; the net's wrapper takes means over ranks."""
    net.zero_grad()
    terms = loss()
    (terms.parts[part].mean() + 0 * terms.loss.mean()).backward()  # all parameters: a replicated net waits for each
    return [p.grad for p in net.parameters()]


def number(x: Tensor) -> float:
    """A tensor of one number as that number; of a sharded tensor, as the sum of its shards."""
    return whole(x).item()


@torch.no_grad()
def drift(reads: Reads, b: Noised) -> float | None:
    """As `Probe` has it, by a central difference, so for time_scale <= 10; nothing is dropped out."""
    if reads.velocity is None or reads.endpoint is None:
        return None
    v = reads.velocity(b.x_t, b.t, b.c)
    behind, ahead = (reads.endpoint(b.x_t + h * v, b.t + h, b.c) for h in (-H, H))
    return dist.mean(mean_square((ahead - behind) / (2 * H)).mean()).item()
