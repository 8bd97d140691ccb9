"""How to train, as a value."""

from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from dumo.bound import ROWS, STEPS
from dumo.training.ema import Ema
from dumo.training.optim import AdamW, Constant, Optimizer, Schedule
from dumo.types import FREE, Spec

Precision = Literal["fp32", "bf16"]
Compile = Literal["none", "blocks", "loss"]


class Train(Spec):
    """How to train. Fields marked free may change when a run is resumed."""

    # In all, resumed ones included; schedules stretch with it.
    steps: int = Field(ge=1, le=STEPS, json_schema_extra=FREE)
    batch: int = Field(ge=1, le=ROWS)  # rows per step, over all ranks
    # Rows of a pass on a rank, to save memory; None: all of a rank's. Changes rounding only.
    micro_batch: int | None = Field(default=None, ge=1, json_schema_extra=FREE)
    # Ranks that hold one copy of weights, averages and optimizer between them, to save memory: 1: each its own copy
    # (replicated); all ranks: each a part (sharded); between: copies by groups (hybrid). Of fewer ranks, all.
    share: int = Field(default=1, ge=1, json_schema_extra=FREE)
    # Give the weights gathered from other ranks back after each pass and gather them anew: less memory, more talk.
    reshard: bool = Field(default=False, json_schema_extra=FREE)
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Constant()
    ema: tuple[Ema, ...] = (Ema(decay=0.9999),)  # App. C.1; the first is sampled and evaluated, the weights if none
    ref: Literal["self"] | float = "self"  # theta^- (Alg. 1): the weights in training, or the average of this decay
    clip: float | None = Field(default=None, gt=0)  # largest norm of the gradient; None: no clipping, as the paper
    compile: Compile = Field(default="none", json_schema_extra=FREE)  # changes rounding
    precision: Precision = "fp32"  # bf16: autocast of the loss; weights, optimizer and averages stay as they are
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=50, ge=1, json_schema_extra=FREE)  # steps
    probe_every: int = Field(default=250, ge=0, json_schema_extra=FREE)  # steps; 0: never
    save_every: int = Field(default=500, ge=1, json_schema_extra=FREE)  # steps
    keep: int = Field(default=2, ge=1, json_schema_extra=FREE)  # checkpoints
    milestones: tuple[NonNegativeInt, ...] = Field(default=(), json_schema_extra=FREE)  # steps whose weights stay

    @model_validator(mode="after")
    def _possible(self) -> "Train":
        decays = [ema.decay for ema in self.ema]
        if len(set(decays)) < len(decays):
            raise ValueError(f"ema has a decay twice: {decays}")
        if self.ref != "self" and self.ref not in decays:
            raise ValueError(f"ref is the average of decay {self.ref}, but ema has {decays or 'none'}")
        return self

    def rate(self, step: int) -> float:
        """The learning rate of the update that follows `step` done ones."""
        return self.optimizer.lr * self.schedule(step, self.steps)

    def probes(self, step: int) -> bool:
        """Whether the update that follows `step` done ones is probed."""
        return self.probe_every > 0 and (step + 1) % self.probe_every == 0
