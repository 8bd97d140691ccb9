"""Laws of the time grids."""

import pytest
import torch

from dumo.sampling.grid import jumps, rows, uniform


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("start", [1.0, 0.999])
def test_uniform_goes_from_start_to_zero_in_equal_steps(n: int, start: float) -> None:
    times = torch.tensor(uniform(n, start), dtype=torch.float64)
    assert (times[0], times[-1], len(times)) == (start, 0, n + 1)
    torch.testing.assert_close(times.diff(), torch.full((n,), -start / n, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("m", [0.3, 0.5, 0.6, 0.451])
def test_two_jumps_are_at_start_and_m(m: float) -> None:
    assert jumps(1, m) == [1.0]
    assert jumps(2, m) == [1.0, m]
    assert jumps(2, m, start=0.999) == [0.999, pytest.approx(m, abs=1e-15)]


def test_jumps_at_one_half_are_the_uniform_grid() -> None:
    for n in range(1, 60):
        assert jumps(n, 0.5) == pytest.approx(uniform(n)[:-1], abs=1e-15)


@pytest.mark.parametrize(("m", "start"), [(0.3, 1.0), (0.6, 0.999), (0.99, 1.0)])
def test_jumps_are_a_power_of_the_uniform_grid(m: float, start: float) -> None:
    times = torch.tensor(jumps(12, m, start), dtype=torch.float64)
    assert times[0] == start
    assert times[6].item() == pytest.approx(m, abs=1e-15)
    assert (times.diff() < 0).all()
    assert times[-1] > 0
    slopes = (times / start).log()[1:] / torch.tensor(uniform(12)[1:-1], dtype=torch.float64).log()
    torch.testing.assert_close(slopes, slopes[0].expand(11), atol=1e-12, rtol=0)


def test_rows_repeat_each_time_in_the_precision_of_the_sample() -> None:
    first, second = rows([1.0, 0.3], torch.zeros(3, 2, 4, dtype=torch.float64))
    assert (first.shape, first.dtype) == ((3,), torch.float64)
    assert first.tolist() == [1.0] * 3
    assert second.tolist() == [0.3] * 3
