"""Solvers on a flow known in closed form.

Data N(0, S0^2) on the linear path has x_t ~ N(0, S(t)^2) with S(t)^2 = t^2 + (1 - t)^2 S0^2, and the flow scales:
x_s = x_t S(s) / S(t), of velocity x_t S'(t) / S(t).
"""

from collections.abc import Callable
from itertools import pairwise
from math import log
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dumo.flow.path import Linear
from dumo.flow.solver import (
    Euler,
    Hermite,
    Heun,
    Hop,
    Restart,
    Solver,
    can_make,
    check,
    jump_times,
    num_steps,
    uniform_times,
)
from dumo.runtime.random import stream
from dumo.types import Readings, UserError, lift

S0 = 0.4  # standard deviation of the data
N = 20_000
C = torch.zeros(N, dtype=torch.long)
ALL = [Euler(), Heun(), Restart(), Hop(), Hermite()]


def spread(t: Tensor) -> Tensor:
    return (t**2 + (1 - t) ** 2 * S0**2).sqrt()


def flow_map(x: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
    return x * lift(spread(s) / spread(t), x)


def velocity(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return x * lift((t - (1 - t) * S0**2) / spread(t) ** 2, x)


def endpoint(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return flow_map(x, t, 0 * t, c)


def both(x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return velocity(x, t, c), endpoint(x, t, c)


EXACT = Readings(velocity, endpoint, flow_map, both)


def fresh(k: int) -> Tensor:
    return torch.randn(N, 1, generator=stream(0, "fresh", k), dtype=torch.float64)


def solve(solver: Solver, nfe: int, readings: Readings = EXACT, draw: Callable[[int], Tensor] = fresh) -> Tensor:
    return solver(readings, Linear(), draw(0), C, nfe, draw)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("start", [1.0, 0.999])
def test_uniform_goes_from_start_to_zero_in_equal_steps(n: int, start: float) -> None:
    times = torch.tensor(uniform_times(n, start), dtype=torch.float64)
    assert (times[0], times[-1], len(times)) == (start, 0, n + 1)
    torch.testing.assert_close(times.diff(), torch.full((n,), -start / n, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize(("m", "start"), [(0.3, 1.0), (0.6, 0.999), (0.99, 1.0), (0.5, 0.99379)])
def test_jumps_are_a_power_of_the_uniform_grid(m: float, start: float) -> None:
    assert jump_times(1, m, start) == [start]
    assert jump_times(2, m, start) == [start, m]
    times = torch.tensor(jump_times(12, m, start), dtype=torch.float64)
    assert times[0] == start
    assert times[6].item() == pytest.approx(m, abs=1e-15)
    assert (times.diff() < 0).all()
    assert times[-1] > 0
    slopes = (times / start).log()[1:] / torch.tensor(uniform_times(12)[1:-1], dtype=torch.float64).log()
    torch.testing.assert_close(slopes, slopes[0].expand(11), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Heun(), 2), (Hermite(), 1)])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    counts = torch.tensor([32, 64, 128, 256, 512])
    errors = [(solve(solver, n * solver.passes) - S0 * fresh(0)).square().mean().sqrt() for n in counts.tolist()]
    x, y = counts.double().log(), torch.stack(errors).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert -slope.item() == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("solver", "nfe"), [(Restart(), 1), *((Hop(), n) for n in (1, 2, 3, 8))])
def test_jumps_land_exactly(solver: Solver, nfe: int) -> None:
    assert (solve(solver, nfe) - S0 * fresh(0)).abs().max() <= 1e-12


@pytest.mark.parametrize("solver", ALL, ids=lambda solver: solver.kind)
def test_able_is_what_check_lets_through(solver: Solver) -> None:
    halves = Readings(velocity, endpoint, flow_map, both, hops=lambda t, s: t - s in (1, 0.5, 0.25))
    made: list[int] = []
    for nfe in range(-1, 6):
        try:
            check(solver, halves, nfe)
        except UserError:
            continue
        made.append(nfe)
    assert made == {"heun": [2, 4], "hop": [1, 2, 4]}.get(solver.kind, [1, 2, 3, 4, 5])
    assert [nfe for nfe in range(-1, 6) if can_make(solver, halves, nfe)] == made


@pytest.mark.parametrize("m", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("nfe", [2, 4])
def test_restart_lands_on_the_data(nfe: int, m: float) -> None:
    std = solve(Restart(m=m), nfe).std().item()
    assert log(std / S0) == pytest.approx(0, abs=4 / (2 * N) ** 0.5)  # four standard errors of a standard deviation


def test_restart_keeps_what_it_should_of_the_noise() -> None:
    """At two passes x_0 is linear in the two draws, with weights that the formula gives."""
    m, s = torch.tensor(0.3, dtype=torch.float64), Restart(m=0.3)
    want = S0 / spread(m) * (m * fresh(1) + (1 - m) * S0 * fresh(0))
    assert (solve(s, 2) - want).abs().max() <= 1e-12


def test_restart_asks_for_each_draw_once() -> None:
    asked: list[int] = []

    def noted(k: int) -> Tensor:
        asked.append(k)
        return fresh(k)

    for solver in (Restart(), Hermite()):
        solver(EXACT, Linear(), fresh(0), C, 4, noted)
    assert asked == [1, 2, 3]


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_hermite_is_exact_where_the_flow_is_a_parabola(nfe: int) -> None:
    """x_t = a (1 + t - 3 t^2), where x_t tells a."""

    def along(x: Tensor, t: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        t = lift(t, x)
        a = x / (1 + t - 3 * t**2)
        return a * (1 - 6 * t), a

    assert (solve(Hermite(), nfe, Readings(both=along)) + fresh(0)).abs().max() <= 1e-9


def visited(solver: Solver, nfe: int) -> list[tuple[float, ...]]:
    """The times at which the solver calls its reading, all rows alike."""
    seen: list[tuple[float, ...]] = []

    def note(read: Callable[..., Any]) -> Callable[..., Any]:
        def noted(x: Tensor, *args: Tensor) -> Any:  # noqa: ANN401, as the reading
            assert all((t == t[0]).all() for t in args)
            seen.append(tuple(t[0].item() for t in args[:-1]))
            return read(x, *args)

        return noted

    solve(solver, nfe, Readings(note(velocity), note(endpoint), note(flow_map), note(both)))
    return seen


@pytest.mark.parametrize("start", [1.0, 0.999])
def test_times_of_the_passes(start: float) -> None:
    grid = uniform_times(4, start)
    assert visited(Hop(start=start), 4) == list(pairwise(grid))
    assert visited(Restart(start=start, m=0.3), 4) == [(t,) for t in jump_times(4, 0.3, start)]
    if start == 1:
        assert visited(Euler(), 4) == [(t,) for t in grid[:-1]]
        assert visited(Heun(), 8) == [(t,) for pair in pairwise(grid) for t in pair]
        assert visited(Hermite(), 4) == [(t,) for t in jump_times(4)]


def test_condition_reaches_the_net() -> None:
    c = torch.arange(N)

    def read(x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        assert rest[-1] is c
        return x

    def pair(x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return read(x, t, c), read(x, t, c)

    for solver in ALL:
        solver(Readings(read, read, read, pair), Linear(), fresh(0), c, 4, fresh)


DATA_ALONE = Readings(endpoint=endpoint, flow_map=flow_map, hops=lambda t, s: s == 0)


@pytest.mark.parametrize(
    ("solver", "readings", "nfe", "named"),
    [
        *((solver, EXACT, n, f"nfe = {n}") for solver in ALL for n in (0, -2)),
        *((Heun(), EXACT, n, f"nfe = {n}") for n in (1, 3, 7)),
        (Hop(), Readings(velocity, endpoint), 1, "'hop'"),
        (Restart(), Readings(velocity), 2, "endpoint"),
        (Heun(), Readings(flow_map=flow_map), 2, "velocity"),
        (Restart(), Readings(endpoint=endpoint, lowest=1.0), 2, "t = 1"),
        (Restart(), Readings(endpoint=endpoint, lowest=0.6), 4, "t = 0.6"),
        (Hop(), DATA_ALONE, 2, "nfe = 2"),
    ],
)
def test_what_it_cannot_do_is_refused(solver: Solver, readings: Readings, nfe: int, named: str) -> None:
    with pytest.raises(UserError) as refused:
        solve(solver, nfe, readings)
    assert named in str(refused.value)


def test_check_looks_at_every_number_of_passes() -> None:
    check(Heun(), EXACT, 2, 4)
    assert num_steps(Heun(), 4) == 2
    with pytest.raises(UserError, match="nfe = 3"):
        check(Heun(), EXACT, 2, 3, 4)


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ({"kind": "hopp"}, ()),
        ({"kind": "euler", "m": 0.5}, ("euler", "m")),
        ({"kind": "restart", "m": 1.0}, ("restart", "m")),
        ({"kind": "restart", "m": 0.0}, ("restart", "m")),
        ({"kind": "restart", "m": 0.6, "start": 0.5}, ("restart",)),
        ({"kind": "hop", "start": 1.01}, ("hop", "start")),
        ({"kind": "hop", "start": 0.0}, ("hop", "start")),
    ],
)
def test_wrong_specs_are_refused(given: dict[str, object], at: tuple[str, ...]) -> None:
    family: TypeAdapter[Solver] = TypeAdapter(Solver)
    with pytest.raises(ValidationError) as refused:
        family.validate_python(given)
    assert refused.value.errors()[0]["loc"] == ("bundled", *at)
