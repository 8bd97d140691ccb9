"""How to train, as a value: `Train`, the field `train` of a run, with the defaults of the paper where it has any.

Its methods say after which steps something is due.
"""

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
    """How to train. When a run is resumed, FREE and MACHINE fields may change, and CHANGES, which are then noted.

    QUIET fields are not shown at their default.
    """

    # Optimizer steps in total; schedules stretch with it.
    steps: int = Field(ge=1, le=STEPS, json_schema_extra=FREE)
    # Minutes of training in all, after which it ends. The schedule then stretches with time, and `steps` only scales
    # its warmup. None: it ends by steps.
    minutes: float | None = Field(
        default=None,
        gt=0,
        le=MINUTES,
        allow_inf_nan=False,
        exclude_if=lambda minutes: minutes is None,
        json_schema_extra=CHANGES,
    )
    batch: int = Field(ge=1, le=ROWS)  # rows per step, over all ranks
    # Which noise goes with which data (Pooladian et al. 2023); None: any, as the paper.
    coupling: Coupling | None = None
    # Rows of a pass on a rank, to save memory; None: all of a rank's. Changes rounding only.
    micro_batch: int | None = Field(default=None, ge=1, json_schema_extra=MACHINE)
    # The number of ranks that hold one replica of weights, averages and optimizer between them, to save memory. 1: each
    # rank has a replica; all ranks: each has a shard; between: a replica per group. With fewer ranks: all of them.
    share: int = Field(default=1, ge=1, json_schema_extra=MACHINE)
    # Free gathered weights after each pass and gather them again: less memory, more communication.
    reshard: bool = Field(default=False, json_schema_extra=MACHINE)
    optimizer: Optimizer = AdamW()
    # The type of trained weights. bfloat16 takes half the memory and needs precision bf16; adamw8bit rounds at random.
    weights: Literal["float32", "bfloat16"] = Field(default="float32", json_schema_extra=QUIET)
    schedule: LearningRateSchedule = Field(default=Constant(), json_schema_extra=CHANGES)
    ema: tuple[Average, ...] = (Ema(decay=0.9999),)  # App. C.1; the first is sampled and evaluated, the weights if none
    ref: Literal["self"] | float = "self"  # theta^- (Alg. 1): the weights in training, or the average of this decay
    # Largest norm of the gradient; None: no clipping, as the paper.
    clip: float | None = Field(default=None, gt=0, json_schema_extra=CHANGES)
    compile: Compile = Field(default="none", json_schema_extra=MACHINE)  # blocks or loss, on a GPU; changes rounding
    # tf32: on a GPU the factors of products are rounded; bf16: autocast of the loss. Neither changes the type of
    # weights, optimizer and averages.
    precision: Precision = Field(default="fp32", json_schema_extra=CHANGES)
    seed: int = Field(default=0, ge=0, json_schema_extra=QUIET)
    log_every: int = Field(default=50, ge=1, json_schema_extra=MACHINE)  # steps
    # Steps after which samples are drawn into sheets/; a number n: after every n-th.
    sheets: PositiveInt | tuple[PositiveInt, ...] = Field(default=(), json_schema_extra=MACHINE)
    save_every: int = Field(default=1000, ge=1, json_schema_extra=MACHINE)  # steps
    # Minutes after which a checkpoint is saved, too: the most that a sudden stop can lose. None: by steps alone.
    save_minutes: float | None = Field(default=10.0, gt=0, json_schema_extra=MACHINE)
    keep: int = Field(default=2, ge=1, json_schema_extra=MACHINE)  # checkpoints; and the last good one, if none is
    # Training stops after this many steps in a row whose loss or gradient is not finite.
    max_skips: int = Field(default=3, ge=1, json_schema_extra=MACHINE)
    milestones: tuple[NonNegativeInt, ...] = Field(default=(), json_schema_extra=MACHINE)  # steps whose weights stay

    @model_validator(mode="after")
    def _require_fit(self) -> "Train":
        keys = [ema.key for ema in self.ema]
        if len({*keys}) < len(keys):
            raise ValueError(f"ema has an average twice: {keys}")
        if self.ref != "self" and self.ref not in keys:
            raise ValueError(f"ref = {self.ref} must be the decay of an average in ema, which has {keys or 'none'}")
        if self.weights == "bfloat16" and (self.optimizer.kind != "adamw8bit" or self.precision != "bf16"):
            raise ValueError(
                "weights in bfloat16 need optimizer.kind adamw8bit and precision bf16: set both, or weights float32"
            )
        return self

    @property
    def first_saved_step(self) -> int:
        """The first step after which a checkpoint is saved, whatever the clock says."""
        if self.minutes is not None:  # it is not known which step is the last
            return self.save_every
        return min(self.save_every, self.steps)

    def is_sheet_due(self, step: int) -> bool:
        """Whether samples are drawn after this step."""
        if isinstance(self.sheets, int):
            return step % self.sheets == 0
        return step in self.sheets
