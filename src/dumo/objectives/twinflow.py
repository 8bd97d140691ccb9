"""TwinFlow (Cheng et al. 2025, arXiv 2512.05150): RCGM, and a twin at negative times for the network's own samples.

One jump from noise generates a sample x'. At -t the network learns the velocity of samples, diffused with new noise z',
just as at t it learns the velocity of the data. The difference of the two compares samples with data:

    x' = z - u(z, 1, 0)                                                                       (1)
    v(x'_t, -t)* = z' - x',        x'_t = t z' + (1 - t) x'                                   (2)
    G = v(x'_t, -t) - v(x'_t, t),        detached, a gradient for u(z, 1, 0)                  (3)

The score is -(x_t + (1 - t) v) / t. So the gradient of KL(samples || data), diffused to t, with respect to x' is along
-G, and with respect to u, where x' = z - u, along G. The velocities agree only if samples are distributed as the data,
so without guidance the exact flow is a fixed point. With guidance it is not: v(x_t, t) is then v*, which is not the
velocity of samples of v* diffused with new noise.

With times.kind=quarters a row has one of four tasks, as in the code for large models (inclusionAI/TwinFlow at a109a71,
`src/methodes/twinflow/twinflow.py`), and all share one pass with gradients: the jump from noise, short jumps, jumps of
any length, and the twin. Longer jumps have a lower weight, and errors are normalized per row:

    w = 1 + tan(72 degrees (1 - (t - r))),    1 on rows of the twin                           (4)
    B(e) = m / (c sqrt(1 + m / (c^2 + 1e-8))),    m the mean square of e                      (5)
    loss = mean of w B(u - u*) + match * mean of B(G) over the jumps from noise               (6)

(5) uses Barron's robust weight, detached. With other times every row has every task, as in their tutorial.
"""

from dataclasses import replace
from math import pi
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from dumo.objectives.base import (
    Cond,
    FromTeacher,
    Frozen,
    Needs,
    Net,
    Noise,
    NoisyBatch,
    PerSample,
    Quarters,
    Readings,
    Sample,
    Slope,
    Terms,
    Uniform,
    UserError,
    adaptive_l2,
    clipped_share,
    descent_error,
    dropout,
    frozen,
    index,
    lift,
    mean_square,
    mean_velocity,
    require_precise_passes,
)
from dumo.objectives.rcgm import RCGM
from dumo.types import CHANGES


