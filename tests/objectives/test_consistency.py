"""Consistency training and its discretizations against their authors' formulas, and what of the flow it keeps."""

from dataclasses import replace
from itertools import pairwise
from math import erf, log, sqrt

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dumo.config.load import load
from dumo.flow.times import Karras
from dumo.objectives import Consistency
from dumo.objectives.consistency import Discretization, Equal, KarrasGrid, Ratio
from dumo.testing.exact import APART, ExactFlow, ExactNet, column, exact_batch, gaussian, gradient, stiffness
from dumo.training.ema import Ema, MovingAverage
from dumo.types import NoisyBatch, Spec, UserError
from theory.exact import PRODUCT, falls
from theory.formula import Polynomial, agree, half, passes

AUTHORS = {  # with their constants; the distance of CM is LPIPS, here l2, its second choice
    "cm": Consistency(
        times=Karras(),
        discretization=KarrasGrid(growth="root", first=2, last=150),  # its App. C, CIFAR-10
        weighted=False,
        soft=None,
    ),
    "ict": Consistency(discretization=KarrasGrid(), soft=0.00108),  # its c, 0.00054, in units of deviation 0.5
    "ect": Consistency(),
}
each_preset = pytest.mark.parametrize("name", AUTHORS)
each_flow = pytest.mark.parametrize("flow", [gaussian(), APART, PRODUCT], ids=["gaussian", "means", "mixture"])
L2 = Consistency(soft=None)


def rows(objective: Consistency, progress: float) -> NoisyBatch:
    """A batch with slopes as they fall, of which v_t is given to x and z; no corners."""
    b = exact_batch(objective, gaussian(), 64)
    return replace(b, v_t=b.z - b.x, teacher=None, progress=progress)[5:]


def at_steps(objective: Consistency, q: float) -> Consistency:
    """Steps of a length that is as 1 / q."""
    return objective.model_copy(update={"discretization": Ratio(q=q, stages=1)})


@each_preset
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_formula(name: str, progress: float) -> None:
    """D and D^- of one x and z, in the authors' noise levels; the Huber loss of a vector of D numbers is sqrt(D) times
    that of their mean square."""
    o = AUTHORS[name]
    net, b = Polynomial(1), rows(o, progress)
    t, r = o.discretization(b.t, progress)

    def denoised(t: Tensor) -> Tensor:
        x_t = column(t) * b.z + column(1 - t) * b.x
        return x_t - column(t) * net(x_t, b.c, t=t)[0]

    apart = denoised(t) - denoised(r).detach()
    at_zero = r == 0
    assert torch.allclose(denoised(r)[at_zero], b.x[at_zero])
    weight = {"cm": torch.ones_like(t)}.get(name, 1 / (t / (1 - t) - r / (1 - r)))
    if name == "cm":
        loss = apart.square().mean(1)
    else:
        c = {"ict": 2 * 0.00054 * 2**0.5, "ect": 0.0}[name]
        loss = weight * ((apart.square().sum(1) + c**2).sqrt() - c) / 2**0.5
    error = apart / column(t - r)
    agree(o, net, b, loss, {"u": error.square().mean(1)}, close=1e-9, near=1e-12, clipped_share=half(error))


STAGE = Consistency(low=0.6, discretization=Ratio(stages=1, q=4), boundary=0.3)


def test_a_second_stage_by_hand() -> None:
    """Below `low` speaks theta^-, from there on the net itself; rows drawn below stand on it, and weigh less."""
    net, first = Polynomial(1), Polynomial(1)
    first.a.data = first.a.data.flip(1)
    b = rows(STAGE, 0.5)
    on_it, t = b.t <= 0.6, b.t.clamp(min=0.6)
    _, r = STAGE.discretization(t, 0.5)

    def denoised(net: Polynomial, t: Tensor) -> Tensor:
        x_t = column(t) * b.z + column(1 - t) * b.x
        return x_t - column(t) * net(x_t, b.c, t=t)[0]

    target = torch.where(column(r < 0.6), denoised(first, r), denoised(net, r)).detach()
    weight = torch.ones_like(t).masked_fill(on_it, 0.3) / (t / (1 - t) - r / (1 - r))
    loss = weight * (denoised(net, t) - target).square().mean(1).sqrt()
    assert 0 < on_it.sum() < (r < 0.6).sum() < len(r)
    error = (denoised(net, t) - target) / column(t - r)
    parts = {"u": error.square().mean(1)}
    agree(STAGE, net, b, loss, parts, ref=first, close=1e-9, near=1e-12, clipped_share=half(error))
    assert passes(STAGE, b) == (1, 2)


