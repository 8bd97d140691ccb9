"""Solvers: how noise becomes data with a trained net, each from one of the readings a net may give.

Euler and Heun follow the velocity, dx_t/dt = v(x_t, t), down a uniform grid. Hop follows the flow map,
x_s = f(x_t, t, s), down the same grid, with no error of its own. Restart asks for the endpoint x_0 and, if passes are
left, noises it again to a lower time with fresh noise: what the net got wrong at high noise is drawn anew. Hermite and
EulerJump ask for velocity and endpoint, of one pass: they follow the flow down to the last time, and jump from there.

A solver is asked for a number of passes through the net (nfe), not of steps. What it cannot make it refuses.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, model_validator

from dumo import stop
from dumo.bound import PASSES
from dumo.sampling.grid import Middle, Middles, Start, jumps, rows, uniform
from dumo.types import Cond, Path, Reads, Sample, Spec, Time, UserError, lift

Fresh = Callable[[int], Sample]  # k -> the k-th draw of noise for these rows; draw 0 is the x a solver starts from
Reading = Literal["velocity", "endpoint", "flow_map", "both"]  # the fields of Reads
FAR = 1000  # passes up to which others are looked for: ours
Share = Annotated[float, Field(ge=0, le=1)]


class Euler(Spec):
    """x_s = x_t - (t - s) v(x_t, t): order 1, one pass a step."""

    uses: ClassVar[Reading] = "velocity"
    passes: ClassVar[int] = 1

    kind: Literal["euler"] = "euler"
    start: Start = 1.0

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        return last(self.trail(reads, x, c, nfe))

    def trail(self, reads: Reads, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """x after every step, the data last. Raises UserError as the whole."""
        velocity = taught(self, reads)
        for t, s in pairwise(rows(uniform(steps(self, nfe), self.start), x)):
            x = x - lift(t - s, x) * velocity(x, t, c)
            yield x


class Heun(Spec):
    """x_s = x_t - (t - s) (v(x_t, t) + v(x_s', s)) / 2, with x_s' by Euler: order 2, two passes a step."""

    uses: ClassVar[Reading] = "velocity"
    passes: ClassVar[int] = 2

    kind: Literal["heun"] = "heun"
    start: Start = 1.0

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes, evenly many. Raises UserError where reading or nfe is out of reach."""
        return last(self.trail(reads, x, c, nfe))

    def trail(self, reads: Reads, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """x after every step, the data last. Raises UserError as the whole."""
        velocity = taught(self, reads)
        for t, s in pairwise(rows(uniform(steps(self, nfe), self.start), x)):
            dt = lift(t - s, x)
            v = velocity(x, t, c)
            x = x - dt * (v + velocity(x - dt * v, s, c)) / 2
            yield x


class Hop(Spec):
    """x_s = f(x_t, t, s): exact for an exact flow map, one pass a step."""

    uses: ClassVar[Reading] = "flow_map"
    passes: ClassVar[int] = 1

    kind: Literal["hop"] = "hop"
    start: Start = 1.0

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        return last(self.trail(reads, x, c, nfe))

    def trail(self, reads: Reads, x: Sample, c: Cond, nfe: int) -> Iterator[Sample]:
        """x after every step, the data last. Raises UserError as the whole."""
        check(self, reads, nfe)
        flow_map = taught(self, reads)
        for t, s in pairwise(rows(uniform(nfe, self.start), x)):
            x = flow_map(x, t, s, c)
            yield x


class Jumps(Spec):
    """What solvers share that end with a jump to the data: the times of their passes (`dumo.sampling.grid`)."""

    kind: Literal["restart", "hermite", "euler_jump"]
    m: Middle = 0.5  # time of the second of two passes; ours; UCGM: 0.3 for SD-VAE at 256, 0.5 at 512, 0.6 for DC-AE
    m_at: Middles = Field(default_factory=dict[int, float])  # another m at these numbers of passes; ours
    start: Start = 1.0

    @model_validator(mode="after")
    def _descends(self) -> "Jumps":
        if (m := max(self.m, *self.m_at.values(), 0)) >= self.start:
            raise ValueError(f"m = {m} is not below start = {self.start}: lower m")
        return self

    def times(self, n: int) -> list[float]:
        """Those of n passes."""
        return jumps(n, self.m_at.get(n, self.m), self.start)


class Restart(Jumps):
    """Jump to the data; noise it again to a lower time; jump again (multistep consistency sampling).

    Of the noise a share `rho`, by variance, is fresh; the rest is what the pass found in x_t:

        x_s = alpha(s) (sqrt(rho) z + sqrt(1 - rho) z_t) + gamma(s) x_0,   z_t = (x_t - gamma(t) x_0) / alpha(t).

    Fresh noise is independent of x_0, so x_s has the law of its time. z_t is not, so for rho < 1 it has not, however
    good the net is: at rho = 0 this is, on the linear path, an Euler step along u.
    """

    uses: ClassVar[Reading] = "endpoint"
    passes: ClassVar[int] = 1

    kind: Literal["restart"] = "restart"  # pyright: ignore[reportIncompatibleVariableOverride], told apart by it
    rho: Share = Field(default=1.0, exclude_if=lambda rho: rho == 1)  # UCGM's stochastic ratio, its code

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        endpoint = taught(self, reads)
        times = rows(self.times(steps(self, nfe)), x)
        x_0 = endpoint(x, times[0], c)
        for k, (t, s) in enumerate(pairwise(times), start=1):
            z = fresh(k)
            if self.rho < 1:
                z = sqrt(self.rho) * z + sqrt(1 - self.rho) * noise_in(x, x_0, path, t)
            x, _ = path.at(x_0, z, s)
            x_0 = endpoint(x, s, c)
        return x_0


class Hermite(Jumps):
    """Go along the parabola that leaves x_t with slope v and ends in x_0; from the last time, jump (ours).

    At s the flow is at x_s = x_0 + s u_s, where u = (x_t - x_0) / t and t du/dt = v - u. To first order in t - s

        u_s = u - (t - s) (v - u) / t        so        x_s = x_t - (t - s) v + (t - s)^2 (v - u) / t,

    the Hermite interpolant of x_t, v and x_0. Its error is s (t - s)^2 / 6 times a third derivative of the flow, where
    Euler's is (t - s)^2 / 2 times a second one: of order 1, too, but none at the data.

    With `rho` > 0 the step goes on to the lower noise level sqrt(1 - rho) s / (1 - s), and fresh noise leads back to s
    (gamma-sampling of CTM, Kim et al. 2024, with gamma^2 = rho): x_s keeps the law of its time, but for the error of
    the step. On the linear path; rho = 1 is Restart.
    """

    uses: ClassVar[Reading] = "both"
    passes: ClassVar[int] = 1

    kind: Literal["hermite"] = "hermite"  # pyright: ignore[reportIncompatibleVariableOverride], told apart by it
    rho: Share = 0.0

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        both = taught(self, reads)
        times = rows(self.times(steps(self, nfe)), x)
        for k, (t, s) in enumerate(pairwise(times), start=1):
            level = sqrt(1 - self.rho) * s / (1 - s)
            v, x_0 = both(x, t, c)
            x = parabola(x, v, x_0, t, level / (1 + level) if self.rho else s)
            if self.rho:
                x = lift((1 - s) * (1 + level), x) * x + sqrt(self.rho) * lift(s, x) * fresh(k)
        return both(x, times[-1], c)[1]


class EulerJump(Jumps):
    """Euler's steps along v, and from the last time the jump by u (ours)."""

    uses: ClassVar[Reading] = "both"
    passes: ClassVar[int] = 1

    kind: Literal["euler_jump"] = "euler_jump"  # pyright: ignore[reportIncompatibleVariableOverride], told apart by it

    def __call__(self, reads: Reads, path: Path, x: Sample, c: Cond, nfe: int, fresh: Fresh) -> Sample:
        """Carry noise x to data in nfe passes. Raises UserError where reading or nfe is out of reach."""
        both = taught(self, reads)
        times = rows(self.times(steps(self, nfe)), x)
        for t, s in pairwise(times):
            x = x - lift(t - s, x) * both(x, t, c)[0]
        return both(x, times[-1], c)[1]


Stepper = Euler | Heun | Hop  # they go down a grid of equal steps
Solver = Annotated[Euler | Heun | Restart | Hop | Hermite | EulerJump, Field(discriminator="kind")]


def noise_in(x_t: Sample, x_0: Sample, path: Path, t: Time) -> Sample:
    """The z of x_t = alpha(t) z + gamma(t) x_0, at t > 0."""
    none, one = torch.zeros_like(x_t), torch.ones_like(x_t)
    return (x_t - path.at(x_0, none, t)[0]) / path.at(none, one, t)[0]


def parabola(x_t: Sample, v: Sample, x_0: Sample, t: Time, s: Time) -> Sample:
    """Where the parabola from x_t, with slope v, to x_0 at time 0 is at time s."""
    u = (x_t - x_0) / lift(t, x_t)
    return x_t - lift(t - s, x_t) * v + lift((t - s) ** 2 / t, x_t) * (v - u)


def last(xs: Iterable[Sample]) -> Sample:
    """The last of them; none before it is kept."""
    return deque(xs, maxlen=1).pop()


def taught(solver: Solver, reads: Reads) -> Callable[..., Any]:
    """The reading that the solver uses, which raises Stopped where that is asked.

    Raises UserError, with the solvers that would do, if it was never taught.
    """
    read: Callable[..., Any] | None = getattr(reads, solver.uses)
    if read is None:
        given = [name for name in get_args(Reading) if getattr(reads, name) is not None]
        needs = "velocity and endpoint of one pass" if solver.uses == "both" else solver.uses
        told = ", ".join(name for name in given if name != "both")
        able = [s.model_fields["kind"].default for s in get_args(get_args(Solver)[0]) if s.uses in given]
        raise UserError(f"solver '{solver.kind}' needs {needs}; this objective gives {told}: use {_either(able)}")

    def asked(*values: object) -> Any:  # noqa: ANN401, as the reading
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
        if not high_enough(solver, reads, nfe):
            raise UserError(
                f"solver '{solver.kind}' of nfe = {nfe} goes below t = {reads.lowest:g}, where the endpoint was never "
                f"taught: ask for nfe = 1 or 2, with m = {reads.lowest:g}"
            )


def able(solver: Solver, reads: Reads, nfe: int) -> bool:
    """Whether a solver whose reading was taught can make so many passes: in whole steps, and no jump never taught."""
    if nfe < 1 or nfe % solver.passes or not high_enough(solver, reads, nfe):
        return False
    hops = reads.hops if isinstance(solver, Hop) else None
    return hops is None or all(hops(t, s) for t, s in pairwise(uniform(nfe, solver.start)))


def high_enough(solver: Solver, reads: Reads, nfe: int) -> bool:
    """Whether the endpoint was taught at all times at which a solver of so many passes asks for it."""
    return not (isinstance(solver, Jumps) and reads.lowest) or min(solver.times(nfe)) >= reads.lowest


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
