"""What a user writes in files of their own: laws of times and of more, an objective, a net, data and a solver.

None is in a union of the package; the last four stand in a run by `kind: module:Class`. The contract tests, and with
them those of the theory, run on these as on ours.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Generator

from dumo.io.data_source import TensorData
from dumo.objectives.base import (
    Cond,
    DualSlope,
    Frozen,
    Needs,
    Net,
    NoisyBatch,
    Number,
    ObjectiveSpec,
    PerSample,
    Readings,
    Sample,
    Slope,
    Terms,
    Time,
    TimeLaw,
    lift,
    mean_square,
    mean_velocity,
)
from dumo.testing.network import TinyNet
from dumo.types import Path
from dumo.types.outside import DataSpec, NetSpec, SolverSpec


class Alternate(TimeLaw):
    """Every second row jumps to the data, the next one is at the same time and stays there; none is near the data."""

    kind: Literal["alternate"] = "alternate"

    def __call__(self, n: int, g: Generator) -> tuple[Time, Time]:
        """Draw n rows."""
        t = (0.1 + 0.9 * torch.rand((n + 1) // 2, generator=g)).repeat_interleave(2)[:n]
        return t, t.masked_fill(torch.tensor(self.moving(n)), 0)

    @property
    def group(self) -> int:
        """A jump, and the row of its time."""
        return 2

    def moving(self, n: int) -> tuple[bool, ...]:
        """The first of every two."""
        return tuple(i % 2 == 0 for i in range(n))

    @property
    def moving_share(self) -> float:
        """A half."""
        return 0.5


class Weight(Number):
    """How much a row counts: from 1 to 2."""

    kind: Literal["weight"] = "weight"

    def one(self, n: int, g: Generator) -> PerSample:
        """Draw one number per row."""
        return 1 + torch.rand(n, generator=g)


class Outside(ObjectiveSpec):
    """MeanFlow without guidance, by mean squares, with laws of its own."""

    kind: Literal["contract.outside:Outside"] = "contract.outside:Outside"
    times: Alternate = Alternate()
    counts: Weight = Weight()
    drop: float = Field(default=0.1, ge=0, le=1)
    slope: Slope = DualSlope()

    @property
    def needs(self) -> Needs:
        """What differs from the defaults."""
        return Needs(inputs=("t", "r"), heads=("u",), laws={"counts": self.counts}, slope=self.slope)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Mean squares to u*."""
        (u_hat,), along = self.slope(net, ref, b.x_t, b.c, t=b.t, r=b.r, direction=b.v_t, moving=b.moving)
        with torch.no_grad():
            u_star = b.v_t - lift(b.t - b.r, b.x_t) * along(b.v_t)[0]
        e = mean_square(u_hat - u_star)
        return Terms(b.drawn["counts"].to(e) * e, {"u": e})

    def readings(self, net: Net) -> Readings:
        """One head, read at two times."""
        return mean_velocity(net)


class PlainNet(NetSpec):
    """What builds it."""

    kind: Literal["contract.outside:PlainNet"] = "contract.outside:PlainNet"

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> TinyNet:
        """A net with the inputs, heads and gauges of `needs`."""
        return TinyNet(needs, shape, classes)


class Bars(DataSpec):
    """Images of 8 x 8 pixels, white but for a black row or column: two classes."""

    kind: Literal["contract.outside:Bars"] = "contract.outside:Bars"
    rows: int = Field(default=32, ge=1)
    shape: ClassVar[tuple[int, ...]] = (1, 8, 8)
    classes: ClassVar[int] = 2

    def open(self) -> TensorData:
        """All in memory."""
        c = torch.arange(self.rows) % 2
        x = torch.ones(self.rows, *self.shape)
        for i in range(self.rows):
            x[i, 0].movedim(int(c[i]), 0)[i // 2 % 8] = -1
        return TensorData(x, c)


class Once(SolverSpec):
    """The endpoint, whatever the number of passes asked for: a solver of one pass."""

    uses: ClassVar[str] = "endpoint"
    passes: ClassVar[int] = 1

    kind: Literal["contract.outside:Once"] = "contract.outside:Once"

    def __call__(self, readings: Readings, path: Path, x: Sample, c: Cond, nfe: int, fresh: object) -> Sample:
        """One jump."""
        assert readings.endpoint is not None
        return readings.endpoint(x, x.new_ones(len(x)), c)