def test_a_second_stage_goes_on_from_the_first() -> None:
    """It is refused without, and is not read below its times."""
    run = load("digits-tcm")
    assert min(run.objective.times(64, torch.Generator())[0]) >= torch.tensor(run.objective.low)
    for change in ("start=null", "train.ref=self", "sample.nfe=[3]", "evaluate.nfe=[1,3]", "sample.solver.m=0.6"):
        with pytest.raises(UserError, match=r"low learns from|endpoint below t = 0\.6667"):
            load("digits-tcm", [change])


def test_the_first_stage_stays() -> None:
    net = torch.nn.Linear(2, 2)
    first, average = net.weight.clone(), MovingAverage(Ema(decay=1), net)
    net.weight.data += 1e20
    average.update(net, 1)
    assert torch.equal(average.module.weight, first)


@each_flow
@pytest.mark.parametrize(("weighted", "order"), [(True, 1), (False, 2)])
def test_gradient_vanishes_with_the_step(flow: ExactFlow, weighted: bool, order: int) -> None:
    """Along the velocity the secant is off by O(t - r); unweighted, the gradient has a factor t (t - r) besides."""
    objectives = [at_steps(L2.model_copy(update={"weighted": weighted}), q) for q in (250, 500, 1000, 2000)]
    left = [gradient(o, ExactNet(flow, o.needs), exact_batch(o, flow)).abs() for o in objectives]
    assert falls(left, order)


@each_flow
def test_on_a_grid_it_vanishes_too(flow: ExactFlow) -> None:
    """There t moves to the end of its step, and x_t with it."""
    grids = [KarrasGrid(first=n, last=n) for n in (100, 400, 1600)]
    objectives = [L2.model_copy(update={"discretization": grid, "weighted": False}) for grid in grids]
    left = [gradient(o, ExactNet(flow, o.needs), exact_batch(o, flow)).abs() for o in objectives]
    assert falls(left, 4, within=0.4)  # each a quarter of the one before


@each_flow
def test_slopes_that_scatter_cancel_as_steps_get_short(flow: ExactFlow) -> None:
    """A slope and its mirror image about the mean pull apart equally, up to O(t - r): D is asked at x_r, not at x_t."""
    sums = []
    for q in (500, 1000, 2000):
        o = at_steps(L2, q)
        net, b = ExactNet(flow, o.needs), exact_batch(o, flow)
        off = torch.randn(b.x.shape, generator=torch.Generator().manual_seed(5), dtype=b.x.dtype)
        one, other = (gradient(o, net, replace(b, v_t=b.v_t + sign * off)) for sign in (1, -1))
        assert one.abs().max() > 1e-3
        sums.append((one + other).abs())
    assert falls(sums, 1, within=0.15)


@each_flow
def test_descent_leads_back_to_the_flow(flow: ExactFlow) -> None:
    o = at_steps(L2, 256)
    pull = stiffness(o, ExactNet(flow, o.needs), exact_batch(o, flow))
    assert torch.linalg.eigvals(pull).real.min() > 0.05


@each_preset
def test_recipes_are_the_presets_but_for_times(name: str) -> None:
    """Made for hundreds of times the images, their schedules get fine too soon: here some steps end longer."""
    run, theirs = load(f"digits-{name}"), AUTHORS[name]
    assert isinstance(run.objective, Consistency)
    assert run.objective.model_copy(update={"times": theirs.times, "discretization": theirs.discretization}) == theirs
    t = torch.linspace(0.01, 0.99, 99)
    ends = [grid(t, 1.0) for grid in (run.objective.discretization, theirs.discretization)]
    assert (ends[0][0] - ends[0][1]).mean() >= (1 if name == "ict" else 2) * (ends[1][0] - ends[1][1]).mean()
    assert run.net.precondition == "edm"
    assert (run.train.ref == "self") == (name != "cm")


D = torch.float64
ALL: list[Spec] = [Ratio(), Ratio(q=256, stages=1), KarrasGrid(), KarrasGrid(growth="root", first=2, last=150)]
T = torch.linspace(0.003, 0.994, 400, dtype=D)


def level(t: Tensor) -> Tensor:
    """sigma, for data of standard deviation 0.5."""
    return 0.5 * t / (1 - t)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_r_is_below_t_and_both_are_times(schedule: Discretization, progress: float, dtype: torch.dtype) -> None:
    t, r = schedule(T.to(dtype), progress)
    assert t.dtype == r.dtype == dtype
    assert ((r >= 0) & (r < t) & (t < 1)).all()
    t, r = schedule(torch.tensor([0.0, 1.0], dtype=dtype), progress)
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()


