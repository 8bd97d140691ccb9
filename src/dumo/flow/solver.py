"""Solvers that integrate from noise to data with one of the readings of a trained network.

Euler and Heun integrate the velocity, dx_t/dt = v(x_t, t), on a uniform grid. Hop applies the flow map,
x_s = f(x_t, t, s), on the same grid, without a discretization error. Restart jumps to the endpoint x_0 and, except in
the last pass, adds fresh noise up to a lower time, which removes errors made at high noise. Hermite uses the velocity
and the endpoint of one pass: it integrates to the last time, and jumps to the data from there.

With n steps the uniform grid has the n + 1 times start, ..., start / n, 0. Solvers that end with a jump to the data
have n times, the last of them above 0: the uniform grid s = 1, (n - 1) / n, ..., 1 / n, warped by t = start s^p so that
t = m at s = 1/2. Solved for p, this is t = start (m / start)^log2(1 / s), exact at s = 1 and s = 1/2.

The number of evaluations (nfe) counts passes through the network, not steps.

1. `solver_of` returns a solver by its name, and `best_solver` one for the readings of an objective.
2. `check` raises UserError for unsupported readings and values of nfe; `can_make` is the same test without an error.
3. Calling a solver generates samples, with the same checks. It gets its reading from `require_reading`, its number of
   steps from `num_steps`, and its times from `uniform_times` or `jump_times`, as tensors from `times_per_row`.

`Solver` is the union of the specs; a user's own solver derives from `dumo.types.outside.SolverSpec`.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import isclose, log2
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Discriminator, Field, Tag, model_validator

from dumo.flow.path import FlowPath
from dumo.runtime import signals
from dumo.runtime.limits import PASSES
from dumo.types import QUIET, Cond, Readings, Sample, Spec, Time, UserError, lift
from dumo.types.outside import BUNDLED, OUTSIDE, Outside, SolverSpec, branch, members

# k -> the k-th draw of noise for these rows; draw 0 is the initial noise
Fresh = Callable[[int], Sample]
# The fields of Readings.
Reading = Literal["velocity", "endpoint", "flow_map", "both"]
# The first time, 1 or slightly below.
Start = Annotated[float, Field(gt=0, le=1, json_schema_extra=QUIET)]


def uniform_times(n: int, start: float = 1.0) -> list[float]:
    """Return the n + 1 times of n equal steps from `start` to 0."""
    return [start * ((n - k) / n) for k in range(n + 1)]


def jump_times(n: int, m: float = 0.5, start: float = 1.0) -> list[float]:
    """Return the n times of jumps to the data, decreasing from `start`; for n = 2, the second is m < start (ours)."""
    return [m if 2 * k == n else start * (m / start) ** log2(n / (n - k)) for k in range(n)]


def require_falling_times(m: float | None, start: float) -> None:
    """Raise ValueError if the second of two times is not below the first."""
    if m is not None and m >= start:
        raise ValueError(f"m = {m} must be less than start = {start}: decrease m")


def times_per_row(times: Sequence[float], like: Sample) -> list[Time]:
    """Return each time as a tensor (b,), on the device and in the dtype of `like` (b, ...)."""
    return [like.new_full((len(like),), t) for t in times]


class Stepper(Spec, ABC):
    """A solver on a grid of equal steps. `passes` is the number of passes through the network per step."""

    passes: ClassVar[int]

    def __call__(self, readings: Readings, path: FlowPath, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Integrate noise x to data in nfe passes. Raises UserError if the readings or nfe are not supported."""
        return _last(self.trail(readings, x, c, nfe))

    @abstractmethod
    def trail(self, readings: Readings, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """Yield x after every step, the data last. Raises UserError if the readings or nfe are not supported."""


class Euler(Stepper):
    """Euler's method, x_s = x_t - (t - s) v(x_t, t): order 1, one pass per step."""

    uses: ClassVar[Reading] = "velocity"
    passes: ClassVar[int] = 1

    kind: Literal["euler"] = "euler"

    def trail(self, readings: Readings, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """Yield x after every step."""
        velocity = require_reading(self, readings)
        for t, s in pairwise(times_per_row(uniform_times(num_steps(self, nfe)), x)):
            x = x - lift(t - s, x) * velocity(x, t, c)
            yield x


class Heun(Stepper):
    """Heun's method, x_s = x_t - (t - s) (v(x_t, t) + v(x_s', s)) / 2, x_s' by Euler: order 2, two passes per step."""

    uses: ClassVar[Reading] = "velocity"
    passes: ClassVar[int] = 2

    kind: Literal["heun"] = "heun"

    def trail(self, readings: Readings, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """Yield x after every step."""
        velocity = require_reading(self, readings)
        for t, s in pairwise(times_per_row(uniform_times(num_steps(self, nfe)), x)):
            dt = lift(t - s, x)
            v = velocity(x, t, c)
            x = x - dt * (v + velocity(x - dt * v, s, c)) / 2
            yield x


class Hop(Stepper):
    """Jumps x_s = f(x_t, t, s): exact for an exact flow map, one pass per step."""

    uses: ClassVar[Reading] = "flow_map"
    passes: ClassVar[int] = 1

    kind: Literal["hop"] = "hop"
    # IMM uses 0.994 on ImageNet.
    start: Start = 1.0
    # The second of two times, as of `Restart`; None means equal steps.
    m: float | None = Field(default=None, gt=0, lt=1, exclude_if=lambda m: m is None)

    @model_validator(mode="after")
    def _require_falling_times(self) -> "Hop":
        require_falling_times(self.m, self.start)
        return self

    def times(self, n: int) -> list[float]:
        """Return the n + 1 decreasing times of n jumps, the last of them 0."""
        return uniform_times(n, self.start) if self.m is None else [*jump_times(n, self.m, self.start), 0.0]

    def trail(self, readings: Readings, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """Yield x after every step."""
        check(self, readings, nfe)
        flow_map = require_reading(self, readings)
        for t, s in pairwise(times_per_row(self.times(nfe), x)):
            x = flow_map(x, t, s, c)
            yield x


class Restart(Spec):
    """Multistep consistency sampling: jump to the data, add fresh noise up to a lower time, and jump again.

    Fresh noise is independent of x_0, so x_s has the marginal distribution of its time.
    """

    uses: ClassVar[Reading] = "endpoint"
    passes: ClassVar[int] = 1

    kind: Literal["restart"] = "restart"
    # The second of two times. UCGM uses 0.3 and 0.5 with SD-VAE at 256 and 512 pixels, and 0.6 with DC-AE.
    m: float = Field(default=0.5, gt=0, lt=1)
    # UCGM uses 0.999 with SD-VAE; consistency models sigma = 80.
    start: Start = 1.0

    @model_validator(mode="after")
    def _require_falling_times(self) -> "Restart":
        require_falling_times(self.m, self.start)
        return self

    def times(self, n: int) -> list[float]:
        """Return the n decreasing times of the jumps in n passes."""
        return jump_times(n, self.m, self.start)

    def __call__(self, readings: Readings, path: FlowPath, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError if the readings or nfe are not supported."""
        check(self, readings, nfe)
        endpoint = require_reading(self, readings)
        times = path.nearest_net_times(self.times(num_steps(self, nfe)))
        t, *later_times = times_per_row(times, x)
        x_0 = endpoint(x, t, c)
        for k, s in enumerate(later_times, start=1):
            x, _ = path.at(x_0, fresh(k), s)
            x_0 = endpoint(x, s, c)
        return x_0


class Hermite(Spec):
    """Follow the parabola with slope v at x_t through x_0 to each next time, and jump from the last (our method).

    The flow has x_s = x_0 + s u_s, with u = (x_t - x_0) / t and t du/dt = v - u. To first order in t - s

        u_s = u - (t - s) (v - u) / t        so        x_s = x_t - (t - s) v + (t - s)^2 (v - u) / t,

    the Hermite interpolant of x_t, v and x_0. Its error is s (t - s)^2 / 6 times a third derivative of the flow, and
    Euler's is (t - s)^2 / 2 times a second derivative. Both are of order 1, but this one vanishes at the data.
    """

    uses: ClassVar[Reading] = "both"
    passes: ClassVar[int] = 1

    kind: Literal["hermite"] = "hermite"

    def __call__(self, readings: Readings, path: FlowPath, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError if the readings or nfe are not supported."""
        both = require_reading(self, readings)
        times = times_per_row(jump_times(num_steps(self, nfe)), x)
        for t, s in pairwise(times):
            v, x_0 = both(x, t, c)
            u = (x - x_0) / lift(t, x)
            x = x - lift(t - s, x) * v + lift((t - s) ** 2 / t, x) * (v - u)
        return both(x, times[-1], c)[1]


# The solver of each reading, best for few passes first.
_SOLVER_BY_READING: dict[Reading, type[Hop | Restart | Euler]] = {
    "flow_map": Hop,
    "endpoint": Restart,
    "velocity": Euler,
}


def best_solver(readings: Readings) -> Hop | Restart | Euler:
    """Return the best solver for few passes whose reading is available; every objective has at least one."""
    usable = [solver for reading, solver in _SOLVER_BY_READING.items() if getattr(readings, reading) is not None]
    best = usable[0]
    return best()


BundledSolver = Annotated[Euler | Heun | Restart | Hop | Hermite, Field(discriminator="kind"), Tag(BUNDLED)]
OutsideSolver = Annotated[SolverSpec, Outside(SolverSpec, BundledSolver), Tag(OUTSIDE)]
Solver = Annotated[BundledSolver | OutsideSolver, Discriminator(branch)]


def solver_of(solver: object) -> Solver:
    """Return a solver by its name, with default settings, or a given instance. Raises UserError for anything else."""
    if isinstance(solver, Spec):
        return cast("Solver", solver)
    if not isinstance(solver, str):
        raise UserError(f"solver = {solver!r}: use a name, such as 'heun', or an instance, such as Heun()")
    by_kind = {cls.model_fields["kind"].default: cls for cls in members(Solver)}
    if solver not in by_kind:
        raise UserError(f"unknown solver '{solver}': use one of {', '.join(by_kind)}")
    return cast("Solver", by_kind[solver]())


def _last(xs: Iterable[Sample]) -> Sample:
    """Return the last sample of an iterator, holding one at a time."""
    return deque(xs, maxlen=1).pop()


def require_reading(solver: Solver, readings: Readings) -> Callable[..., Any]:
    """Return the reading that the solver uses. Calling it raises Stopped after a stop signal.

    Raises UserError if the objective does not train it.
    """
    read: Callable[..., Any] | None = getattr(readings, solver.uses)
    if read is None:
        needs = "velocity and endpoint of one pass" if solver.uses == "both" else solver.uses
        raise UserError(
            f"solver '{solver.kind}' needs the {needs}, which this objective does not train: use solver "
            f"'{best_solver(readings).kind}'"
        )

    def stoppable(*values: object) -> Any:  # noqa: ANN401, as the reading
        signals.check()
        return read(*values)

    return stoppable


def num_steps(solver: Solver, nfe: int) -> int:
    """Return the number of steps for nfe passes. Raises UserError for an unsupported nfe."""
    if not 1 <= nfe <= PASSES:
        raise UserError(f"nfe must be between 1 and {PASSES}, got nfe = {nfe}")
    if nfe % solver.passes:
        raise UserError(f"solver '{solver.kind}' needs an nfe that is divisible by {solver.passes}, got nfe = {nfe}")
    return nfe // solver.passes


def check(solver: Solver, readings: Readings, *nfes: int) -> None:
    """Raise UserError if the solver does not support the readings or an nfe."""
    require_reading(solver, readings)
    for nfe in nfes:
        num_steps(solver, nfe)
        if readings.only and not _uses_trained_times(solver, readings, nfe):
            trained_times = ", ".join(f"{t:.4g}" for t in readings.only)
            raise UserError(
                f"solver '{solver.kind}' with nfe = {nfe} needs jumps from untrained times (trained: {trained_times}): "
                "set m and nfe to objective.times.m and objective.times.steps"
            )
        if not _uses_trained_times(solver, readings, nfe):
            raise UserError(
                f"solver '{solver.kind}' with nfe = {nfe} uses the endpoint below t = {readings.lowest:g}, where it "
                "was not trained: use nfe = 1, or a larger m"
            )
        if not can_make(solver, readings, nfe):
            raise UserError(
                f"solver '{solver.kind}' with nfe = {nfe} needs jumps that this objective does not train: use nfe = 1, "
                "start = 1, or another solver"
            )


def can_make(solver: Solver, readings: Readings, nfe: int) -> bool:
    """Return whether nfe passes are a whole number of steps and use only trained jumps."""
    if nfe < 1 or nfe % solver.passes:
        return False
    if not _uses_trained_times(solver, readings, nfe):
        return False
    hops = readings.hops
    if not isinstance(solver, Hop) or hops is None:
        return True
    return all(hops(t, s) for t, s in pairwise(solver.times(nfe)))


def _uses_trained_times(solver: Solver, readings: Readings, nfe: int) -> bool:
    """Return whether jumps were trained at all times at which a solver uses them in nfe passes."""
    if isinstance(solver, Hop) and readings.only is not None:
        trained_jumps = [*pairwise([*readings.only, 0.0])]
        return all(any(_equal_jumps(jump, other) for other in trained_jumps) for jump in pairwise(solver.times(nfe)))
    if not isinstance(solver, Restart):
        return True
    if readings.only is not None:
        return all(any(isclose(t, trained) for trained in readings.only) for t in solver.times(nfe))
    if not readings.lowest:
        return True
    return min(solver.times(nfe)) >= readings.lowest


def _equal_jumps(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two jumps (t, s) are equal up to rounding."""
    return isclose(a[0], b[0]) and isclose(a[1], b[1])
