"""What the paper claims of its method and can be checked without training (arXiv 2602.17682)."""

import pytest
import torch
from torch import nn

from dumo.flow.guide import Guide
from dumo.flow.noisy_batch import draw
from dumo.flow.path import Linear
from dumo.flow.slope import CentralSlope
from dumo.flow.times import Pair
from dumo.nets import MLP, DiT
from dumo.objectives import DuMo, MeanFlow
from dumo.run.flops import forward_units
from dumo.runtime.random import stream
from dumo.types import Objective, frozen

LATENT = (4, 32, 32)  # SD-VAE at 256 x 256


def xl2(objective: Objective) -> nn.Module:
    """DiT-XL/2 for ImageNet-256 latents, without memory for its weights."""
    with torch.device("meta"):
        return DiT().build(objective.needs, LATENT, 1000)


def passes(objective: Objective) -> tuple[int, int]:
    """Passes with and without gradients that a step makes."""
    net, made = MLP(width=8, depth=1).build(objective.needs, (2,), 3), list[bool]()
    net.register_forward_hook(lambda *_: made.append(torch.is_grad_enabled()))
    x, c = torch.randn(4, 2, generator=stream("passes")), torch.zeros(4, dtype=torch.long)
    objective.loss(net, frozen(net), draw(objective, Linear(), x, c, torch.full_like(c, 3), seed=0, step=0))
    return sum(made), len(made) - sum(made)


def test_second_head_costs_less_than_half_a_percent() -> None:
    """Sec. 3.3: about 3 M more parameters than 675 M."""
    both = sum(p.numel() for p in xl2(DuMo()).parameters())
    one = both - sum(p.numel() for name, p in xl2(DuMo()).named_parameters() if name.startswith("heads.u"))
    assert pytest.approx(one, rel=1e-3) == 675e6
    assert 0.003 < both / one - 1 < 0.005


def test_passes_of_a_step() -> None:
    """Sec. 3.3: 1 pass with gradients and 3 without, against MeanFlow's 1 and 4 without a JVP, on rows that jump."""
    assert passes(DuMo()) == (1, 3)
    assert passes(MeanFlow(slope=CentralSlope(), times=Pair(velocity_ratio=0))) == (1, 4)


@pytest.mark.slow
def test_step_is_an_eighth_cheaper_than_meanflow() -> None:
    """Sec. 4.4 measures 12.6 % more steps per second on XL; counted it is 7 / 6, where all rows pay for all passes.

    Here they do not: no pass is made for rows that need none.
    """
    every_row = {"times": Pair(velocity_ratio=0), "guide": Guide(omega=0.2, zeta=0.92)}
    dumo, meanflow = DuMo(drop=0), MeanFlow(slope=CentralSlope(), drop=0, **every_row)
    ratio = forward_units(xl2(meanflow), meanflow, Linear(), LATENT) / forward_units(xl2(dumo), dumo, Linear(), LATENT)
    assert ratio == pytest.approx(7 / 6, rel=1e-3)


def test_defaults_are_the_first_row_of_table_3() -> None:
    objective = DuMo()
    assert (objective.times.a, objective.times.b) == (2.4, 2.4)
    assert (objective.beta, objective.guide.zeta) == (0.7, 0.55)
