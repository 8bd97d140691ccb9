"""Guided objectives take V(c) of rows with r = t from the training pass of these rows: the same loss, fewer passes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.case import name
from dumo.flow import dropout
from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope
from dumo.flow.times import Jumps, Pair
from dumo.objectives import AlphaFlow, ImprovedMeanFlow, MeanFlow, SoFlow, TwinFlow
from dumo.testing.network import CountedNet
from dumo.types import Frozen, Heads, NoisyBatch, Objective
from theory.exact import drawn
from theory.formula import Polynomial, gradients

GUIDES = [Guide(zeta=0.5), Guide(omega=0.2, zeta=0.92, interval=Interval(low=0.1, high=0.75))]
OBJECTIVES: list[Objective] = [
    *(MeanFlow(slope=slope, drop=0.3) for slope in (CentralSlope(), DualSlope(), JvpSlope())),
    MeanFlow(slope=DualSlope(), drop=0.3, times=Jumps()),
    SoFlow(drop=0.3),
    AlphaFlow(slope=DualSlope(), drop=0.3),
    ImprovedMeanFlow(slope=DualSlope(), drop=0.3),
    ImprovedMeanFlow(slope=DualSlope(), drop=0.3, w=None),
]
PROGRESS = [0.0, 0.7, 1.0]  # in which alpha is 1, between and 0


class Masked(Polynomial):
    """The polynomial, each row multiplied by its knobs and by a number of its dropout key."""

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor | None = None, **knobs: Tensor) -> Heads:  # pyright: ignore[reportIncompatibleMethodOverride]
        keys = dropout.current(len(t))
        factor = torch.ones_like(t) if keys is None else 1 + keys[:, 0].to(t) / 2**32
        for number, knob in enumerate(knobs.values()):
            factor = factor * (1 + knob / (2 + number))
        return tuple(factor[:, None] * head for head in super().forward(x, c, t=t, r=r))


class CountedRows(CountedNet):
    """Notes the number of rows of each pass, and whether it has gradients."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__(net)
        self.passes: list[tuple[int, bool]] = []

    def forward(self, x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        """A pass of the network."""
        self.passes.append((len(inputs["t"]), torch.is_grad_enabled()))
        return super().forward(x, c, **inputs)


def loss_and_gradients(objective: Objective, b: NoisyBatch, ref: Polynomial | None = None) -> list[Tensor]:
    """The loss of each row of a network with dropout, and its gradients."""
    net = Masked(len(objective.needs.heads))
    with dropout.using(dropout.keys(0, 0, len(b.t))):
        terms = objective.loss(net, Frozen(ref or net), b)
    return [terms.loss, *gradients(terms.loss, net)]


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_the_loss_is_that_of_passes_of_its_own(objective: Objective, progress: float, guide: Guide) -> None:
    """An equal copy of the network as theta^- is asked for V(c) on all guided rows."""
    if not isinstance(objective, ImprovedMeanFlow):
        objective = objective.model_copy(update={"guide": guide})
    b = replace(drawn(objective, 32), progress=progress)
    assert b.moving is not None
    shared, separate = (
        loss_and_gradients(objective, b),
        loss_and_gradients(objective, b, Masked(len(objective.needs.heads))),
    )
    for one, other in zip(shared, separate, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_velocities_of_rows_at_rest_are_shared_by_imf() -> None:
    """Of 16 rows eight jump: V takes eight passes of its own, in place of 16."""
    objective = ImprovedMeanFlow(slope=DualSlope(), drop=0.0, w=None)
    b = drawn(objective, 16)
    assert rows_of_passes(objective, b, heads=2) == ([8, 8], [8])
    assert rows_of_passes(objective, b, own=False, heads=2) == ([16], [16, 8])


def rows_of_passes(
    objective: Objective, b: NoisyBatch, *, own: bool = True, heads: int = 1
) -> tuple[list[int], list[int]]:
    """The rows of the passes with gradients and without; theta^- is the network itself, or a copy."""
    net = CountedRows(Polynomial(heads))
    ref = net if own else CountedRows(Polynomial(heads))
    objective.loss(net, Frozen(ref), b)
    made = [*net.passes, *(ref.passes if not own else [])]
    return [n for n, graded in made if graded], [n for n, graded in made if not graded]


def test_rows_at_rest_make_one_pass() -> None:
    """Of 16 rows four jump. Without sharing V(c) takes all 16; V(null) takes them still, and the derivative rides."""
    objective = MeanFlow(guide=Guide(zeta=0.5), slope=DualSlope(), drop=0.0)
    b = drawn(objective, 16)
    assert rows_of_passes(objective, b) == ([12, 4], [4, 16])
    assert rows_of_passes(objective, b, own=False) == ([16], [16, 16, 4])
    assert rows_of_passes(objective.model_copy(update={"guide": Guide()}), b) == ([4, 12], [])
    assert rows_of_passes(SoFlow(drop=0.0), b) == ([16], [4, 16, 4])


def test_rows_that_no_guide_needs_make_no_pass_but_one() -> None:
    """Of rows that jump, only those inside the interval; one if there is none, as on every rank."""
    objective = MeanFlow(guide=GUIDES[1], slope=DualSlope(), drop=0.0, times=Pair(velocity_ratio=0.5))
    b = drawn(objective, 16)
    assert b.moving is not None
    moving, inside = torch.tensor(b.moving), GUIDES[1].inside(b.t)
    assert 0 < (moving & inside).sum() < moving.sum()
    assert rows_of_passes(objective, b)[1] == [(moving & inside).sum(), inside.sum()]
    late = replace(b, t=torch.where(moving, 0.9, b.t), r=torch.where(moving, 0.1, b.r))
    assert rows_of_passes(objective, late)[1] == [1, (~moving & inside).sum()]


def test_twinflow_shares_the_velocity_of_every_row() -> None:
    """Only if theta^- is the network itself. The jump from noise is at another time."""
    objective = TwinFlow(order=1, drop=0.3)
    b = drawn(objective, 16)
    shared, separate = (loss_and_gradients(objective, b, ref) for ref in (None, Masked(1)))
    for one, other in zip(shared, separate, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    guided = int(b.kept.sum())
    assert rows_of_passes(objective, b)[1] == [guided, 16, guided, guided, 16, 16, 16]
    assert rows_of_passes(objective, b, own=False)[1] == [16, 16, guided, guided, 16, guided, guided, 16]


def test_it_takes_no_number_from_the_device() -> None:
    """If times are not on the host, the rows are those that their places tell."""
    objective = MeanFlow(guide=GUIDES[1], slope=DualSlope(), drop=0.0)
    b = drawn(objective, 16)
    with torch.device("meta"):
        net = CountedRows(Polynomial(1)).to("meta")
    names = ("x", "z", "t", "r", "x_t", "v_t", "c", "null", "kept")
    objective.loss(net, Frozen(net), replace(b, **{name: getattr(b, name).to("meta") for name in names}))
    assert [n for n, _ in net.passes] == [12, 4, 16, 4]
