"""Knobs, set; and which head a reading reads. That it lands where the flow does is in tests/theory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dumo.config.load import load
from dumo.flow.reading import available_readings, bind_knobs, head_of
from dumo.flow.times import Beta, Jumps, Pair
from dumo.objectives import RCGM, AlphaFlow, DuMoAny, MeanFlow, SoFlow, TwinFlow
from dumo.types import Heads, Objective, TimeLaw


def test_bind_sets_knobs_and_leaves_inputs() -> None:
    seen: dict[str, Tensor] = {}

    def knobbed(x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        seen.update(inputs)
        return (x,)

    t = torch.tensor([1.0, 0.5, 0.2])
    bind_knobs(knobbed, w=2.5, low=0.1)(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), t=t)
    assert list(seen) == ["t", "w", "low"]
    assert torch.equal(seen["t"], t)
    assert torch.equal(seen["w"], torch.full((3,), 2.5))
    assert torch.equal(seen["low"], torch.full((3,), 0.1))


@pytest.mark.parametrize(
    ("recipe", "reading", "head"),
    [
        ("digits", "velocity", "v"),
        ("digits", "endpoint", "u"),
        *((recipe, "both", "v and u") for recipe in ("digits", "digits-critic", "digits-drift", "digits-match")),
        ("digits-imf", "flow_map", "u"),
        ("digits-shortcut", "velocity", "u"),
        ("digits-sct", "endpoint", "f"),
        ("digits-three-heads", "endpoint", "u"),
        ("digits-three-heads", "flow_map", "m"),
    ],
)
def test_source_is_the_head_that_a_reading_reads(recipe: str, reading: str, head: str) -> None:
    assert head_of(load(recipe).objective, reading) == head  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("objective", [AlphaFlow, MeanFlow, RCGM, SoFlow])
def test_a_mean_velocity_is_no_velocity_where_all_jumps_end_at_the_data(objective: Callable[..., Objective]) -> None:
    def is_taught(times: TimeLaw) -> bool:
        return available_readings(objective(times=times)).velocity is not None

    assert not is_taught(Beta())
    assert not is_taught(Jumps(velocity_ratio=0, data_ratio=1))
    assert is_taught(Jumps(data_ratio=1))
    assert is_taught(Pair(velocity_ratio=0))


def test_a_velocity_that_is_learned_on_every_row_is_taught_at_any_times() -> None:
    assert available_readings(DuMoAny(times=Beta())).velocity is not None
    assert available_readings(TwinFlow(times=Beta())).velocity is not None
