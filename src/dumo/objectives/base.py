"""All that an author of an objective imports.

    from dumo.objectives.base import Frozen, Needs, Net, NoisyBatch, ObjectiveSpec, Readings, Terms, Times, Uniform

The class: `ObjectiveSpec` is its base, `Spec` that of a group of options. `Needs` says what it asks of the network and
of a batch, with `Formulas` (`STRAIGHT`: also on diffusion paths) and `FromTeacher`.

The loss: it gets a `Net`, theta^- as a `Frozen` one (`frozen` makes one of a net) and a `NoisyBatch`, and returns
`Terms`. A `Guide` gives the target velocity. A `Slope` gives du/dt: `CentralSlope`, `DualSlope` or `JvpSlope`;
`heads_and_end_derivatives` also gives du/dr, and `earlier_mean_velocity` replaces a derivative by one earlier pass.
`lift` shapes a number per row to multiply a sample. `mean_square`, `adaptive_l2`, `normalized_l2`, `huber` and
`cosine_distance` make a number per row; `descent_error` makes an error whose gradient is given; `clipped_share` and
`head_gap` are notes to log. `require_precise_passes` refuses bf16 where rounding would be multiplied. Code that takes
some rows of a batch uses `index`, and `dropout.rows` for a network with dropout.

The draws: `Times` is any law of (t, r), and `Pair`, `Jumps`, `Below`, `Grid`, `Groups`, `Beta`, `LogitNormal`, `Arctan`
and `Uniform` are some; a `TimeLaw` or `ToData` (t alone, r = 0) is the base of one of your own. `Needs.laws` names
further draws: `Noise`, `Signs`, or a `Law` or `Number` (one per row) of your own.

The readings: `Readings` holds what a solver calls; `mean_velocity`, `velocity_and_jump` and `jump_to_data` make them.

Shapes: `Sample` and `Cond` of rows, `Time` and `PerSample` of one number per row.
"""

from abc import ABC, abstractmethod
from typing import Any

from pydantic import Field

from dumo.flow import dropout
from dumo.flow.compatibility import require_precise_passes
from dumo.flow.guide import Guide, Interval
from dumo.flow.linearize import heads_and_end_derivatives
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
    Grid,
    Groups,
    Jumps,
    LogitNormal,
    Number,
    Pair,
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
    "Pair",
    "PerSample",
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
    "frozen",
    "head_gap",
    "heads_and_end_derivatives",
    "huber",
    "index",
    "jump_to_data",
    "lift",
    "mean_square",
    "mean_velocity",
    "normalized_l2",
    "require_precise_passes",
    "velocity_and_jump",
]


class ObjectiveSpec(Spec, ABC):
    """The base of an objective: how a network is trained, and how a solver reads it afterwards."""

    kind: Any  # its name, as a Literal: `module:Class`, or a word for one that ships with dumo
    times: Any  # the law of (t, r): any of `Times`, or a `TimeLaw` of one's own
    drop: float = Field(default=0.0, ge=0, le=1)  # the probability that a row's condition is dropped

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The inputs and heads of the network, and what else the loss needs."""

    @abstractmethod
    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """The loss of each row of a batch. Pure: it draws and changes nothing.

        The passes that it makes, and their order, do not depend on the batch's values.
        """

    @abstractmethod
    def readings(self, net: Net) -> Readings:
        """What a net that was trained so can tell a solver. Does not call the net."""
