"""Where a teacher's velocity comes from, and what is made of it.

A teacher stands in for the data's own velocity: every objective that learns from v_t = dx_t/dt, given data and noise,
learns with `teacher` from

    v_t + mix (V(x_t, t, c) - v_t),        mix = 1 being the teacher's V alone,

V guided as `guide` says. So sCT becomes sCD, and MeanFlow and FACM their distilled selves; UCGM's released recipe goes
past its teacher, mix = 2 up to t = 0.75, and takes the mean of both, 0.5, above. Rows that lost their label have the
teacher's velocity without one.

The teacher of kind `base` is the net in training itself with its adapters off, the model that it began as: no second
net is held.

With `weak` a worse teacher beside it shows where the mistakes lie (autoguidance, Karras et al. 2024), and

    V = V_weak + scale (V_strong - V_weak).

With `pairs` the teacher is asked once, for whole trajectories: its samples x are paired with the noise z that they come
from, and these are what is trained on (Reflow, Liu et al. 2023; Re-MeanFlow).
"""

from typing import Literal

from pydantic import Field, model_validator

from dumo.bound import FACTOR, PASSES, SAMPLES
from dumo.flow.guide import Interval
from dumo.sampling.guidance import CFG
from dumo.sampling.solver import Heun, Solver, Stepper
from dumo.types import Cond, Reads, Sample, Spec, Time, UserError


class Pairs(Spec):
    """Samples of the teacher with their noise, made before the first step and kept in the run's folder."""

    count: int = Field(default=50_000, ge=1, le=SAMPLES)  # ours; Reflow's on CIFAR-10 is a million
    solver: Solver = Heun()  # ours
    nfe: int = Field(default=32, ge=1, le=PASSES)  # passes of the teacher for each
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> "Pairs":
        if less := self.nfe % (a_step := self.solver.passes):
            raise ValueError(
                f"solver '{self.solver.kind}' makes {a_step} passes a step, so {self.nfe} are out of its reach: set "
                f"teacher.pairs.nfe={self.nfe + a_step - less}, or teacher.pairs.solver.kind=euler"
            )
        return self

    def check(self, points: int) -> None:
        """Raise UserError where the solver does not go so many equal steps, or a multiple."""
        solver = self.solver
        if not isinstance(solver, Stepper) or solver.start < 1:
            raise UserError(
                f"teacher.pairs.solver '{solver.kind}' from {solver.start:g} goes along no whole trajectory: set "
                "teacher.pairs.solver={kind: heun}"
            )
        if more := -self.nfe % (points * solver.passes):
            raise UserError(
                f"objective.times.steps = {points} equal steps are not among the "
                f"{self.nfe // solver.passes} of '{solver.kind}': set teacher.pairs.nfe={self.nfe + more}"
            )


class Weak(Spec):
    """A worse teacher, away from which the better one is led: another run, or an early file of its weights."""

    source: str  # a run's folder
    weights: str | None = None  # a file of the run's weights; None: those that it shows
    scale: float = Field(default=2.0, gt=1, le=FACTOR)  # ours

    def lead(self, strong: Reads, weak: Reads) -> Reads:
        """The velocity alone, led. Raises UserError where one of the two was never taught."""
        if (better := strong.velocity) is None or (worse := weak.velocity) is None:
            raise UserError(
                "teacher.weak leads a velocity, and one of the two teachers has none: set teacher.weak=null"
            )

        def led(x: Sample, t: Time, c: Cond) -> Sample:
            v = worse(x, t, c)
            return v + self.scale * (better(x, t, c) - v)

        return Reads(velocity=led)


class Teacher(Spec):
    """A trained net: that of a run's folder, what a function of the user's returns, or the one that adapters tune."""

    kind: Literal["run", "python", "base"] = "run"
    # A run's folder; module:function, which takes the run and the device and returns `dumo.types.Reads`; of base, none.
    source: str = ""
    weights: str | None = None  # a file of the run's weights; None: those that it shows
    guide: CFG = CFG()  # of the teacher, as in sampling
    weak: Weak | None = Field(default=None, exclude_if=lambda weak: weak is None)  # in the place of `guide`
    mix: float = Field(default=1.0, gt=0, le=FACTOR)  # weight of the teacher's velocity, where the data's has the rest
    interval: Interval = Interval()  # the times where that holds
    elsewhere: float = Field(default=1.0, ge=0, le=FACTOR)  # the weight at other times
    pairs: Pairs | None = None  # learn from whole trajectories instead

    @model_validator(mode="after")
    def _named(self) -> "Teacher":
        if self.kind != "base" and not self.source:
            raise ValueError(
                "source is missing: name a run's folder, or set teacher.kind=base for the net's adapters off"
            )
        if self.kind == "base" and (self.source or self.weights):
            raise ValueError("base is the net itself: leave teacher.source and teacher.weights out")
        if self.kind == "base" and self.pairs:
            raise ValueError("pairs are made by a net that is not in training: set teacher.kind=run and teacher.source")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> "Teacher":
        if self.weak and self.guide.active:
            raise ValueError("weak and guide would lead the teacher twice: set guide.scale=1, or weak=null")
        if self.pairs and (self.mix, self.elsewhere, self.interval) != (1, 1, Interval()):
            raise ValueError(
                "pairs are learned from as they are: leave mix and elsewhere at 1 and interval whole, or set "
                "teacher.pairs=null"
            )
        if self.interval != Interval() and self.mix == self.elsewhere:
            raise ValueError(
                f"interval says nothing where mix and elsewhere are both {self.mix:g}: set teacher.elsewhere, e.g. 0"
            )
        if self.kind == "python" and self.weights is not None:
            raise ValueError(
                f"weights = {self.weights} is a file of a run, and {self.source} a function: set teacher.weights=null, "
                "or teacher.kind=run"
            )
        return self


class Start(Spec):
    """Weights to begin with: those of a run by name, or published ones of a DiT's build (`dumo.nets.sit`)."""

    # run: all that the nets share; sit: a velocity, all of it; dit: it predicts noise, so its trunk alone
    kind: Literal["run", "sit", "dit"] = "run"
    source: str  # a run's folder; of sit and dit a safetensors file, under the names of their authors
    weights: str | None = None  # a file of the run's weights; None: those that it shows
    heads: dict[str, str] = Field(default_factory=dict[str, str])  # heads that begin as another of the source: {u: v}
    reverse: bool = True  # a sit counts time from noise to data, as SiT's authors do; REPA's is false

    @model_validator(mode="after")
    def _of_a_run(self) -> "Start":
        if self.kind != "run" and self.weights is not None:
            raise ValueError(f"weights = {self.weights} is a file of a run: name the file in start.source")
        return self
