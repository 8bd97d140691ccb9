"""The specs of a teacher, whose trained weights give the targets of a run, and of a start, which initializes a run.

A teacher stands in for the data's own velocity: an objective that learns from v_t = dx_t/dt, given data and noise,
learns with `teacher` from V(x_t, t, c), guided as `guide` says. So sCT becomes sCD, and MeanFlow and FACM become their
distilled forms. Rows that lost their label have the teacher's velocity without one.

The teacher of kind `base` is the net in training with its adapters off, the model that it began as: no second net is
in memory. Under a subject's adapters (`net.lora.subject`) that is a few-step run, which is read as its own objective
says: some of these teach jumps alone, and have no velocity for others to learn.

With `pairs` the teacher makes samples once, before training: each sample x is paired with the noise z that it comes
from, and the run trains on these pairs (Reflow, Liu et al. 2023; Re-MeanFlow).
"""

from math import ceil
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dumo.flow.guide import CFG
from dumo.flow.solver import Heun
from dumo.runtime.limits import SAMPLES
from dumo.types import HUB_MODEL, MAYBE_PLACE, PINNED, QUIET, FromTeacher, Spec


class Pairs(Spec):
    """Samples of the teacher with their noise, made before the first step and kept in the run's folder."""

    solver: ClassVar[Heun] = Heun()  # that makes them: ours
    count: int = Field(default=50_000, ge=1, le=SAMPLES)  # ours; Reflow's on CIFAR-10 is a million

    def passes(self, points: int | None) -> int:
        """Passes through the teacher for each pair.

        The solver makes at least 16 steps (ours), as a multiple of `points`, the number of equal steps of a trajectory
        whose ends the objective learns from (None or 0: it learns from none).
        """
        points = points or 1
        return self.solver.passes * points * ceil(16 / points)


class Teacher(Spec):
    """A trained net: that of a run's folder, what a function of the user's returns, or the one that adapters tune."""

    kind: Literal["run", "python", "base"] = "run"
    # run: a run's folder, or a run on the Hub; python: module:function, which takes the run and the device and returns
    # `dumo.types.Readings`; base: "". The place is free to change, because the weights there are known by their hash.
    source: str = Field(default="", json_schema_extra=MAYBE_PLACE | HUB_MODEL)
    guide: CFG = Field(default=CFG(), json_schema_extra=QUIET)  # guides the teacher's velocity, as in sampling
    pairs: Pairs | None = None  # learn from whole trajectories instead

    @model_validator(mode="after")
    def _check_source(self) -> "Teacher":
        if self.kind != "base" and not self.source:
            raise ValueError(
                "source is missing: set it to a run's folder, or set teacher.kind=base to use the network without "
                "its adapters"
            )
        if self.kind == "base" and (self.source or self.pairs):
            raise ValueError("kind=base uses the network in training: remove teacher.source and teacher.pairs")
        return self

    def gives_velocity(self, needs: FromTeacher) -> bool:
        """Whether a loss of these needs is given the teacher's velocity in training, also next to its pairs."""
        return not self.pairs or (needs.points > 0 and needs.velocity != "no")


class Start(Spec):
    """Weights that training begins with: a run's, or published ones of a DiT (`dumo.nets.dit_convert`)."""

    # run: all weights that both nets have by name; sit: all weights, because it learned a velocity; dit: its trunk
    # alone, because it learned to predict noise
    kind: Literal["run", "sit", "dit"] = "run"
    # run: a run's folder; sit and dit: a safetensors file, with the names that its authors gave the weights. Each may
    # be a name on the Hub.
    source: str = Field(json_schema_extra={"where": "maybe"} | HUB_MODEL)
    # Heads that begin with the weights of another head of the source: {u: v} begins u as the source's v.
    heads: dict[str, str] = Field(default_factory=dict[str, str])
    # A hash of the source's weights, where they stay part of the net under `net.lora.subject`; found when a run begins.
    sha256: str | None = Field(default=None, exclude_if=lambda known: known is None, json_schema_extra=PINNED)
