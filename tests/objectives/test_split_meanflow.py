"""SplitMeanFlow: its formula by hand, what its rows learn from, and what a step of training costs."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from contract.case import Counted, step
from dumo.flow.times import Pair
from dumo.objectives import SplitMeanFlow
from dumo.types import Noised
from theory.exact import Exact, column, drawn, gaussian, record
from theory.formula import Polynomial, agree, half, rows


def by_hand(ref: Polynomial, b: Noised) -> Tensor:
    """u* of every row: of the two parts where r < t, else v_t."""
    lam = b.drawn["lam"].to(b.t)
    s = b.t - lam * (b.t - b.r)
    (first,) = ref(b.x_t, b.c, t=b.t, r=s)
    (second,) = ref(b.x_t - column(b.t - s) * first, b.c, t=s, r=b.r)
    parts = (column(b.t - s) * first + column(s - b.r) * second) / column((b.t - b.r).clamp(min=1e-9))
    return torch.where(column(b.r < b.t), parts, b.v_t).detach()


@pytest.mark.parametrize("known", [True, False], ids=["places", "no places"])
def test_loss_and_gradient_are_those_of_the_formula(known: bool) -> None:
    objective = SplitMeanFlow(drop=0.3)
    net, ref = Polynomial(1), Polynomial(1)
    ref.a.data = ref.a.data.roll(1) / 2
    b = drawn(objective, 24) if known else rows(objective)
    assert (b.moving is not None) == known
    (u,), u_star = net(b.x_t, b.c, t=b.t, r=b.r), by_hand(ref, b)
    loss = ((u - u_star) ** 2).sum(1) / 2
    agree(objective, net, b, loss, {"u": loss}, ref=ref, close=1e-10, clipped_share=half(u - u_star))


@pytest.mark.parametrize("low", [0.0, 0.5, 0.999])
def test_the_flow_is_at_rest_wherever_it_is_split(low: float) -> None:
    """Row by row, not only on average."""
    objective, flow = SplitMeanFlow(), gaussian()
    b = record(objective, flow, 64)
    b = replace(b, drawn={"lam": low + 1e-3 * b.drawn["lam"]})
    assert step(objective, Exact(flow, objective.needs), b).loss.max() < 1e-20


class Tally(Counted):
    """Counts rows, too."""

    rows = 0

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> tuple[Tensor, ...]:
        self.rows += len(x)
        return super().forward(x, c, **inputs)


def test_passes_are_of_the_rows_that_need_them() -> None:
    """One of all 24 rows with gradients; without, two of the half that moves."""
    objective = SplitMeanFlow(drop=0.0)
    step(objective, net := Tally(Polynomial(1)), drawn(objective, 24))
    assert (net.graded, net.still, net.rows) == (1, 2, 48)


def test_rows_that_match_the_data_are_asked_for() -> None:
    with pytest.raises(ValidationError, match="leaves no row"):
        SplitMeanFlow(times=Pair(velocity_ratio=0))
