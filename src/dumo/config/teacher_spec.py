"""The specs of a teacher, whose trained weights give the targets of a run, and of a start, which initializes a run.

With `teacher`, the target v_t = dx_t/dt, which is computed from data and noise, is replaced with the teacher's velocity
V(x_t, t, c), guided with `guide`. sCT becomes sCD, and MeanFlow and FACM become their distilled forms. For rows with a
dropped label, the teacher is evaluated without label.

A teacher of kind `base` is the network in training with its adapters disabled, so no second network is in memory. With
a subject's adapters (`net.lora.subject`) the base is a few-step run, whose objective determines its readings. Some
objectives train only jumps, so their runs have no velocity and cannot be the teacher.

With `pairs`, the teacher generates samples once before training. Each sample x is paired with its noise z, and the run
is trained on these pairs (Reflow, Liu et al. 2023; Re-MeanFlow).
"""

from math import ceil
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dumo.flow.guide import CFG
from dumo.flow.solver import Heun
from dumo.runtime.limits import SAMPLES
from dumo.types import HUB_MODEL, MAYBE_PLACE, PINNED, QUIET, FromTeacher, Spec


class Pairs(Spec):
    """Samples of the teacher with their noise, generated before the first step and stored in the run's folder."""

    solver: ClassVar[Heun] = Heun()  # our choice
    count: int = Field(default=50_000, ge=1, le=SAMPLES)  # our choice; Reflow uses a million on CIFAR-10

    def passes(self, points: int | None) -> int:
        """Return the number of passes of the teacher per pair.

        The solver makes at least 16 steps (our choice), a multiple of `points`, which is the number of equal steps of a
        trajectory whose ends the objective uses (None or 0 if it uses none).
        """
        points = points or 1
        return self.solver.passes * points * ceil(16 / points)


class Teacher(Spec):
    """A trained network: that of a run, the result of a user's function, or the network without its adapters."""

    kind: Literal["run", "python", "base"] = "run"
    # run: a run's folder, or a run on the Hub. python: module:function, which is called with the run and the device and
    # returns `dumo.types.Readings`. base: "". The path may change, because the weights are identified by their hash.
    source: str = Field(default="", json_schema_extra=MAYBE_PLACE | HUB_MODEL)
    guide: CFG = Field(default=CFG(), json_schema_extra=QUIET)  # guides the teacher's velocity, as in sampling
    pairs: Pairs | None = None  # train on stored pairs or trajectories instead

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
        """Return whether a loss with these needs receives the teacher's velocity, possibly besides pairs."""
        return not self.pairs or (needs.points > 0 and needs.velocity != "no")


class Start(Spec):
    """The initial weights of training: those of a run, or published DiT weights (`dumo.nets.dit_convert`)."""

    # run: all weights with names that both networks have. sit: all weights, because SiT predicts a velocity. dit: only
    # the trunk, because DiT predicts noise.
    kind: Literal["run", "sit", "dit"] = "run"
    # run: a run's folder. sit, dit: a safetensors file with the authors' names of the weights. All may be names on the
    # Hub.
    source: str = Field(json_schema_extra={"where": "maybe"} | HUB_MODEL)
    # Heads to initialize from other heads of the source: {u: v} initializes u with the source's v.
    heads: dict[str, str] = Field(default_factory=dict[str, str])
    # A hash of the source's weights if they remain part of the network (`net.lora.subject`), set when a run starts.
    sha256: str | None = Field(default=None, exclude_if=lambda known: known is None, json_schema_extra=PINNED)
