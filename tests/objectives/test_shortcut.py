"""Shortcut models: the formula by hand, the order of the first doubling, and the steps that can be read."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dumo.config.load import load
from dumo.flow.guide import CFG, Guide, Interval
from dumo.flow.path import Linear
from dumo.flow.solver import Euler, Hop, check
from dumo.flow.times import Dyadic
from dumo.objectives import Shortcut
from dumo.testing import exact
from dumo.testing.exact import D, ExactNet, column, gaussian
from dumo.testing.properties import loss_of
from dumo.types import Heads, NoisyBatch, Readings, UserError
from theory.exact import drawn, falls
from theory.formula import Polynomial, agree, changed

LEVELS = 7


class Stepped(Polynomial):
    """The polynomial, k for r."""

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, k: Tensor) -> Heads:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, c, t=t, r=k / LEVELS)


class Scaled(Stepped):
    """The polynomial, with k and w."""

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, k: Tensor, w: Tensor) -> Heads:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, c, t=t, k=k + w)


def by_hand(objective: Shortcut, ref: Stepped, b: NoisyBatch, w: Tensor | None = None) -> Tensor:
    """u*, row by row, for steps of 1, 1/2, ... 1/64 and none; w is the input of each row, if there is one."""
    u_star = b.v_t.clone()
    for i in range(len(b.t)):
        x, c, null, t, d = b.x_t[i : i + 1], b.c[i : i + 1], b.null[i : i + 1], b.t[i : i + 1], b.t[i] - b.r[i]
        knobs, plain = ({} if w is None else {"w": w_i} for w_i in (None if w is None else w[i : i + 1], 0 * t + 1))
        if d == 0:
            if w is not None and b.kept[i] and objective.interval.low <= t <= objective.interval.high:
                u_c, u_null = (ref(x, label, t=t, k=0 * t + LEVELS, **plain)[0] for label in (c, null))
                u_star[i] += ((w[i] - 1) * (u_c - u_null))[0].detach()
            continue
        (k,) = (k for k in range(LEVELS) if d == 0.5**k)
        finer, many = torch.tensor([k + 1], dtype=D), []
        for part in (0, 1):
            t_i = t - part * d / 2
            (u,), (u_null,) = (ref(x, label, t=t_i, k=finer, **knobs) for label in (c, null))
            if d == 1 / 64 and objective.interval.low <= t_i <= objective.interval.high:
                u = (1 - objective.scale) * u_null + objective.scale * u
            many.append(u)
            x = (x - d / 2 * u).clamp(-objective.clip, objective.clip)
        u_star[i] = ((many[0] + many[1]) / 2).clamp(-objective.clip, objective.clip)[0].detach()
    return u_star


@pytest.mark.parametrize("known", [True, False], ids=["places", "no places"])
@pytest.mark.parametrize("high", [1.0, 0.7])
@pytest.mark.parametrize(("scale", "clip"), [(1.0, 4.0), (1.5, 4.0), (1.5, 0.5)])
def test_loss_and_gradient_are_those_of_the_formula(scale: float, clip: float, high: float, known: bool) -> None:
    times, interval = changed(Dyadic, every=2)(), Interval(high=high)
    objective = changed(Shortcut, clip=clip)(times=times, scale=scale, interval=interval, drop=0.3)
    net, ref = Stepped(1), Stepped(1)
    ref.a.data = ref.a.data.roll(1) / 2
    b = drawn(objective, 128)
    b = b if known else replace(b, moving=None)
    k = torch.where(b.r < b.t, -(b.t - b.r).log2(), LEVELS).to(D)
    assert len(set(k.tolist())) == LEVELS + 1
    (u,) = net(b.x_t, b.c, t=b.t, k=k)
    loss = ((u - by_hand(objective, ref, b)) ** 2).sum(1) / 2
    agree(objective, net, b, loss, {"u": loss}, ref=ref, close=1e-10)


def known_scales(objective: Shortcut, b: NoisyBatch) -> Tensor:
    """w of each row from its number in [0, 1): 1, 1.25 ... 4.5, and 1 on half of the rows at rest."""
    values = [1 + 0.25 * i for i in range(15)]
    w: list[float] = []
    for share, moves in zip(b.drawn["w"].to(D).tolist(), (b.r < b.t).tolist(), strict=True):
        guided = values[1:][int((2 * share - 1) * 14)] if share >= 0.5 else 1.0
        w.append(values[int(share * 15)] if moves else guided)
    return torch.tensor(w, dtype=D)


INTRINSIC = changed(Shortcut, clip=4.0)(
    times=changed(Dyadic, every=2)(), scale=1, w=4.5, interval=Interval(high=0.7), drop=0.3
)


@pytest.mark.parametrize("known", [True, False], ids=["places", "no places"])
def test_loss_and_gradient_with_a_scale_as_an_input_are_those_of_the_formula(known: bool) -> None:
    net, ref = Scaled(1), Scaled(1)
    ref.a.data = ref.a.data.roll(1) / 2
    b = drawn(INTRINSIC, 512)
    b = b if known else replace(b, moving=None)
    k = torch.where(b.r < b.t, -(b.t - b.r).log2(), LEVELS).to(D)
    w = known_scales(INTRINSIC, b)
    assert set(w[k < LEVELS].tolist()) == set(w[k == LEVELS].tolist()) == {1 + 0.25 * i for i in range(15)}
    assert (w[k == LEVELS] == 1).double().mean() == pytest.approx(0.5, abs=0.1)
    (u,) = net(b.x_t, b.c, t=b.t, k=k, w=w)
    loss = ((u - by_hand(INTRINSIC, ref, b, w)) ** 2).sum(1) / 2
    agree(INTRINSIC, net, b, loss, {"u": loss}, ref=ref, close=1e-10)


class TeacherVelocity(nn.Module):
    """What training leads to: the velocity of the plain flow at the finest, the guided flow's steps elsewhere."""

    def __init__(self, objective: Shortcut, levels: int) -> None:
        super().__init__()
        self.levels, guided = levels, gaussian(Guide(omega=objective.scale))
        self.plain, self.guided = (ExactNet(flow, objective.needs) for flow in (gaussian(), guided))

    def forward(self, x: Tensor, c: Tensor, /, *, t: Tensor, k: Tensor) -> Heads:
        (plain,), (guided,) = (net(x, c, t=t, k=k) for net in (self.plain, self.guided))
        return (torch.where(column(k >= self.levels), plain, guided),)


