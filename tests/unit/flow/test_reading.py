"""A net of two times, read; and knobs, set."""

import pytest
import torch
from torch import Tensor

from dumo.flow.reading import bind, head_of, mean_velocity
from dumo.run.config.load import load
from dumo.types import Heads

X, C = torch.arange(6.0).view(3, 2), torch.zeros(3, dtype=torch.long)
T, S = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.25, 0.5, 0.1])


def net(x: Tensor, c: Tensor, /, *, t: Tensor, r: Tensor) -> Heads:
    """Heads that tell which times came in."""
    return 100 * t[:, None] + r[:, None] + 0 * x, x


def test_average_by_hand() -> None:
    reads = mean_velocity(net)
    assert reads.velocity is not None
    assert reads.endpoint is not None
    assert reads.flow_map is not None
    t, s = T[:, None], S[:, None]
    assert torch.allclose(reads.velocity(X, T, C), (101 * t).expand(3, 2))
    assert torch.allclose(reads.flow_map(X, T, S, C), X - (t - s) * (100 * t + s))
    assert torch.allclose(reads.endpoint(X, T, C), X - t * 100 * t)


def test_average_of_another_head() -> None:
    reads = mean_velocity(net, head=1)
    assert reads.endpoint is not None
    assert torch.allclose(reads.endpoint(X, T, C), X - T[:, None] * X)


def test_bind_sets_knobs_and_leaves_inputs() -> None:
    seen: dict[str, Tensor] = {}

    def knobbed(x: Tensor, c: Tensor, /, **inputs: Tensor) -> Heads:
        seen.update(inputs)
        return (x,)

    bind(knobbed, w=2.5, low=0.1)(X, C, t=T)
    assert list(seen) == ["t", "w", "low"]
    assert torch.equal(seen["t"], T)
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
