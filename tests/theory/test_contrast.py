"""Contrast: where v comes to rest by design, what it leaves alone, and with what it cannot go."""

import pytest
import torch
from torch import Tensor, nn

from dumo.config.load import load
from dumo.flow.guide import Guide
from dumo.flow.slope import DualSlope
from dumo.flow.times import Jumps
from dumo.objectives import FlowMatching, Several
from dumo.objectives.part import AveragePart, VelocityPart
from dumo.training.cut import together
from dumo.types import Frozen, Heads, Noised, UserError
from theory.exact import D, gaussian, record

PUSH = 0.2
PLAIN = {"guide": Guide(), "drop": 0.3}
PARTS = (VelocityPart(weight=0.6, contrast=PUSH), AveragePart(weight=0.4))
OBJECTIVES = [
    FlowMatching(contrast=PUSH, **PLAIN),
    Several(parts=PARTS, times=Jumps(), slope=DualSlope(), **PLAIN),
]
each = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)


class Free(nn.Module):
    """A net that may say anything of every row."""

    def __init__(self, v: Tensor, heads: int) -> None:
        super().__init__()
        self.said = nn.ParameterList([v.clone(), *torch.zeros(heads - 1, *v.shape, dtype=D)])

    def forward(self, *_: object, **__: object) -> Heads:
        return tuple(self.said)


def pulls(objective: FlowMatching | Several, v: Tensor, b: Noised) -> list[Tensor]:
    """Minus the gradients of all heads, row by row."""
    net = Free(v, len(objective.needs.heads))
    objective.loss(net, Frozen(net), b).loss.sum().backward()
    return [-p.grad for p in net.said if p.grad is not None]


def swapped(x: Tensor) -> Tensor:
    """Neighbours change places."""
    return x.view(-1, 2, *x.shape[1:]).flip(1).view_as(x)


@each
def test_the_velocity_rests_beyond_its_target(objective: FlowMatching | Several) -> None:
    """At (v* - p v~*) / (1 - p), to which it is pulled in proportion; the other heads learn what they did."""
    b = record(objective, gaussian(), 16)
    rest = (b.v_t - PUSH * swapped(b.v_t)) / (1 - PUSH)
    assert pulls(objective, rest, b)[0].abs().max() < 1e-12
    weight = 1.0 if isinstance(objective, FlowMatching) else 0.6
    off = torch.ones_like(rest)
    assert torch.allclose(pulls(objective, rest + off, b)[0], -2 * weight * (1 - PUSH) / rest[0].numel() * off)
    plain = {"contrast": 0.0} if not isinstance(objective, Several) else {"parts": (VelocityPart(weight=0.6), PARTS[1])}
    without = objective.model_copy(update=plain)
    for mine, other in zip(pulls(objective, rest, b)[1:], pulls(without, rest, b)[1:], strict=True):
        assert torch.equal(mine, other)
    assert pulls(without, b.v_t, b)[0].abs().max() == 0


@each
def test_rows_by_twos_are_cut_by_twos(objective: FlowMatching | Several) -> None:
    b = record(objective, gaussian(), 16)
    v = torch.zeros_like(b.v_t)
    halves = torch.cat([pulls(objective, v[rows], b[rows])[0] for rows in (slice(0, 6), slice(6, 16))])
    assert torch.equal(halves, pulls(objective, v, b)[0])
    run = load("digits")
    assert together(run.train, objective) == 2
    assert together(run.train, run.objective) == 1


def test_a_last_row_without_a_neighbour_is_pushed_from_its_own() -> None:
    objective = OBJECTIVES[0]
    b = record(objective, gaussian(), 16)[:3]
    v = b.v_t + 1
    assert torch.allclose(pulls(objective, v, b)[0][2], -torch.full_like(v[2], 2 * (1 - PUSH) / v[2].numel()))


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        (
            "digits-three-heads",
            ["objective.parts.0.contrast=0.05", "objective.guide.zeta=0.5"],
            "contrast moves .* guide",
        ),
        ("digits-flow-matching", ["objective.contrast=0.05", "objective.guide.zeta=0.5"], "guide.zeta=0"),
        ("digits-flow-matching", ["objective.contrast=1"], "objective.contrast"),
        ("digits-flow-matching", ["objective.contrast=0.05", "train.batch=33"], "compares 2 rows"),
        ("digits-three-heads", ["objective.parts.0.contrast=0.05", "objective.along=velocity"], "along=target"),
    ],
)
def test_contrast_is_refused_where_it_would_mislead(recipe: str, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(recipe, words)
    assert "contrast" not in load(recipe).objective.model_dump()
