"""Optimizers carry their numbers to torch; schedules are the curves they say."""

import math
from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from dumo.training.optim import WSD, Adam, AdamW, Constant, Cosine, HeadRate, Muon, Optimizer, RAdam, Schedule
from dumo.types import UserError


def net_of(*params: nn.Parameter) -> nn.Module:
    """A net of these parameters."""
    return nn.ParameterList(params)


@pytest.mark.parametrize(("spec", "kind"), [(AdamW, "AdamW"), (Adam, "Adam"), (RAdam, "RAdam")])
def test_numbers_reach_torch(spec: type[AdamW | Adam | RAdam], kind: str) -> None:
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
    for spec, fuses in ((AdamW(), True), (Adam(), True), (RAdam(), False)):
        kinds = [spec(net_of(kind(torch.ones(3)))).param_groups[0].get("fused") for kind in (OnGpu, nn.Parameter)]
        assert kinds == [fuses or None, None]


def test_defaults_are_the_papers() -> None:
    assert (AdamW().lr, AdamW().betas, AdamW().weight_decay) == (1e-4, (0.9, 0.95), 0)


def test_kind_chooses() -> None:
    assert TypeAdapter(Optimizer).validate_python({"kind": "radam", "lr": 0.1}) == RAdam(lr=0.1)
    assert TypeAdapter(Schedule).validate_python({"kind": "cosine", "warmup": 3}) == Cosine(warmup=3)


@pytest.mark.parametrize("bad", [{"lr": 0}, {"lr": math.inf}, {"betas": (0.9, 1.0)}, {"weight_decay": -1}, {"eps": 0}])
def test_optimizers_refuse(bad: dict[str, object]) -> None:
    for spec in (AdamW, Adam, RAdam):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            spec.model_validate(bad)


def test_constant() -> None:
    assert [Constant()(step, 10) for step in range(4)] == [1, 1, 1, 1]
    assert [Constant(warmup=4)(step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine() -> None:
    assert [Cosine()(step, 4) for step in range(5)] == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0])
    assert [Cosine(floor=0.2)(step, 2) for step in range(3)] == pytest.approx([1, 0.6, 0.2])
    assert [Cosine(warmup=2)(step, 4) for step in range(5)] == pytest.approx([0.5, 1, 1, 0.5, 0])


def test_cosine_stays_at_its_floor() -> None:
    assert [Cosine(floor=0.1)(step, 4) for step in (4, 5, 400)] == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
@pytest.mark.parametrize("steps", [1, 2, 6, 30])
@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_schedules_climb_then_fall_within_bounds(warmup: int, steps: int, floor: float) -> None:
    shapes = [WSD(warmup=warmup, floor=floor, shape=shape) for shape in ("linear", "1-sqrt")]
    for schedule in (Constant(warmup=warmup), Cosine(warmup=warmup, floor=floor), *shapes):
        factors = [schedule(step, steps) for step in range(steps)]
        top = min(warmup, steps)
        assert all(0 < factor <= 1 for factor in factors)
        assert all(a <= b for a, b in pairwise(factors[:top]))
        assert all(a >= b for a, b in pairwise(factors[max(0, top - 1) :]))


def test_wsd() -> None:
    half = WSD(warmup=2, decay=0.5, shape="linear")
    assert [half(step, 8) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0])
    root = WSD(decay=0.5, floor=0.2)
    assert [root(step, 8) for step in (0, 4, 5, 8)] == pytest.approx([1, 1, 0.6, 0.2])
    assert WSD(warmup=6, decay=0.5)(5, 8) == 1  # the warm-up is waited for


def test_wsd_of_more_steps_is_the_same_until_it_falls() -> None:
    """So a run goes on from a checkpoint before its decay as if it had been longer from the start."""
    short, steps = WSD(warmup=3, decay=0.25), 16
    assert [short(step, steps) for step in range(13)] == [short(step, 4 * steps) for step in range(13)]
    assert short(13, steps) < 1 == short(13, 4 * steps)


def test_wsd_refuses() -> None:
    for bad in ({"decay": 0}, {"decay": 1.1}, {"floor": -0.1}, {"shape": "cosine"}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            WSD.model_validate(bad)


def test_cosine_refuses() -> None:
    for bad in ({"warmup": -1}, {"floor": 1.1}, {"floor": -0.1}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            Cosine.model_validate(bad)


class Headed(nn.Module):
    """A trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.heads = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("u", "d")})


@pytest.mark.parametrize("spec", [AdamW(lr=0.1), Muon(lr=0.1, adamw_lr=0.05)])
def test_a_head_has_its_own_rate(spec: AdamW | Muon) -> None:
    """And its own betas; what it does not name is that of all else, whose steps are what they were."""
    own = HeadRate(name="d", lr=0.02, betas=(0.0, 0.9))
    net, other = Headed(), Headed()
    other.load_state_dict(net.state_dict())
    one, plain = spec.model_copy(update={"heads": (own, HeadRate(name="u"))})(net), spec(other)
    groups = {
        name: g for name, p in net.named_parameters() for g in one.param_groups if any(p is q for q in g["params"])
    }
    head, rest = groups["heads.d.weight"], groups["heads.u.weight"]
    assert sum(len(group["params"]) for group in one.param_groups) == len([*net.parameters()])
    assert (tuple(head["betas"]), head["lr"], head["ratio"]) == ((0, 0.9), 0.02, pytest.approx(0.2))
    assert (tuple(rest["betas"]), rest["lr"]) == ((0.9, 0.95), 0.05 if isinstance(spec, Muon) else 0.1)
    for model, optimizer in ((net, one), (other, plain)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    same = {name for name, p in net.named_parameters() if torch.equal(p, other.get_parameter(name))}
    assert {name for name, _ in net.named_parameters()} - same == {"heads.d.weight", "heads.d.bias"}


def test_heads_that_are_not_there_are_refused() -> None:
    for net, says in ((Headed(), "'w', its heads are u, d"), (nn.Linear(1, 1), "unnamed")):
        with pytest.raises(UserError, match=says):
            AdamW(heads=(HeadRate(name="w"),))(net)
    with pytest.raises(UserError, match="twice"):
        AdamW(heads=(HeadRate(name="u"), HeadRate(name="u", lr=0.1)))(Headed())
    assert "heads" not in AdamW().model_dump()
