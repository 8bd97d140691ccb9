"""Everything that an author of an objective imports.

    from dumo.objectives.base import Frozen, Needs, Net, NoisyBatch, ObjectiveSpec, Readings, Terms, Times, Uniform

Class: `ObjectiveSpec` is the base of objectives, and `Spec` that of groups of options. `Needs` declares the inputs and
heads of the network and the contents of a batch, with `Formulas` (`STRAIGHT`: also for diffusion paths) and
`FromTeacher`.

Loss: it gets a `Net`, theta^- as a `Frozen` network (`frozen` creates one) and a `NoisyBatch`, and returns `Terms`. A
`Guide` computes the target velocity. A `Slope` computes du/dt: `CentralSlope`, `DualSlope` or `JvpSlope`;
`heads_and_end_derivatives` computes du/dr, and `earlier_mean_velocity` a secant. `rows_at_rest` returns the rows whose
training pass gives V(c) to a `Guide`, and `heads_at_rest` makes it. `lift` shapes a number per row to multiply a
sample. `mean_square`, `adaptive_l2`, `normalized_l2`, `huber` and `cosine_distance` return a number per row;
`descent_error` returns an error with a given gradient; `clipped_share` and `head_gap` are metrics to log.
`require_precise_passes` refuses bf16 if the loss amplifies rounding errors. Code that selects rows of a batch uses
`index`, and `dropout.rows` for networks with dropout. Inside `fake_score`, passes are those of the fake score.

Random numbers: `Times` is the union of distributions of (t, r), such as `Pair`, `Jumps`, `Below`, `Gap`, `Grid`,
`Groups`, `Quarters`, `OfSampler`, `Beta`, `LogitNormal`, `Arctan` and `Uniform`; subclass `TimeLaw`, or `ToData` for t
with r = 0, to add one.
`Needs.laws` names further distributions: `Noise`, `Signs`, or a subclass of `Law` or `Number` (one number per row).

Readings: `Readings` contains the functions that a solver calls; `mean_velocity`, `velocity_and_jump` and `jump_to_data`
create them.

Shapes: `Sample` and `Cond` have a row per sample, `Time` and `PerSample` a number per sample.
"""

from abc import ABC, abstractmethod
from typing import Any

from pydantic import Field

from dumo.flow import dropout
from dumo.flow.compatibility import require_precise_passes
from dumo.flow.guide import Guide, Interval
from dumo.flow.linearize import heads_and_end_derivatives, heads_at_rest, rows_at_rest
from dumo.flow.noisy_batch import Noise, Signs
from dumo.flow.reading import jump_to_data, mean_velocity, velocity_and_jump
from dumo.flow.residual import (
    adaptive_l2,
    clipped_share,
    cosine_distance,
    descent_error,
    head_gap,
    huber,
    normalized_l2,
)
from dumo.flow.secant import earlier_mean_velocity
from dumo.flow.slope import CentralSlope, DualSlope, JvpSlope, Slope
from dumo.flow.times import (
    Arctan,
    Below,
    Beta,
    Gap,
    Grid,
    Groups,
    Jumps,
    LogitNormal,
    Number,
    OfSampler,
    Pair,
    Quarters,
    Times,
    ToData,
    Uniform,
)
from dumo.types import (
    STRAIGHT,
    Cond,
    Formulas,
    FromTeacher,
    Frozen,
    Law,
    Needs,
    Net,
    NoisyBatch,
    PerSample,
    Readings,
    Sample,
    Spec,
    Terms,
    Time,
    TimeLaw,
    UserError,
    fake_score,
    frozen,
    lift,
    mean_square,
)
from dumo.types.batch_rows import index

__all__ = [
    "STRAIGHT",
    "Arctan",
    "Below",
    "Beta",
    "CentralSlope",
    "Cond",
    "DualSlope",
    "Formulas",
    "FromTeacher",
    "Frozen",
    "Gap",
    "Grid",
    "Groups",
    "Guide",
    "Interval",
    "Jumps",
    "JvpSlope",
    "Law",
    "LogitNormal",
    "Needs",
    "Net",
    "Noise",
    "NoisyBatch",
    "Number",
    "ObjectiveSpec",
    "OfSampler",
    "Pair",
    "PerSample",
    "Quarters",
    "Readings",
    "Sample",
    "Signs",
    "Slope",
    "Spec",
    "Terms",
    "Time",
    "TimeLaw",
    "Times",
    "ToData",
    "Uniform",
    "UserError",
    "adaptive_l2",
    "clipped_share",
    "cosine_distance",
    "descent_error",
    "dropout",
    "earlier_mean_velocity",
    "fake_score",
    "frozen",
    "head_gap",
    "heads_and_end_derivatives",
    "heads_at_rest",
    "huber",
    "index",
    "jump_to_data",
    "lift",
    "mean_square",
    "mean_velocity",
    "normalized_l2",
    "require_precise_passes",
    "rows_at_rest",
    "velocity_and_jump",
]


class ObjectiveSpec(Spec, ABC):
    """The base class of objectives, which define how a network is trained and how a solver uses it.

    kind: a Literal, `module:Class`, or a name for an objective of dumo.
    times: the distribution of (t, r): one of `Times`, or a subclass of `TimeLaw`.
    drop: the probability that a row's condition is dropped.
    """

    kind: Any
    times: Any
    drop: float = Field(default=0.0, ge=0, le=1)

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The inputs and heads of the network, and the other needs of the loss."""

    @abstractmethod
    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the loss of each row of a batch, without drawing random numbers and without side effects.

        The passes and their order must not depend on the values of the batch.
        """

    @abstractmethod
    def readings(self, net: Net) -> Readings:
        """Return the functions of a trained network that a solver calls. It must not call the network itself."""
