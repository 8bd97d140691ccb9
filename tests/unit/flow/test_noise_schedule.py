"""Schedules of diffusions against diffusers' own tables, the clock between their entries, the path to the last."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dumo.flow.noise_schedule import Schedule, TimeToIndex
from dumo.flow.path import Diffusion, Linear
from dumo.flow.solver import Restart
from dumo.types import UserError

SD = Schedule(kind="scaled_linear", start=0.00085, end=0.012)
SCHEDULES = {
    "sd": SD,
    "sd-zero": SD.model_copy(update={"zero_snr": True}),
    "pixart": Schedule(kind="linear"),
    "cosine": Schedule(kind="squaredcos_cap_v2", steps=50),
}
DIFFUSERS = {"start": "beta_start", "end": "beta_end", "kind": "beta_schedule", "zero_snr": "rescale_betas_zero_snr"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_those_of_diffusers(name: str) -> None:
    """Which computes in float32."""
    from diffusers import DDIMScheduler

    schedule = SCHEDULES[name]
    said = {theirs: getattr(schedule, ours) for ours, theirs in DIFFUSERS.items()}
    bars = DDIMScheduler(num_train_timesteps=schedule.steps, **said).alphas_cumprod.double().numpy()
    signal, noise = bars**0.5, (1 - bars) ** 0.5
    assert np.abs(schedule.times - noise / (signal + noise)).max() < 5e-6
    assert (schedule.last_time == 1) == schedule.zero_snr


def test_stable_diffusion_spans_most_of_the_path() -> None:
    assert SD.times[[0, -1]] == pytest.approx([0.02834, 0.93596], abs=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_clock_is_smooth_and_goes_through_every_entry(name: str) -> None:
    schedule = SCHEDULES[name]
    clock, times = TimeToIndex(schedule), torch.as_tensor(schedule.times)
    assert (clock(times) - torch.arange(schedule.steps)).abs().max() < 1e-9
    assert (clock(times.float()) - torch.arange(schedule.steps)).abs().max() < 1e-3
    eps = 1e-9
    t = torch.cat([times, torch.linspace(0, 1, 1001).double()])
    below, above = (slope(clock, t + side) for side in (-eps, eps))
    assert torch.allclose(below, above, rtol=1e-4)
    assert (below > 0).all()
    assert below.max() <= clock.max_slope * (1 + 1e-4)
    h = 1e-7
    assert torch.allclose(slope(clock, t), (clock(t + h) - clock(t - h)) / (2 * h), rtol=1e-3)
    ends = torch.tensor([times[0] - 0.01, times[-1] + 0.01])
    straight = torch.tensor([0.0, schedule.steps - 1.0]) + torch.tensor([-0.01, 0.01]) * slope(clock, times[[0, -1]])
    assert torch.allclose(clock(ends), straight.to(ends))


def slope(clock: TimeToIndex, t: torch.Tensor) -> torch.Tensor:
    return torch.func.jvp(clock, (t,), (torch.ones_like(t),))[1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_path_of_a_diffusion_is_a_part_of_the_linear_one(name: str) -> None:
    path, g = Diffusion(schedule=SCHEDULES[name]), torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    last = SCHEDULES[name].last_time
    x_t, v_t = path.at(x, z, t)
    there, v = Linear().at(x, z, last * t)
    assert torch.allclose(x_t, there)
    assert torch.allclose(v_t, last * v)
    assert torch.allclose(x_t, path.alpha(t)[:, None] * z + path.gamma(t)[:, None] * x)
    signal = (1 - last) / path.initial_std
    assert path.initial_std == pytest.approx(1 / (signal + (1 - signal**2) ** 0.5))  # stock begins at x_vp = z


def test_times_fall_on_entries() -> None:
    path = Diffusion(schedule=SD)
    assert (path.nearest_net_times([1.0]), path.nearest_indices([1.0])) == ([1.0], [999])
    (near,), (index,) = path.nearest_net_times([0.5]), path.nearest_indices([0.5])
    assert abs(near - 0.5) < 1e-3
    assert SD.last_time * near == pytest.approx(SD.times[index], rel=1e-15)
    assert Linear().nearest_net_times([0.5]) == [0.5]


@pytest.mark.parametrize("name", ["sd", "sd-zero", "pixart"])
@pytest.mark.parametrize("n", [2, 50, 60, 200, 999, 1000])
def test_no_two_jumps_are_at_one_entry(name: str, n: int) -> None:
    """Stock schedulers refuse times that do not fall. What has an entry of its own keeps it."""
    schedule = SCHEDULES[name]
    times = Restart().times(n)
    found = Diffusion(schedule=schedule).nearest_indices(times)
    nearest = [schedule.nearest_index(t * schedule.last_time) for t in times]
    assert all(a > b for a, b in pairwise(found))
    assert (found[0] <= 999, found[-1] >= 0) == (True, True)
    assert (len(set(nearest)) < n) == (n > 60 or (n == 60 and name != "pixart"))
    if n <= 60:
        assert found[:50] == nearest[:50]


def test_more_jumps_than_entries_are_refused() -> None:
    with pytest.raises(UserError, match=r"^nfe=1001, but .*schedule has 1000 times: set nfe to 1000 or less$"):
        Diffusion(schedule=SD).nearest_net_times(Restart().times(1001))


def test_without_a_pipeline_there_is_no_schedule() -> None:
    with pytest.raises(UserError, match="pipeline=DIR"):
        Diffusion().nearest_net_times([0.5])
