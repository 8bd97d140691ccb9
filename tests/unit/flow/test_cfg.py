"""Guided readings: which rows are read twice, what is made of them, and who counts."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dumo.flow.generate import generate, labels
from dumo.flow.guide import CFG, GuidanceScale, Guide, Interval
from dumo.flow.path import Linear
from dumo.flow.reading import mean_velocity
from dumo.flow.solver import Euler, Heun, Hop, Restart, Solver
from dumo.types import Reads, UserError, lift

NULL = 4


class Small(nn.Module):
    """u(x_t, t, r) = x (1 + c) + t - r / 2, and a note of every row that went through: its label and time."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[list[tuple[int, float]]] = []

    def forward(self, x: Tensor, c: Tensor, /, t: Tensor, r: Tensor) -> tuple[Tensor]:
        self.passes.append(list(zip(c.tolist(), [round(s, 6) for s in t.tolist()], strict=True)))
        return (x * lift(1.0 + c, x) + lift(t - r / 2, x),)


X, C = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]]), torch.tensor([0, 3, NULL])
T, S = torch.tensor([0.2, 0.6, 0.4]), torch.tensor([0.1, 0.0, 0.4])


@pytest.mark.parametrize("name", ["velocity", "endpoint", "flow_map"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_every_reading_is_the_affine_map_in_one_pass(name: str, scale: float) -> None:
    net = Small()
    plain, guided = (getattr(reads, name) for reads in (mean_velocity(net), CFG(scale=scale)(mean_velocity(net), NULL)))
    times = (T, S) if name == "flow_map" else (T,)
    with_c, without = plain(X, *times, C), plain(X, *times, torch.full_like(C, NULL))
    net.passes.clear()
    found = guided(X, *times, C)
    assert torch.allclose(found, without + scale * (with_c - without), rtol=0, atol=1e-5)
    assert torch.allclose(found[2], with_c[2], rtol=0, atol=1e-5)  # has no label
    assert [len(rows) for rows in net.passes] == [6]


def test_only_rows_inside_the_interval_are_read_twice() -> None:
    """Both ends belong to it, in single precision too."""
    net, guidance = Small(), CFG(scale=3, interval=Interval(low=0.2, high=0.4))
    velocity, plain = guidance(mean_velocity(net), NULL).velocity, mean_velocity(net).velocity
    with_c, without = plain(X, T, C), plain(X, T, torch.full_like(C, NULL))
    net.passes.clear()
    found = velocity(X, T, C)
    assert torch.allclose(found[[0, 2]], (3 * with_c - 2 * without)[[0, 2]], rtol=0, atol=1e-5)
    assert torch.equal(found[1], with_c[1])
    assert net.passes == [[(0, 0.2), (3, 0.6), (NULL, 0.4), (NULL, 0.2), (NULL, 0.4)]]
    assert torch.equal(velocity(X, T + 0.5, C), plain(X, T + 0.5, C))
    assert len(net.passes[1]) == 3


def test_what_needs_no_guidance_gets_none() -> None:
    """A scale of one, and readings that were not taught."""
    reads = mean_velocity(Small())
    assert not CFG().active
    assert CFG()(reads, NULL) is reads
    assert CFG(interval=Interval(high=0.5))(reads, NULL) is reads
    found = CFG(scale=2)(Reads(velocity=reads.velocity), NULL)
    assert (found.endpoint, found.flow_map) == (None, None)


EARLY, LATE, NEVER = Interval(high=0.5), Interval(low=0.6), Interval(low=0.01, high=0.02)
COUNTS = [  # solver, readings asked for, interval, passes counted
    (Euler(), 4, Interval(), 8),
    (Euler(), 4, EARLY, 6),  # 1, 3/4, 1/2, 1/4
    (Euler(), 4, LATE, 6),
    (Euler(), 4, NEVER, 4),
    (Heun(), 4, EARLY, 7),  # 1, 1/2, 1/2, 0
    (Restart(m=0.3), 2, EARLY, 3),
    (Hop(), 2, Interval(), 4),
]


@pytest.mark.parametrize(("solver", "nfe", "interval", "passes"), COUNTS)
def test_passes_are_counted_not_readings(solver: Solver, nfe: int, interval: Interval, passes: int) -> None:
    """At any batch size: rows of one batch are read at one time."""
    net = Small()
    reads = CFG(scale=2, interval=interval)(mean_velocity(net), NULL)
    for batch in (3, 7):
        made = generate(net, reads, Linear(), solver, labels(7, 4), nfe=nfe, seed=0, shape=(2,), batch=batch)
        assert made.nfe == passes


@pytest.mark.parametrize("wrong", [{"scale": 0}, {"scale": -1.5}, {"interval": {"low": 0.6, "high": 0.5}}, {"w": 2}])
def test_what_is_no_guidance_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CFG.model_validate(wrong)


def test_nets_that_cannot_be_guided_are_refused() -> None:
    strong = CFG(scale=1.5)
    for classes, drop, opened, said in [
        (0, 0.1, 1.0, r"sample.guide.scale = 1.5 .*data 'moons' has no classes.*set sample.guide.scale=1"),
        (10, 0.0, 1.0, r"sample.guide.scale = 1.5 .*objective.drop = 0 never.*objective.drop=0.1"),
        (10, 0.1, 2.5, r"sample.guide.scale = 1.5 .*objective.guide .*2.5.*objective.guide.zeta=0"),
    ]:
        CFG().check("moons", classes, drop, GuidanceScale(opened))
        with pytest.raises(UserError, match=said):
            strong.check("moons", classes, drop, GuidanceScale(opened))
    strong.check("digits", 10, 0.1, GuidanceScale(Guide().scale))
    strong.check("digits", 10, 0.1, GuidanceScale(Guide(omega=0.2, zeta=0.8).scale))  # settles unguided
