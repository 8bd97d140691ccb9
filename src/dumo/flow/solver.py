"""Solvers: how noise becomes data with a trained net, each from one of the readings a net may give.

Euler and Heun follow the velocity, dx_t/dt = v(x_t, t), down a uniform grid. Hop follows the flow map,
x_s = f(x_t, t, s), down the same grid, with no error of its own. Restart takes the endpoint x_0 and, if passes are
left, noises it again to a lower time with fresh noise: what the net got wrong at high noise is drawn anew. Hermite
reads velocity and endpoint of one pass: it follows the flow down to the last time, and jumps from there.

With n steps the uniform grid has the n + 1 times start, ..., start / n, 0. Solvers that end with a jump to the data
visit n times, the last of them above 0: the uniform grid s = 1, (n - 1) / n, ..., 1 / n, bent by a power t = start s^p
so that m is the time at s = 1/2. Solved for p this reads t = start (m / start)^log2(1 / s), exact at s = 1 and s = 1/2.

A solver is asked for a number of passes through the net (nfe), not of steps. What it cannot make it refuses.

The order of events:

1. `solver_of` takes the one that somebody names, else `best_solver` picks one by what an objective teaches.
2. Before any work, `check` refuses a reading that was never taught, and an nfe that cannot be made; `can_make` answers
   that question without raising.
3. A solver, called, makes samples, and refuses what `check` refuses. It takes its reading by `require_reading`, its
   number of steps by `num_steps`, and its times by `uniform_times` or `jump_times`, as tensors by `times_per_row`.

`Solver` is the union of the specs; one of a user's own derives from `dumo.types.outside.SolverSpec`.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from math import log2
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Discriminator, Field, Tag, model_validator

from dumo.flow.path import FlowPath
from dumo.runtime import signals
from dumo.runtime.limits import PASSES
from dumo.types import QUIET, Cond, Readings, Sample, Spec, Time, UserError, lift
from dumo.types.outside import BUNDLED, OUTSIDE, Outside, SolverSpec, branch, members

Fresh = Callable[[int], Sample]  # k -> the k-th draw of noise for these rows; draw 0 is the x a solver starts from
Reading = Literal["velocity", "endpoint", "flow_map", "both"]  # the fields of Readings
Start = Annotated[float, Field(gt=0, le=1, json_schema_extra=QUIET)]  # the first time, at or just below 1


def uniform_times(n: int, start: float = 1.0) -> list[float]:
    """The n + 1 times from `start` to 0 that cut [0, start] into n equal steps."""
    return [start * ((n - k) / n) for k in range(n + 1)]


def jump_times(n: int, m: float = 0.5, start: float = 1.0) -> list[float]:
    """The n times of jumps to the data, falling from `start`; of two, the second is m, with 0 < m < start. Ours."""
    return [m if 2 * k == n else start * (m / start) ** log2(n / (n - k)) for k in range(n)]


def times_per_row(times: Sequence[float], like: Sample) -> list[Time]:
    """Each time as a tensor (b,), once per row of `like` (b, ...), on its device and of its type."""
    return [like.new_full((len(like),), t) for t in times]


class Stepper(Spec, ABC):
    """A solver that goes down a grid of equal steps."""

    passes: ClassVar[int]  # through the net, in a step

    def __call__(self, readings: Readings, path: FlowPath, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        return _last(self.trail(readings, x, c, nfe))

    @abstractmethod
    def trail(self, readings: Readings, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """x after every step, the data last. Raises UserError where reading or nfe is out of reach."""


class Euler(Stepper):
    """x_s = x_t - (t - s) v(x_t, t): order 1, one pass a step."""

    uses: ClassVar[Reading] = "velocity"
    passes: ClassVar[int] = 1

    kind: Literal["euler"] = "euler"

    def trail(self, readings: Readings, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """x after every step."""
        velocity = require_reading(self, readings)
        for t, s in pairwise(times_per_row(uniform_times(num_steps(self, nfe)), x)):
            x = x - lift(t - s, x) * velocity(x, t, c)
            yield x


class Heun(Stepper):
    """x_s = x_t - (t - s) (v(x_t, t) + v(x_s', s)) / 2, with x_s' by Euler: order 2, two passes a step."""

    uses: ClassVar[Reading] = "velocity"
    passes: ClassVar[int] = 2

    kind: Literal["heun"] = "heun"

    def trail(self, readings: Readings, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """x after every step."""
        velocity = require_reading(self, readings)
        for t, s in pairwise(times_per_row(uniform_times(num_steps(self, nfe)), x)):
            dt = lift(t - s, x)
            v = velocity(x, t, c)
            x = x - dt * (v + velocity(x - dt * v, s, c)) / 2
            yield x


class Hop(Stepper):
    """x_s = f(x_t, t, s): exact for an exact flow map, one pass a step."""

    uses: ClassVar[Reading] = "flow_map"
    passes: ClassVar[int] = 1

    kind: Literal["hop"] = "hop"
    start: Start = 1.0  # IMM on ImageNet: 0.994

    def trail(self, readings: Readings, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """x after every step."""
        check(self, readings, nfe)
        flow_map = require_reading(self, readings)
        for t, s in pairwise(times_per_row(uniform_times(nfe, self.start), x)):
            x = flow_map(x, t, s, c)
            yield x


class Restart(Spec):
    """Multistep consistency sampling: jump to the data; noise it again to a lower time, with fresh noise; jump again.

    Fresh noise is independent of x_0, so x_s has the law of its time.
    """

    uses: ClassVar[Reading] = "endpoint"
    passes: ClassVar[int] = 1

    kind: Literal["restart"] = "restart"
    # the second of two times; UCGM: 0.3 and 0.5 with SD-VAE at 256 and 512 pixels, 0.6 with DC-AE
    m: float = Field(default=0.5, gt=0, lt=1)
    start: Start = 1.0  # UCGM: 0.999 with SD-VAE; consistency models: sigma = 80

    @model_validator(mode="after")
    def _require_falling_times(self) -> "Restart":
        if self.m >= self.start:
            raise ValueError(f"m = {self.m} is not below start = {self.start}: lower m")
        return self

    def times(self, n: int) -> list[float]:
        """The n times of its jumps in n passes, falling."""
        return jump_times(n, self.m, self.start)

    def __call__(self, readings: Readings, path: FlowPath, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
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
    """Follow the parabola that leaves x_t with slope v and ends in x_0 to each next time; from the last, jump (ours).

    At s the flow is at x_s = x_0 + s u_s, where u = (x_t - x_0) / t and t du/dt = v - u. To first order in t - s

        u_s = u - (t - s) (v - u) / t        so        x_s = x_t - (t - s) v + (t - s)^2 (v - u) / t,

    the Hermite interpolant of x_t, v and x_0. Its error is s (t - s)^2 / 6 times a third derivative of the flow, where
    Euler's is (t - s)^2 / 2 times a second one: of order 1, too, but none at the data.
    """

    uses: ClassVar[Reading] = "both"
    passes: ClassVar[int] = 1

    kind: Literal["hermite"] = "hermite"

    def __call__(self, readings: Readings, path: FlowPath, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        both = require_reading(self, readings)
        times = times_per_row(jump_times(num_steps(self, nfe)), x)
        for t, s in pairwise(times):
            v, x_0 = both(x, t, c)
            u = (x - x_0) / lift(t, x)
            x = x - lift(t - s, x) * v + lift((t - s) ** 2 / t, x) * (v - u)
        return both(x, times[-1], c)[1]


# The solver of each reading; first those that make most of few passes
_SOLVER_BY_READING: dict[Reading, type[Hop | Restart | Euler]] = {
    "flow_map": Hop,
    "endpoint": Restart,
    "velocity": Euler,
}


def best_solver(readings: Readings) -> Hop | Restart | Euler:
    """The solver that makes most of few passes, among those whose reading was taught."""
    usable = [solver for reading, solver in _SOLVER_BY_READING.items() if getattr(readings, reading) is not None]
    best = usable[0]  # every objective teaches one of these readings
    return best()


BundledSolver = Annotated[Euler | Heun | Restart | Hop | Hermite, Field(discriminator="kind"), Tag(BUNDLED)]
OutsideSolver = Annotated[SolverSpec, Outside(SolverSpec, BundledSolver), Tag(OUTSIDE)]
Solver = Annotated[BundledSolver | OutsideSolver, Discriminator(branch)]


def solver_of(solver: object) -> Solver:
    """A solver by its name, with its defaults; one that is built as it is. Raises UserError for anything else."""
    if isinstance(solver, Spec):
        return cast("Solver", solver)
    if not isinstance(solver, str):
        raise UserError(f"solver = {solver!r}: give a name, such as 'heun', or one of dumo.flow.solver, such as Heun()")
    by_kind = {cls.model_fields["kind"].default: cls for cls in members(Solver)}
    if solver not in by_kind:
        raise UserError(f"there is no solver '{solver}': use one of {', '.join(by_kind)}")
    return cast("Solver", by_kind[solver]())


def _last(xs: Iterable[Sample]) -> Sample:
    """The last of some samples; it holds one at a time."""
    return deque(xs, maxlen=1).pop()


def require_reading(solver: Solver, readings: Readings) -> Callable[..., Any]:
    """The reading that the solver uses; a call of it raises Stopped once a stop is asked for.

    Raises UserError if it was never taught.
    """
    read: Callable[..., Any] | None = getattr(readings, solver.uses)
    if read is None:
        needs = "velocity and endpoint of one pass" if solver.uses == "both" else solver.uses
        raise UserError(
            f"solver '{solver.kind}' needs the {needs}, which this objective never teaches: use solver "
            f"'{best_solver(readings).kind}'"
        )

    def stoppable(*values: object) -> Any:  # noqa: ANN401, as the reading
        signals.check()
        return read(*values)

    return stoppable


def num_steps(solver: Solver, nfe: int) -> int:
    """The number of steps that make nfe passes. Raises UserError if no number does."""
    if not 1 <= nfe <= PASSES:
        raise UserError(f"nfe must be between 1 and {PASSES}, got nfe = {nfe}")
    if nfe % solver.passes:
        raise UserError(f"solver '{solver.kind}' needs an nfe that is divisible by {solver.passes}, got nfe = {nfe}")
    return nfe // solver.passes


def check(solver: Solver, readings: Readings, *nfes: int) -> None:
    """Raise UserError, before any work, for a reading that was never taught and for an nfe that cannot be made."""
    require_reading(solver, readings)
    for nfe in nfes:
        num_steps(solver, nfe)
        if not _stays_where_taught(solver, readings, nfe):
            raise UserError(
                f"solver '{solver.kind}' of nfe = {nfe} goes below t = {readings.lowest:g}, where the endpoint was "
                "never taught: take nfe = 1, or a larger m"
            )
        if not can_make(solver, readings, nfe):
            raise UserError(
                f"solver '{solver.kind}' of nfe = {nfe} makes jumps that this objective never teaches: take nfe = 1, "
                "start = 1, or another solver"
            )


def can_make(solver: Solver, readings: Readings, nfe: int) -> bool:
    """Whether a solver whose reading was taught can make nfe passes: in whole steps, and only by what was taught."""
    if nfe < 1 or nfe % solver.passes:
        return False
    if not _stays_where_taught(solver, readings, nfe):
        return False
    hops = readings.hops
    if not isinstance(solver, Hop) or hops is None:
        return True
    return all(hops(t, s) for t, s in pairwise(uniform_times(nfe, solver.start)))


def _stays_where_taught(solver: Solver, readings: Readings, nfe: int) -> bool:
    """Whether the endpoint was taught at all times at which a solver reads it in nfe passes."""
    if not isinstance(solver, Restart) or not readings.lowest:
        return True
    return min(solver.times(nfe)) >= readings.lowest
