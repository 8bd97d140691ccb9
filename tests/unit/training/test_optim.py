"""Optimizers carry their numbers to torch; schedules are the curves they say."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import nn

from dumo.training.optim import WSD, Adam, AdamW, Constant, Cosine, Schedule


def net_of(*params: nn.Parameter) -> nn.Module:
    """A net of these parameters."""
    return nn.ParameterList(params)


@pytest.mark.parametrize(("spec", "kind"), [(AdamW, "AdamW"), (Adam, "Adam")])
def test_numbers_reach_torch(spec: type[AdamW | Adam], kind: str) -> None:
    optimizer = spec(lr=0.1, betas=(0.2, 0.3), weight_decay=0.4, eps=0.5)(
        nn.ParameterList([nn.Parameter(torch.ones(1))])
    )
    (group,) = optimizer.param_groups
    assert type(optimizer) is getattr(torch.optim, kind)
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"], group["eps"]) == (0.1, (0.2, 0.3), 0.4, 0.5)


class OnGpu(nn.Parameter):
    """A parameter that says it is on a GPU."""

    is_cuda = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def test_a_gpu_steps_in_one_kernel_and_a_cpu_as_ever() -> None:
    """In one kernel the rounding is another: runs on a CPU keep their bits."""
    for spec in (AdamW(), Adam()):
        kinds = [spec(net_of(kind(torch.ones(3)))).param_groups[0].get("fused") for kind in (OnGpu, nn.Parameter)]
        assert kinds == [True, None]


HALF = 2**0.5 / 4
CURVES = [  # schedule, its steps, some of them, factors of the rate
    (Constant(), 10, range(4), [1, 1, 1, 1]),
    (Constant(warmup=4), 10, range(6), [0.25, 0.5, 0.75, 1, 1, 1]),
    (Cosine(), 4, range(5), [1, 0.5 + HALF, 0.5, 0.5 - HALF, 0]),
    (Cosine(warmup=2), 4, range(5), [0.5, 1, 1, 0.5, 0]),
    (WSD(warmup=2), 20, (0, 1, 16, 17, 20), [0.5, 1, 1, 0.5, 0]),
    (WSD(warmup=18), 20, (17,), [1]),  # the warm-up is waited for
]


@pytest.mark.parametrize(("schedule", "steps", "some", "factors"), CURVES)
def test_curves(schedule: Schedule, steps: int, some: Iterable[int], factors: list[float]) -> None:
    assert [schedule(step, steps) for step in some] == pytest.approx(factors)


def test_what_has_fallen_stays_there() -> None:
    assert [schedule(step, 10) for schedule in (Cosine(), WSD()) for step in (10, 11, 400)] == [0] * 6


@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
@pytest.mark.parametrize("steps", [1, 2, 6, 30])
def test_schedules_climb_then_fall_within_bounds(warmup: int, steps: int) -> None:
    for schedule in (Constant(warmup=warmup), Cosine(warmup=warmup), WSD(warmup=warmup)):
        factors = [schedule(step, steps) for step in range(steps)]
        top = min(warmup, steps)
        assert all(0 < factor <= 1 for factor in factors)
        assert all(a <= b for a, b in pairwise(factors[:top]))
        assert all(a >= b for a, b in pairwise(factors[max(0, top - 1) :]))


def test_wsd_of_more_steps_is_the_same_until_it_falls() -> None:
    """So a run goes on from a checkpoint before its decay as if it had been longer from the start."""
    short, steps = WSD(warmup=3), 20
    assert [short(step, steps) for step in range(17)] == [short(step, 4 * steps) for step in range(17)]
    assert short(17, steps) < 1 == short(17, 4 * steps)
