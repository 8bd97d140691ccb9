"""Log-likelihoods of flows whose density is known, by the velocity and its divergence."""

from math import log, pi

import pytest
import torch
from torch import Tensor

from dumo.flow.divergence import axes, diagonal, divergence
from dumo.flow.path import Linear, Path, Trig
from dumo.random import stream
from dumo.sampling.likelihood import log_likelihood, signs
from dumo.sampling.solver import Euler, Heun, Hop, Restart
from dumo.types import Reads, UserError
from theory.exact import D, Mixture, OnTrig, opaque, plane

N = 48
FLOW = plane()


def density(flow: Mixture, x: Tensor, c: Tensor) -> Tensor:
    """log p(x | c) of the mixture itself."""
    off = (x[:, None] - flow.mean) / flow.std
    parts = -(off**2 / 2 + flow.std.log() + log(2 * pi) / 2).sum(-1) + flow.weight[c].log()
    return parts.logsumexp(1)


def reads(flow: Mixture | OnTrig) -> Reads:
    return Reads(velocity=lambda x, t, c: opaque(lambda x, t: flow.velocity(x, c, t), x, t))


def data(n: int = N) -> tuple[Tensor, Tensor]:
    c = torch.arange(n) % FLOW.classes
    return FLOW.data(c, stream("data")), c


@pytest.mark.parametrize("path", [Linear(), Trig(), Linear(sd=2.0)], ids=["linear", "trig", "scaled"])
def test_the_flow_knows_its_density(path: Path) -> None:
    """In units of the data, whatever the net's are."""
    flow = OnTrig(FLOW) if path.kind == "trig" else FLOW
    x, c = data()
    found = log_likelihood(reads(flow), path, Heun(), path.sd * x, c, 300, axes(x))
    assert (found - density(FLOW, x, c) + 2 * log(path.sd)).abs().max() < 1e-3
