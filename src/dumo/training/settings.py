"""`Train`: the field `train` of a run. Defaults are the paper's, if it specifies them."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dumo.flow.noisy_batch import Coupling
from dumo.flow.precision import Precision
from dumo.runtime.limits import MINUTES, ROWS, STEPS
from dumo.training.ema import Average, Ema
from dumo.training.optim import AdamW, Optimizer
from dumo.training.schedule import Constant, LearningRateSchedule
from dumo.types import CHANGES, FREE, MACHINE, QUIET, Spec

Compile = Literal["none", "blocks", "loss"]


class Train(Spec):
    """The settings of training. A resumed run may change FREE, MACHINE and CHANGES fields; CHANGES are recorded.

    QUIET fields are hidden at their default.
    """

    # The total number of optimizer steps, over which schedules extend.
    steps: int = Field(ge=1, le=STEPS, json_schema_extra=FREE)
    # The time limit in minutes, in total. Schedules then extend over this time, and `steps` only scales the warmup.
    # None means no time limit.
    minutes: float | None = Field(
        default=None,
        gt=0,
        le=MINUTES,
        allow_inf_nan=False,
        exclude_if=lambda minutes: minutes is None,
        json_schema_extra=CHANGES,
    )
    batch: int = Field(ge=1, le=ROWS)  # rows per step, over all ranks
    # Noise-data coupling (Pooladian et al. 2023). None means independent noise, as in the paper.
    coupling: Coupling | None = None
    # Rows per pass on a rank, to save memory. None means all rows of a rank. Changes only rounding.
    micro_batch: int | None = Field(default=None, ge=1, json_schema_extra=MACHINE)
    # The number of ranks over which weights, averages and optimizer are sharded, to save memory. 1 means a replica per
    # rank, the number of ranks means one replica, and values in between mean a replica per group.
    share: int = Field(default=1, ge=1, json_schema_extra=MACHINE)
    # Free gathered weights after each pass and gather them again, which trades communication for memory.
    reshard: bool = Field(default=False, json_schema_extra=MACHINE)
    optimizer: Optimizer = AdamW()
    # The dtype of trained weights. bfloat16 needs precision bf16 and adamw8bit, which rounds stochastically.
    weights: Literal["float32", "bfloat16"] = Field(default="float32", json_schema_extra=QUIET)
    schedule: LearningRateSchedule = Field(default=Constant(), json_schema_extra=CHANGES)
    # App. C.1. The first average is used for sampling and evaluation, or the weights if there is none.
    ema: tuple[Average, ...] = (Ema(decay=0.9999),)
    # theta^- (Alg. 1): the current weights, or the average with this decay.
    ref: Literal["self"] | float = "self"
    # The maximum norm of the gradient. None means no clipping, as in the paper.
    clip: float | None = Field(default=None, gt=0, json_schema_extra=CHANGES)
    compile: Compile = Field(default="none", json_schema_extra=MACHINE)  # blocks or loss, on a GPU; changes rounding
    # tf32 rounds the factors of matrix products on a GPU, and bf16 is autocast of the loss. Neither changes the dtype
    # of weights, optimizer and averages.
    precision: Precision = Field(default="fp32", json_schema_extra=CHANGES)
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)
    log_every: int = Field(default=50, ge=1, json_schema_extra=MACHINE)  # steps
    # Write samples to sheets/ after these steps, or after every n-th step.
    sheets: PositiveInt | tuple[PositiveInt, ...] = Field(default=(), json_schema_extra=MACHINE)
    save_every: int = Field(default=1000, ge=1, json_schema_extra=MACHINE)  # steps
    # Also save a checkpoint after this many minutes. None disables it.
    save_minutes: float | None = Field(default=10.0, gt=0, json_schema_extra=MACHINE)
    # The number of checkpoints to keep, in addition to the last good one.
    keep: int = Field(default=2, ge=1, json_schema_extra=MACHINE)
    # Training ends after this many consecutive steps with a non-finite loss or gradient.
    max_skips: int = Field(default=3, ge=1, json_schema_extra=MACHINE)
    # Steps whose weights are kept.
    milestones: tuple[NonNegativeInt, ...] = Field(default=(), json_schema_extra=MACHINE)

    @model_validator(mode="after")
    def _require_fit(self) -> "Train":
        keys = [ema.key for ema in self.ema]
        if len({*keys}) < len(keys):
            raise ValueError(f"ema has a duplicate average: {keys}")
        if self.ref != "self" and self.ref not in keys:
            raise ValueError(f"ref = {self.ref} must be the decay of an average in ema, which has {keys or 'none'}")
        if self.weights == "bfloat16" and (self.optimizer.kind != "adamw8bit" or self.precision != "bf16"):
            raise ValueError(
                "weights=bfloat16 needs optimizer.kind=adamw8bit and precision=bf16: set both, or weights=float32"
            )
        return self

    @property
    def first_saved_step(self) -> int:
        """The first step after which a checkpoint is saved, regardless of time."""
        # With a time limit, the last step is unknown.
        if self.minutes is not None:
            return self.save_every
        return min(self.save_every, self.steps)

    def is_sheet_due(self, step: int) -> bool:
        """Return whether samples are written after this step."""
        if isinstance(self.sheets, int):
            return step % self.sheets == 0
        return step in self.sheets