class TwinFlow(RCGM):
    """RCGM, the jump from t = 1 to r = 0, flow matching, the twin, and its correction of the samples.

    As in `twinflow.py`, the noise z' of the twin is new. The tutorial (`methodes.py`) reuses the noise from which the
    sample was generated. The velocity would then be that of straight lines from this noise, which is the velocity of
    another distribution, and not even the unguided flow would be a fixed point.
    """

    signed: ClassVar[bool] = True
    kind: Literal["twinflow"] = "twinflow"  # pyright: ignore[reportIncompatibleVariableOverride], which distinguishes it
    # The weight of the term with G: dist_match_cof; 0.5 in the code for large models.
    match: float = Field(default=1.0, ge=0)
    # c of (5), 1e-3 in the code for large models. None means mean squares.
    barron: float | None = Field(default=None, gt=0)
    # The method for du/dt, which replaces RCGM's short step and jumps: 16 bits are too coarse for them. In the limit
    # h = 0, (3) of `rcgm` is u + (t - r) du/dt - v* for any order. None means the short step.
    slope: Slope | None = Field(default=None, json_schema_extra=CHANGES)

    @property
    def needs(self) -> Needs:
        """Add the noise that diffuses samples for the twin and G, and the time of G (dist_match), to `RCGM.needs`."""
        needs = replace(super().needs, laws={"z_twin": Noise(), "t_twin": Uniform()}, diffuses_samples=True)
        if isinstance(self.times, Quarters):
            needs = replace(needs, teacher=FromTeacher(reads_v_t=False))
        if self.slope is not None:
            needs = replace(needs, slope=self.slope, amplifies=0.0, ref=None)
        return needs

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the loss of `training_step`. Raises UserError if the precision is too low for the gain."""
        if self.slope is None:
            require_precise_passes(b, self.gain, self.kind)
        if isinstance(self.times, Quarters):
            return self._loss_in_quarters(self.times, net, ref, b)
        return self._loss_of_all_rows(net, ref, b)

    def _loss_of_all_rows(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the loss with every task on every row. All weights are 1, except `match`."""
        (v_hat,) = net(b.x_t, b.c, t=b.t, r=b.t)
        # This pass also gives V(c), unless theta^- has other weights.
        v_star = self._v_star(ref, b, v_hat if ref == frozen(net) else None)
        _, u_error, unclipped_error = self._jump(net, ref, b, v_star)
        at_noise = replace(b.at(1.0), r=torch.zeros_like(b.r))
        u_at_noise, error_at_noise, _ = self._jump(net, ref, at_noise, self._v_star(ref, at_noise))
        x_sample = (at_noise.x_t - u_at_noise).detach()  # (1)
        samples = self._diffused(b, x_sample, b.drawn["z_twin"])
        twin = samples.at(b.t)
        (v_twin,) = net(twin.x_t, b.c, t=-b.t, r=-b.t)

        g = self._velocity_gap(frozen(net), samples.at(b.drawn["t_twin"].to(b.t)))
        parts = {
            "u": self._row_loss(u_error),
            "flow": self._row_loss(v_hat - v_star),
            "one": self._row_loss(error_at_noise),
            "twin": self._row_loss(v_twin - twin.v_t),  # (2)
            "rectify": self.match * self._row_loss(descent_error(u_at_noise, g)),  # (3)
        }
        loss = torch.stack([*parts.values()]).sum(0)
        return Terms(loss, parts, {"clipped_share": clipped_share(unclipped_error, self.clip)})

    def _loss_in_quarters(self, times: Quarters, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Return the loss with one task per row, and G on the jumps from noise."""
        if len(b.t) % times.group:
            raise UserError(
                f"objective '{self.kind}' with times.kind=quarters assigns four tasks to consecutive rows, so the "
                f"batch size must be a multiple of 4, got {len(b.t)}: set train.batch and train.micro_batch to "
                "multiples of 4 on each rank"
            )
        device = b.t.device
        places = range(len(b.t))
        guided_places = sorted([*places[times.short], *places[times.any_length]])
        jump_places = sorted([*places[times.from_noise], *guided_places])
        from_noise, guided = index(places[times.from_noise], device), index(guided_places, device)
        jumps, twin = index(jump_places, device), index(places[times.twin], device)
        twin_rows = b[times.twin]

        # Replace the data of the twin's rows with samples of one jump, diffused with the noise of the row.
        with torch.no_grad(), dropout.rows(twin):
            x_sample = self._sample(frozen(net), twin_rows.drawn["z_twin"].to(b.z), twin_rows.c)  # (1)
        twin_rows = self._diffused(twin_rows, x_sample, twin_rows.z).at(twin_rows.t)
        x_t = b.x_t.index_copy(0, twin, twin_rows.x_t)
        target = b.v_t.index_copy(0, twin, twin_rows.v_t)  # (2)

        # Use guidance in the velocity target, except for the jump from noise.
        with dropout.rows(guided):
            v_star = self._target_velocity(ref, b[guided_places])
        target = target.index_copy(0, guided, v_star.to(target))

        # Evaluate the network once with gradients, and compare its jumps with their targets.
        sign = torch.ones_like(b.t).index_fill(0, twin, -1.0)
        u_hat, error, unclipped_error = self._jump(net, ref, replace(b, x_t=x_t), target, sign=sign, jumps=jumps)

        # (4) to (6)
        weight = 1 + (2 * pi / 5 * (1 - (b.t - b.r))).tan()
        u_loss = weight.index_fill(0, twin, 1.0) * self._row_loss(error)
        samples = self._diffused(b, b.z - u_hat.detach(), b.drawn["z_twin"])[times.from_noise]
        with dropout.rows(from_noise):
            g = self._velocity_gap(frozen(net), samples.at(samples.drawn["t_twin"].to(b.t)))
        g = g.clamp(-self.clip, self.clip)
        rectify = self._row_loss(descent_error(u_hat[from_noise], g))
        # The mean of (6) is over a quarter of the rows.
        rectify = torch.zeros_like(u_loss).index_copy(0, from_noise, times.group * self.match * rectify.to(u_loss))
        notes = {"clipped_share": clipped_share(unclipped_error, self.clip)}
        return Terms(u_loss + rectify, {"u": u_loss, "rectify": rectify}, notes)

    def _jump(
        self,
        net: Net,
        ref: Frozen,
        b: NoisyBatch,
        v_star: Sample,
        *,
        sign: PerSample | None = None,
        jumps: Int[Tensor, " k"] | None = None,
    ) -> tuple[Sample, Sample, Sample]:
        """Return u of one pass, u - u* with its gradient, and u - u* before clipping.

        v_star: the velocity target, (b, ...).
        sign: the sign of the times of each row, (b,). None means positive.
        jumps: the rows that jump from t to r. The error of other rows is u - v_star. None means all rows.
        """
        t, r = (b.t, b.r) if sign is None else (sign * b.t, sign * b.r)
        if self.slope is not None:
            (u_hat,), along = self.slope(net, ref, b.x_t, b.c, t=t, r=r, direction=v_star, moving=b.moving)
            with torch.no_grad():
                (du_dt,) = along(v_star)
                unclipped_error = u_hat - v_star + lift(b.t - b.r, b.x_t) * du_dt
                u_star = u_hat - unclipped_error.clamp(-self.clip, self.clip)
                if jumps is not None:
                    u_star = v_star.index_copy(0, jumps, u_star[jumps].to(v_star))
            return u_hat, u_hat - u_star, unclipped_error
        (u_hat,) = net(b.x_t, b.c, t=t, r=r)
        if jumps is None:
            return u_hat, *self._residual(u_hat, ref, b, v_star)
        # Compute `_residual` for the rows that jump.
        error = u_hat - v_star
        with dropout.rows(jumps):
            jump_error, unclipped_error = self._residual(u_hat[jumps], ref, b[jumps], v_star[jumps])
        return u_hat, error.index_copy(0, jumps, jump_error), error.detach().index_copy(0, jumps, unclipped_error)

    def _target_velocity(self, ref: Frozen, b: NoisyBatch) -> Sample:
        """Return the guided velocity target at x_t, from the teacher if there is one, otherwise from the data."""
        return self._v_star(ref, replace(b, v_t=b.velocity(b.x_t, b.t, b.v_t)))

    def _sample(self, net: Frozen, z: Sample, c: Cond) -> Sample:
        """Return samples of one jump from noise z."""
        t = z.new_ones(len(z))
        (u,) = net(z, c, t=t, r=torch.zeros_like(t))
        return z - u

    def _diffused(self, b: NoisyBatch, x: Sample, z: Sample) -> NoisyBatch:
        """Return the batch with data x, noise z, and no teacher, because the teacher has learned the real data."""
        return replace(b, x=x, z=z.to(b.z), teacher=None)

    def _row_loss(self, error: Sample) -> PerSample:
        """Return the mean square of each row, or (5)."""
        if self.barron is None:
            return mean_square(error)
        floor = self.barron**2 + 1e-8
        return floor**0.5 / self.barron * adaptive_l2(error, 0.5, floor, mean=True)

    def readings(self, net: Net) -> Readings:
        """Return the mean velocity from t to r, and the velocity at r = t, which is trained on every row."""
        return mean_velocity(net)

    def _velocity_gap(self, net: Frozen, b: NoisyBatch) -> Sample:
        """Return G, the difference of the velocities at -t and t of samples diffused to t."""
        (v_fake,) = net(b.x_t, b.c, t=-b.t, r=-b.t)
        (v_real,) = net(b.x_t, b.c, t=b.t, r=b.t)
        return v_fake - v_real
