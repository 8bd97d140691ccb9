"""Nets of diffusions as velocities: exact for laws whose noise is known, in value and along the flow, to both ends."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dumo.autodiff import rule as rule
from dumo.autodiff.dual import pair, primal, tangent
from dumo.flow.noise_schedule import Schedule, TimeToIndex
from dumo.flow.path import Diffusion
from dumo.flow.solver import Restart
from dumo.nets.vp import DiffusionToVelocity, Prediction, read_scheduler
from dumo.types import Readings, lift

SD: dict[str, Any] = {
    "_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "num_train_timesteps": 1000,
}  # fmt: skip
V: dict[str, Any] = SD | {"prediction_type": "v_prediction"}
CONFIGS = {"epsilon": SD, "v": V, "v-zero": V | {"rescale_betas_zero_snr": True}}
MEANS, WEIGHTS = torch.tensor([-1.0, 0.7]), torch.tensor([0.3, 0.7])
Law = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_vp, a, s) -> E[noise | x_vp]


def gaussian(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Data N(.4, .5^2)."""
    return s * (x - 0.4 * a) / (0.25 * a**2 + s**2)


def two_modes(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Data of two Gaussians of deviation .3."""
    spread = 0.09 * a**2 + s**2
    away = x[..., None] - a[..., None] * MEANS.to(x)
    p = (WEIGHTS.to(x).log() - away**2 / (2 * spread[..., None])).softmax(-1)
    return s * (p * away).sum(-1) / spread


LAWS: dict[str, Law] = {"gaussian": gaussian, "two_modes": two_modes}


class Inverse(torch.autograd.Function):
    """t of an index, by bisection; its derivative is one over the clock's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(index: Tensor, clock: TimeToIndex) -> Tensor:
        low, high = torch.full_like(index, -1.0), torch.full_like(index, 2.0)
        for _ in range(80):
            middle = (low + high) / 2
            above = clock(middle) > index
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        ctx.save_for_forward(output)
        ctx.clock = inputs[1]

    @staticmethod
    def jvp(ctx: Any, moved: Tensor, _: object) -> Tensor:  # noqa: ANN401
        (t,) = ctx.saved_tensors
        k = torch.searchsorted(ctx.clock.knots, t, right=True)
        d, (cubic, square, slope, _) = t - ctx.clock.origins[k], ctx.clock.coefficients[k].unbind(1)
        return moved / ((3 * cubic * d + 2 * square) * d + slope)


def knowing(law: Law, frame: DiffusionToVelocity) -> Callable[[Tensor, Tensor], Tensor]:
    """A net that knows this law's noise, or its v, at its own input and index."""

    def net(x: Tensor, index: Tensor) -> Tensor:
        t = lift(Inverse.apply(index.double(), frame.time_to_index), x).to(x)
        n = (t * t + (1 - t) ** 2) ** 0.5
        a, s = (1 - t) / n, t / n
        z = law(x, a, s)
        if frame.prediction == "epsilon":
            return z
        return a * z - s * guess(law, x, a, s)

    return net


def shared(law: Law, frame: DiffusionToVelocity) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity of `knowing`."""
    net = knowing(law, frame)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        scaled, index, out = frame(x, t)
        return out(net(scaled, index))

    return velocity


def guess(law: Law, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """E[data | x_vp], finite where a is 0."""
    if law is gaussian:
        return 0.4 + 0.25 * a * (x - 0.4 * a) / (0.25 * a**2 + s**2)
    spread = 0.09 * a**2 + s**2
    away = x[..., None] - a[..., None] * MEANS.to(x)
    p = (WEIGHTS.to(x).log() - away**2 / (2 * spread[..., None])).softmax(-1)
    return (p * (MEANS.to(x) + 0.09 * a[..., None] * away / spread[..., None])).sum(-1)


def points(frame: DiffusionToVelocity, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Places with mass at both ends of the schedule and 198 times between, of t in units of its last."""
    first = frame.schedule.times[0] / frame.schedule.last_time
    t = torch.linspace(first, 1.0, 200, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    return torch.randn(200, 4, generator=g, dtype=torch.float64).to(dtype), t.to(dtype)


def exact(law: Law, x: Tensor, t: Tensor, last: float) -> Tensor:
    """The velocity per unit of our t, which is `last` times that of the linear path."""
    at = lift(last * t, x)
    return last * (law(x, 1 - at, at) - guess(law, x, 1 - at, at))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_velocity_endpoint_and_slope_are_exact(config: str, law: str) -> None:
    """In float64 to 1e-9, on the whole range of the schedule."""
    frame, f = read_scheduler(CONFIGS[config]), LAWS[law]
    x, t = points(frame)
    last = frame.schedule.last_time
    v = exact(f, x, t, last)
    net = shared(f, frame)
    assert (net(x, t) - v).abs().max() / v.abs().max() < 1e-9
    at = lift(last * t, x)
    assert (x - lift(t, x) * net(x, t) - guess(f, x, 1 - at, at)).abs().max() < 1e-8
    ours, theirs = (
        torch.func.jvp(f, (x, t), (v, torch.ones_like(t)))[1] for f in (net, lambda x, t: exact(LAWS[law], x, t, last))
    )
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-9


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_slopes_hold_in_float32(config: str, law: str) -> None:
    """Along the flow to both ends: that of the output to 1e-6 of float64's, that of a velocity, v or u, to 1e-5."""
    frame, f = read_scheduler(CONFIGS[config]), LAWS[law]
    x, t = points(frame)
    v, net, velocity = exact(f, x, t, frame.schedule.last_time), knowing(f, frame), shared(f, frame)
    for function, most in ((lambda x, t: net(*frame(x, t)[:2]), 1e-6), (velocity, 1e-5)):
        low, high = (
            torch.func.jvp(function, (x.to(kind), t.to(kind)), (v.to(kind), torch.ones_like(t, dtype=kind)))[1]
            for kind in (torch.float32, torch.float64)
        )
        assert low.dtype == torch.float32
        assert (low - high).norm() / high.norm() < most


@pytest.mark.parametrize("config", CONFIGS)
def test_in_float32_and_by_dual_numbers(config: str) -> None:
    """A smooth net of the input and the index alone, along any direction, in both types and by both ways."""
    frame = read_scheduler(CONFIGS[config])

    def net(x: Tensor, t: Tensor) -> Tensor:
        scaled, index, out = frame(x, t)
        phase = lift(index, x) * 0.01
        return out((scaled * 0.5 + phase).sin())

    x, t = points(frame)
    w = x.roll(1, 0)
    value, slope = torch.func.jvp(net, (x, t), (w, torch.ones_like(t)))
    low = x.float(), t.float(), w.float()
    moved = net(pair(low[0], low[2]), pair(low[1], torch.ones_like(low[1])))
    assert torch.equal(primal(moved), net(*low[:2]))
    rate = tangent(moved)
    assert isinstance(rate, Tensor)
    assert (rate.double() - slope).norm() / slope.norm() < 1e-5
    assert (primal(moved).double() - value).norm() / value.norm() < 1e-6


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS)
def test_jumps_land_where_those_of_the_schedule_do(config: str, law: str) -> None:
    """Two jumps of Restart by the endpoint, against x_vp = a x_0 + s z from x_vp = z, by the table's own numbers."""
    frame, f = read_scheduler(CONFIGS[config]), LAWS[law]
    path, net = Diffusion(schedule=frame.schedule), shared(LAWS[law], frame)
    readings = Readings(endpoint=lambda x, t, c: x - lift(t, x) * net(x, t))
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    made = Restart()(readings, path, path.initial_std * z[0], torch.zeros(5), 2, lambda k: z[k])
    x = z[0]
    for k, index in enumerate(path.nearest_indices([1.0, 0.5])):
        t = torch.tensor(frame.schedule.times[index])
        n = (t * t + (1 - t) ** 2) ** 0.5
        a, s = ((1 - t) / n).expand(x.shape), (t / n).expand(x.shape)
        x = a * x + s * z[k] if k else x
        x = guess(f, x, a, s)
    assert torch.allclose(made, x, rtol=0, atol=1e-9)


def test_numbers_of_the_frame_are_no_weights_and_follow_no_type() -> None:
    frame = read_scheduler(SD)
    assert not frame.state_dict()
    assert frame.time_to_index.coefficients.dtype == torch.float64
    assert frame.max_index_slope == pytest.approx(
        np.diff(frame.schedule.times).min() ** -1 * frame.schedule.last_time / 1000, rel=0.01
    )


def test_kinds_of_predictions() -> None:
    kinds: list[Prediction] = [read_scheduler(CONFIGS[name]).prediction for name in ("epsilon", "v")]
    assert kinds == ["epsilon", "v_prediction"]
    cosine = read_scheduler(V | {"beta_schedule": "squaredcos_cap_v2"})  # v says something of the data to the last
    assert cosine.schedule.kind == "squaredcos_cap_v2"
    linear = read_scheduler(SD | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})  # of DiT and PixArt
    assert linear.prediction == "epsilon"
    assert read_scheduler(SD).schedule == Schedule(kind="scaled_linear", start=0.00085, end=0.012)
