"""Knobs, set; and which head a reading reads. That it lands where the flow does is in tests/theory."""

import pytest
import torch
from torch import Tensor

from dumo.config.load import load
from dumo.flow.reading import bind_knobs, head_of
from dumo.types import Heads


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
        ("digits-imf", "flow_map", "u"),
        ("digits-shortcut", "velocity", "u"),
        ("digits-sct", "endpoint", "f"),
        ("digits-three-heads", "endpoint", "u"),
        ("digits-three-heads", "flow_map", "m"),
    ],
)
def test_source_is_the_head_that_a_reading_reads(recipe: str, reading: str, head: str) -> None:
    assert head_of(load(recipe).objective, reading) == head  # pyright: ignore[reportArgumentType]