@pytest.mark.parametrize("schedule", ALL)
def test_steps_get_shorter(schedule: Discretization) -> None:
    steps = [(t - r).mean() for t, r in (schedule(T, p) for p in (0.0, 0.25, 0.5, 1.0))]
    if getattr(schedule, "stages", 0) == 1:
        assert len({step.item() for step in steps}) == 1
    else:
        assert all(a > 1.3 * b for a, b in pairwise(steps))


@pytest.mark.parametrize(("progress", "stage"), [(0.0, 0), (0.124, 0), (0.126, 1), (0.99, 7), (1.0, 7)])
def test_ratio_is_that_of_ect(progress: float, stage: int) -> None:
    """`training/loss.py`: sigma_r = sigma_t (1 - q^-(stage + 1) (1 + 8 sigmoid(-sigma_t))), at least 0."""
    t, r = Ratio()(T, progress)
    assert t is T
    sigma = level(T)
    ratio = 1 - (1 + 8 * torch.sigmoid(-sigma)) / 2 ** (stage + 1)
    assert torch.allclose(level(r), sigma * ratio.clamp(min=0), rtol=1e-9, atol=1e-12)
    if stage == 0:
        assert (r == 0).double().mean() > 0.7


def test_equal_steps() -> None:
    """LCM's: neighbours of a grid, down to the data."""
    t, r = Equal(count=4)(torch.tensor([0.0, 0.1, 0.25, 0.6, 1.0]), 0.5)
    assert t.tolist() == [0.25, 0.25, 0.5, 0.75, 1.0]
    assert r.tolist() == [0.0, 0.0, 0.25, 0.5, 0.75]


def test_on_the_path_of_a_diffusion_there_are_equal_steps_alone() -> None:
    """Levels and weights of the others are t / (1 - t), of the linear path."""
    steps: list[Discretization] = [Ratio(), KarrasGrid(), Equal(count=50)]
    each = [Consistency(weighted=weighted, discretization=one) for weighted in (True, False) for one in steps]
    fit = [one for one in each if "diffusion" in one.needs.formulas.paths]
    assert [(one.weighted, one.discretization.kind) for one in fit] == [(False, "equal")]


def test_grid_is_that_of_karras() -> None:
    """Levels by Eq. 5 of Karras et al., and every t inside its step; the lowest level is 0."""
    n = 20
    edge = torch.tensor([(0.002 ** (1 / 7) + i / n * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(n + 1)])
    t, r = KarrasGrid(first=n, last=n)(T, 0.5)
    inside = level(T)
    for sigma, top, bottom in zip(inside, level(t), level(r), strict=True):
        i = min(max(int((edge.to(D) <= sigma).sum()), 1), n)
        assert top == pytest.approx(edge[i].item(), rel=1e-5)
        assert bottom == pytest.approx(edge[i - 1].item() if i > 1 else 0.0, rel=1e-5)


def test_numbers_of_steps() -> None:
    """iCT's double from 10 to 1280 (its Sec. 3.4); CM's grow with the root, 1 to 150 (its App. C)."""
    ict, cm = KarrasGrid(), KarrasGrid(growth="root", first=2, last=150)
    assert [ict.steps(k / 8) for k in range(9)] == [10, 20, 40, 80, 160, 320, 640, 1280, 1280]
    assert ict.steps(0.124) == 10
    assert [cm.steps(p) for p in (0.0, 1e-4, 0.25, 1.0)] == [1, 2, 75, 150]
    assert KarrasGrid(first=7, last=7).steps(1.0) == 7


def test_a_log_normal_becomes_the_discretised_one_of_ict() -> None:
    """Its Sec. 3.5: a step is as likely as erf of its top less erf of its bottom, of (log sigma + 1.1) / sqrt(8)."""
    share = (torch.arange(40000, dtype=D) + 0.5) / 40000
    s = torch.exp(-1.1 + log(2) + 2 * torch.special.ndtri(share))
    t, r = KarrasGrid()(s / (1 + s), 0.0)
    tops = level(t).unique()
    assert len(tops) == 10
    assert level(r).unique()[1:] == pytest.approx(tops[:-1], rel=1e-9)
    edges = [0.002, *tops.tolist()]
    bell = [erf((log(sigma) + 1.1) / (2 * sqrt(2))) for sigma in edges]
    for i in range(1, 9):  # the outermost have the tails
        assert (level(t) == tops[i]).double().mean().item() == pytest.approx((bell[i + 1] - bell[i]) / 2, abs=1e-4)
    tails = (1 + bell[0]) / 2 + (1 - bell[-1]) / 2
    assert tails == pytest.approx(0.008, abs=1e-3)


@pytest.mark.parametrize("fields", [{"first": 20, "last": 10}, {"first": 0}])
def test_a_grid_that_is_none_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        KarrasGrid(**fields)  # pyright: ignore[reportArgumentType]
