"""Where a teacher's velocity comes from, and what is made of it.

A teacher stands in for the data's own velocity: an objective that learns from v_t = dx_t/dt, given data and noise,
learns with `teacher` from V(x_t, t, c), guided as `guide` says. So sCT becomes sCD, and MeanFlow and FACM their
distilled selves. Rows that lost their label have the teacher's velocity without one.

The teacher of kind `base` is the net in training itself with its adapters off, the model that it began as: no second
net is held. Under a subject's adapters (`net.lora.subject`) that is a few-step run, which is read as its own objective
says: some of these teach jumps alone, and have no velocity for others to learn.

With `pairs` the teacher is asked once, for whole trajectories: its samples x are paired with the noise z that they come
from, and these are what is trained on (Reflow, Liu et al. 2023; Re-MeanFlow).
"""

from math import ceil
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dumo.flow.guide import CFG
from dumo.flow.solver import Heun
from dumo.objectives import Objective
from dumo.runtime.bound import SAMPLES
from dumo.types import MAYBE_PLACE, PINNED, QUIET, Spec

OF_VELOCITY = ("dumo", "meanflow", "facm", "flow_matching")  # objectives to name where one without is refused


class Pairs(Spec):
    """Samples of the teacher with their noise, made before the first step and kept in the run's folder."""

    solver: ClassVar[Heun] = Heun()  # ours
    count: int = Field(default=50_000, ge=1, le=SAMPLES)  # ours; Reflow's on CIFAR-10 is a million

    def passes(self, points: int | None) -> int:
        """Passes of the teacher for each: 16 steps (ours), or more if an objective learns from `points` equal ones."""
        points = points or 1
        return self.solver.passes * points * ceil(16 / points)


class Teacher(Spec):
    """A trained net: that of a run's folder, what a function of the user's returns, or the one that adapters tune."""

    kind: Literal["run", "python", "base"] = "run"
    # A run's folder; module:function, which takes the run and the device and returns `dumo.types.Reads`; of base, none.
    source: str = Field(default="", json_schema_extra=MAYBE_PLACE)  # its weights are known by their hash
    guide: CFG = Field(default=CFG(), json_schema_extra=QUIET)  # of the teacher, as in sampling
    pairs: Pairs | None = None  # learn from whole trajectories instead

    @model_validator(mode="after")
    def _named(self) -> "Teacher":
        if self.kind != "base" and not self.source:
            raise ValueError(
                "source is missing: name a run's folder, or set teacher.kind=base for the net's adapters off"
            )
        if self.kind == "base" and (self.source or self.pairs):
            raise ValueError("base is the net in training: leave teacher.source and teacher.pairs out")
        return self


class Start(Spec):
    """Weights to begin with: those of a run by name, or published ones of a DiT's build (`dumo.nets.dit_convert`)."""

    # run: all that the nets share; sit: a velocity, all of it; dit: it predicts noise, so its trunk alone
    kind: Literal["run", "sit", "dit"] = "run"
    # A run's folder; of sit and dit a safetensors file, under the names of their authors.
    source: str = Field(json_schema_extra={"where": "maybe"})
    heads: dict[str, str] = Field(default_factory=dict[str, str])  # heads that begin as another of the source: {u: v}
    # Of the source's weights where they stay part of the net, under `net.lora.subject`; found when the run begins.
    sha256: str | None = Field(default=None, exclude_if=lambda known: known is None, json_schema_extra=PINNED)


def no_velocity(field: str, run: str, objective: Objective) -> str:
    """Why a run is refused as a teacher: its objective has no reading of a velocity."""
    return (
        f"{field}: the run {run} has no velocity to teach, because its objective '{objective.kind}' learns jumps "
        f"alone: take a run of an objective that learns a velocity, such as {', '.join(OF_VELOCITY)}"
    )