@pytest.mark.parametrize("fields", [{"scale": 1.0}, {"scale": 1.5}, {"scale": 1.0, "w": 4.5}])
def test_only_the_first_doubling_is_off_and_by_the_order_of_its_step(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of Euler's are not the flow: the mean velocity over d is off by d x'' / 4, and so is what grows of it.

    All coarser steps, and the rows that match the flow, rest exactly. With `scale` the guided flow is guided in the
    first doubling alone; with w a network whose scale is w at all levels, the finest too, is at rest.
    """
    off: list[Tensor] = []
    for levels in (5, 6, 7, 8):
        monkeypatch.setattr(exact, "FINEST_STEP", levels)
        objective = changed(Shortcut, clip=100.0)(times=changed(Dyadic, levels=levels)(), drop=0.2, **fields)
        net = ExactNet(gaussian(), objective.needs) if objective.w else TeacherVelocity(objective, levels)
        b = drawn(objective, 512, teacher=True)
        finest = b.t - b.r == 2.0 ** (1 - levels)
        loss = loss_of(objective, net, b).loss
        assert loss[~finest].max() < 1e-20
        first = replace(b.at((16 * b.t).ceil() / 16), r=(16 * b.t).ceil() / 16 - 2.0 ** (1 - levels))
        off.append(loss_of(objective, net, first).loss.sqrt())
    assert falls([size.mean() for size in off], 1)


def test_a_sampler_sets_the_scale() -> None:
    assert INTRINSIC.needs.knobs == {"w": 1.5}
    assert INTRINSIC.needs.guide is None
    run = load("digits-shortcut", ["objective.w=4.5", "objective.drop=0.1", "sample.knobs.w=3"])
    assert run.sample.knobs == {"w": 3}


READINGS = Shortcut().readings(Stepped(1))


@pytest.mark.parametrize("guide", [CFG(), CFG(scale=2.0)])
@pytest.mark.parametrize(
    ("solver", "nfe"), [(Hop(), 3), (Hop(), 6), (Hop(), 256), (Hop(start=0.75), 1), (Hop(start=0.999), 2)]
)
def test_steps_of_other_sizes_are_refused(solver: Hop, nfe: int, guide: CFG) -> None:
    readings: Readings = guide(READINGS, 3)
    with pytest.raises(UserError, match=f"nfe = {nfe}"):
        check(solver, readings, 1 if nfe > 1 and solver.start == 1 else nfe, nfe)
    x = torch.zeros(2, 2, dtype=D)
    with pytest.raises(UserError, match=f"nfe = {nfe}"):
        solver(readings, Linear(), x, torch.zeros(2, dtype=torch.long), nfe, lambda _: x)


def test_steps_of_its_sizes_are_not_refused() -> None:
    check(Hop(), READINGS, *(2**k for k in range(LEVELS + 1)))
    check(Hop(start=0.5), READINGS, 1, 2)
    check(Euler(), READINGS, 3)
    assert READINGS.hops is not None
    assert READINGS.hops(0.75, 0.5)
    assert not READINGS.hops(0.75, 0.25)  # half a unit, but not from a place on its own grid


def test_a_run_that_asks_for_other_steps_is_refused_when_loaded() -> None:
    load("digits-shortcut", ["sample.nfe=[1,8]"])
    with pytest.raises(UserError, match="nfe = 3"):
        load("digits-shortcut", ["sample.nfe=[1,3]"])
