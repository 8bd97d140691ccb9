"""Weights of the parts of a loss: lines over the training, and variances that are learned."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dumo.flow.guide import Guide
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.flow.times import Pair
from dumo.flow.weight import Line
from dumo.objectives import Several
from dumo.objectives.part import AveragePart, EndpointPart, ShortcutPart, VelocityPart
from dumo.types import Frozen, Heads
from theory.exact import APART, D, Exact, gradient, record
from theory.formula import Polynomial, rows

TIMES = Pair(velocity_ratio=0.25)
LINE = Line(first=0.9, last=0.3, over=0.5)
PARTS = (VelocityPart(), EndpointPart(), AveragePart(power=0.5), ShortcutPart(name="s"))
LEARNED = tuple(part.model_copy(update={"variance": True}) for part in PARTS)
SEVERAL = Several(parts=LEARNED, times=TIMES, slope=DualSlope())


class Gauged(Polynomial):
    """The polynomial, and for each of its heads the same gauge a + b t."""

    def __init__(self, heads: int) -> None:
        super().__init__(heads)
        self.gauge = torch.nn.Parameter(torch.tensor([0.3, -0.8], dtype=D))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor | None = None) -> Heads:
        heads = super().forward(x, c, t=t)
        return *heads, *(self.gauge[0] + self.gauge[1] * t for _ in heads)


class Chosen(torch.nn.Module):
    """A net of which so many gauges are asked."""

    def __init__(self, net: Gauged, gauges: int) -> None:
        super().__init__()
        self.net, self.gauges = net, gauges

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        answers = self.net(x, c, **inputs)
        return answers[: len(answers) // 2 + self.gauges]


class Doubtful(Exact):
    """An exact net whose gauges depend on the time."""

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, **inputs: Tensor) -> Heads:
        answers = super().forward(x, c, t=t, **inputs)
        n = len(self.needs.heads)
        return *answers[:n], *(gauge + 2 - 5 * torch.linspace(0, 1, len(gauge), dtype=D) for gauge in answers[n:])


@pytest.mark.parametrize(("progress", "beta"), [(0.0, 0.9), (0.25, 0.6), (0.5, 0.3), (1.0, 0.3)])
def test_a_line_is_its_number_at_every_progress(progress: float, beta: float) -> None:
    assert LINE.at(progress) == pytest.approx(beta, abs=1e-15)
    found: list[Tensor] = []
    for weight in (LINE, LINE.at(progress)):
        objective = Several(parts=(VelocityPart(weight=weight), EndpointPart()), slope=JvpSlope())
        net, b = Polynomial(2), replace(rows(objective), progress=progress)
        found.append(objective.loss(net, Frozen(net), b).loss)
    assert torch.equal(*found)


def test_a_learned_variance_leaves_the_flow_at_rest() -> None:
    """It may be any number of a row that its residual has no part in: the target of the row is a mean."""
    objective = SEVERAL.model_copy(update={"guide": Guide()})
    assert gradient(objective, Doubtful(APART, objective.needs), record(objective, APART)).abs().max() < 1e-12


@pytest.mark.parametrize("both", [True, False], ids=["v and u", "u"])
def test_the_loss_is_divided_by_the_variance(both: bool) -> None:
    objective = Several(parts=(LEARNED[0] if both else PARTS[0], LEARNED[1]), slope=JvpSlope())
    net, b = Gauged(2), rows(objective)
    net_of = Chosen(net, 2 if both else 1)
    w, terms = net.gauge[0] + net.gauge[1] * b.t, objective.loss(net_of, Frozen(net_of), b)
    v, u = terms.parts["v"], terms.parts["u"]
    v_part = v / w.exp() + w if both else v
    assert torch.allclose(terms.loss, 0.7 * v_part + 0.15 * (u / w.exp() + w), rtol=1e-12)
    assert torch.equal(terms.notes["log_variance_u"], w.detach())


def test_the_variance_settles_at_the_mean_of_what_it_divides() -> None:
    objective = Several(parts=LEARNED[1:2] + PARTS[:1], slope=JvpSlope())
    net, b = Gauged(2), rows(objective)
    net_of = Chosen(net, 1)

    def pull(log_variance: Tensor) -> float:
        net.gauge.data = torch.stack([log_variance, 0 * log_variance])
        (slope,) = torch.autograd.grad(objective.loss(net_of, Frozen(net_of), b).loss.mean(), [net.gauge])
        return slope[0].item()

    settled = objective.loss(net_of, Frozen(net_of), b).parts["u"].mean().log().detach()
    assert pull(settled) == pytest.approx(0, abs=1e-12)
    assert pull(settled + 1) > 0.05
    assert pull(settled - 1) < -0.05
