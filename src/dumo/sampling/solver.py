"""Solvers: how noise becomes data with a trained net, each from one of the three readings a net may give.

Euler and Heun follow the velocity, dx_t/dt = v(x_t, t), down a uniform grid. Hop follows the flow map,
x_s = f(x_t, t, s), down the same grid, with no error of its own. Restart asks for the endpoint x_0 and, if passes are
left, noises it again to a lower time with fresh noise: what the net got wrong at high noise is drawn anew.

A solver is asked for a number of passes through the net (nfe), not of steps. What it cannot make it refuses.

It looks at the net at times from noise, t = `start` at or just below 1, down to data, t = 0: with n steps at the n + 1
times start, ..., start / n, 0. Restart visits n times, the last of them above 0. Its uniform grid s = 1, (n - 1) / n,
..., 1 / n is bent by a power, t = start s^p, and the one number that says how much is m, the time at s = 1/2:
start (1/2)^p = m. Solved for p, this reads t = start (m / start)^log2(1 / s), which at s = 1 and s = 1/2 is exact.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log2
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from dumo import stop
from dumo.bound import PASSES
from dumo.types import Cond, Path, Reads, Sample, Spec, Time, UserError, lift

Fresh = Callable[[int], Sample]  # k -> the k-th draw of noise for these rows; draw 0 is the x a solver starts from
Reading = Literal["velocity", "endpoint", "flow_map"]  # the fields of Reads
FAR = 1000  # passes up to which others are looked for: ours
Start = Annotated[float, Field(gt=0, le=1)]  # the first time; UCGM starts at 0.999 with SD-VAE


def uniform(n: int, start: float = 1.0) -> list[float]:
    """The n + 1 times from `start` to 0 that cut [0, start] into n equal steps."""
    return [start * ((n - k) / n) for k in range(n + 1)]


def jumps(n: int, m: float = 0.5, start: float = 1.0) -> list[float]:
    """The n times of the jumps to the data, for 0 < m < start: two of them are (start, m). Ours."""
    return [start * (m / start) ** log2(n / (n - k)) for k in range(n)]


def rows(times: Sequence[float], like: Sample) -> list[Time]:
    """Each time, once per row of `like`, on its device and in its precision."""
    return [like.new_full((len(like),), t) for t in times]


class Euler(Spec):
    """x_s = x_t - (t - s) v(x_t, t): order 1, one pass a step."""

    uses: ClassVar[Reading] = "velocity"
    passes: ClassVar[int] = 1

    kind: Literal["euler"] = "euler"
    start: Start = 1.0

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        velocity = taught(self, reads)
        for t, s in pairwise(rows(uniform(steps(self, nfe), self.start), x)):
            x = x - lift(t - s, x) * velocity(x, t, c)
        return x


class Heun(Spec):
    """x_s = x_t - (t - s) (v(x_t, t) + v(x_s', s)) / 2, with x_s' by Euler: order 2, two passes a step."""

    uses: ClassVar[Reading] = "velocity"
    passes: ClassVar[int] = 2

    kind: Literal["heun"] = "heun"
    start: Start = 1.0

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes, evenly many. Raises UserError where reading or nfe is out of reach."""
        velocity = taught(self, reads)
        for t, s in pairwise(rows(uniform(steps(self, nfe), self.start), x)):
            dt = lift(t - s, x)
            v = velocity(x, t, c)
            x = x - dt * (v + velocity(x - dt * v, s, c)) / 2
        return x


class Restart(Spec):
    """Jump to the data; noise it again to a lower time; jump again (multistep consistency sampling)."""

    uses: ClassVar[Reading] = "endpoint"
    passes: ClassVar[int] = 1

    kind: Literal["restart"] = "restart"
    m: float = Field(
        default=0.5, gt=0, lt=1
    )  # time of the second of two jumps; ours; UCGM: 0.3 for SD-VAE at 256, 0.5 at 512, 0.6 for DC-AE
    start: Start = 1.0

    @model_validator(mode="after")
    def _descends(self) -> "Restart":
        if self.m >= self.start:
            raise ValueError(f"m = {self.m} is not below start = {self.start}: lower m")
        return self

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        endpoint = taught(self, reads)
        first, *later = rows(jumps(steps(self, nfe), self.m, self.start), x)
        x = endpoint(x, first, c)
        for k, t in enumerate(later, start=1):
            x_t, _ = path.at(x, fresh(k), t)
            x = endpoint(x_t, t, c)
        return x


class Hop(Spec):
    """x_s = f(x_t, t, s): exact for an exact flow map, one pass a step."""

    uses: ClassVar[Reading] = "flow_map"
    passes: ClassVar[int] = 1

    kind: Literal["hop"] = "hop"
    start: Start = 1.0

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        check(self, reads, nfe)
        flow_map = taught(self, reads)
        for t, s in pairwise(rows(uniform(nfe, self.start), x)):
            x = flow_map(x, t, s, c)
        return x


Solver = Annotated[Euler | Heun | Restart | Hop, Field(discriminator="kind")]


def taught(solver: Solver, reads: Reads) -> Callable[..., Sample]:
    """The reading that the solver uses, which raises Stopped where that is asked.

    Raises UserError, with the solvers that would do, if it was never taught.
    """
    read: Callable[..., Sample] | None = getattr(reads, solver.uses)
    if read is None:
        given = [name for name in get_args(Reading) if getattr(reads, name) is not None]
        able = [s.model_fields["kind"].default for s in get_args(get_args(Solver)[0]) if s.uses in given]
        raise UserError(
            f"solver '{solver.kind}' needs {solver.uses}; this objective gives {', '.join(given)}: use {_either(able)}"
        )

    def asked(*values: object) -> Sample:
        stop.check()
        return read(*values)

    return asked


def steps(solver: Solver, nfe: int) -> int:
    """The number of steps that make nfe passes. Raises UserError if no number does."""
    if nfe < 1:
        raise UserError(f"nfe = {nfe} makes no sample: ask for at least {solver.passes}")
    if nfe > PASSES:
        raise UserError(f"nfe = {nfe:,} is more passes than any sample takes: ask for at most {PASSES:,}")
    if nfe % solver.passes:
        above = nfe + solver.passes - nfe % solver.passes
        raise UserError(
            f"solver '{solver.kind}' makes {solver.passes} passes a step, so nfe = {nfe} is out of its reach: "
            f"ask for {above}, or use a solver of one pass a step"
        )
    return nfe // solver.passes


def check(solver: Solver, reads: Reads, *nfes: int) -> None:
    """Refuse, before any work, a reading that was never taught and passes that cannot be made. Raises UserError."""
    taught(solver, reads)
    for nfe in nfes:
        steps(solver, nfe)
        if isinstance(solver, Hop):
            _reach(solver, reads, nfe)


def able(solver: Solver, reads: Reads, nfe: int) -> bool:
    """Whether a solver whose reading was taught can make so many passes: in whole steps, and no jump never taught."""
    if nfe < 1 or nfe % solver.passes:
        return False
    hops = reads.hops if isinstance(solver, Hop) else None
    return hops is None or all(hops(t, s) for t, s in pairwise(uniform(nfe, solver.start)))


def _reach(solver: Hop, reads: Reads, nfe: int) -> None:
    """Refuse jumps that were never taught, with a UserError."""
    if not able(solver, reads, nfe):
        others = [str(n) for n in range(1, min(2 * nfe, FAR) + 1) if able(solver, reads, n)]
        way_out = f"nfe = {_either(others[-2:])}" if others else "start = 1"
        raise UserError(
            f"solver 'hop' of nfe = {nfe} from t = {solver.start:g} makes jumps that this objective never teaches: ask "
            f"for {way_out}" + ", or use euler" * (reads.velocity is not None)
        )


def _either(names: list[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
