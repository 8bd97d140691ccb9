"""`dumo.testing.check_objective` finds what is wrong with an objective, and names the property.

`Sound` is right, and each fault is one change of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from pydantic import ConfigDict
from torch import Tensor

from contract.outside import Outside
from dumo.objectives.base import (
    DualSlope,
    Frozen,
    Guide,
    Law,
    Needs,
    Net,
    NoisyBatch,
    ObjectiveSpec,
    PerSample,
    Readings,
    Sample,
    Slope,
    Terms,
    Times,
    Uniform,
    lift,
    mean_square,
    velocity_and_jump,
)
from dumo.testing import CheckError, check_objective
from dumo.testing.exact import mean_velocity_head, velocity_head


class Sound(ObjectiveSpec):
    """DuMo's two heads: the velocity, and the mean velocity down to the data, u* = v* - t du/dt."""

    kind: Literal["unit.testing.test_check:Sound"] = "unit.testing.test_check:Sound"
    times: Times = Uniform()
    guide: Guide = Guide()
    slope: Slope = DualSlope()

    @property
    def needs(self) -> Needs:
        """Two heads, a derivative and guidance."""
        return Needs(heads=("v", "u"), slope=self.slope, guide=self.guide)

    def guided(self, v_hat: Sample, net: Net, ref: Frozen, b: NoisyBatch) -> Sample:
        """v*."""
        with torch.no_grad():
            return self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t)[0])

    def mean_velocity_target(self, v_star: Sample, v_hat: Sample, du_dt: Sample, b: NoisyBatch) -> Sample:
        """u*."""
        return v_star - lift(b.t, b.x_t) * du_dt

    def rows(self, v_loss: Tensor, u_loss: Tensor, b: NoisyBatch) -> Tensor:
        """The loss of each row."""
        return v_loss + u_loss

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Mean squares to v* and u*."""
        (v_hat, u_hat), along = self.slope(net, ref, b.x_t, b.c, t=b.t)
        v_star = self.guided(v_hat, net, ref, b)
        _, du_dt = along(v_star.detach())
        u_star = self.mean_velocity_target(v_star, v_hat, du_dt, b)
        v_loss, u_loss = mean_square(v_hat - v_star), mean_square(u_hat - u_star)
        return Terms(self.rows(v_loss, u_loss, b), {"v": v_loss, "u": u_loss})

    def readings(self, net: Net) -> Readings:
        """The velocity, and the jump to the data."""
        return velocity_and_jump(net)


class WrongSign(Sound):
    def mean_velocity_target(self, v_star: Sample, v_hat: Sample, du_dt: Sample, b: NoisyBatch) -> Sample:
        return v_star + lift(b.t, b.x_t) * du_dt


class WrongTime(Sound):
    def mean_velocity_target(self, v_star: Sample, v_hat: Sample, du_dt: Sample, b: NoisyBatch) -> Sample:
        return v_star - lift(b.r, b.x_t) * du_dt


class TargetWithGradient(Sound):
    def mean_velocity_target(self, v_star: Sample, v_hat: Sample, du_dt: Sample, b: NoisyBatch) -> Sample:
        return v_star + 0.1 * (v_hat - v_star) - lift(b.t, b.x_t) * du_dt


class ChangesBatch(Sound):
    def rows(self, v_loss: Tensor, u_loss: Tensor, b: NoisyBatch) -> Tensor:
        b.x_t.add_(1)
        return v_loss + u_loss


class Draws(Sound):
    def rows(self, v_loss: Tensor, u_loss: Tensor, b: NoisyBatch) -> Tensor:
        return (1 + 0 * torch.rand(())) * (v_loss + u_loss)


class MeanOverRows(Sound):
    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        terms = super().loss(net, ref, b)
        object.__setattr__(terms, "loss", terms.loss.mean())  # `Terms` itself checks shapes in tests alone
        return terms


class ComparesRows(Sound):
    def rows(self, v_loss: Tensor, u_loss: Tensor, b: NoisyBatch) -> Tensor:
        return v_loss + u_loss / u_loss.detach().mean()


class UnusedHead(Sound):
    def rows(self, v_loss: Tensor, u_loss: Tensor, b: NoisyBatch) -> Tensor:
        return v_loss + 0 * u_loss


class GradientThroughGuidance(Sound):
    def guided(self, v_hat: Sample, net: Net, ref: Frozen, b: NoisyBatch) -> Sample:
        return self.guide(b, v_hat, lambda b, c: ref(b.x_t, c, t=b.t)[0])


H = 0.005  # of a difference
CALLS: list[float] = []


class KeepsState(Sound):
    def rows(self, v_loss: Tensor, u_loss: Tensor, b: NoisyBatch) -> Tensor:
        CALLS.append(1.0)
        return (1 + 1e-3 * len(CALLS)) * (v_loss + u_loss)


class OwnDifference(Sound):
    """du/dt by a central difference, which does not refuse bf16."""

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        v_hat, u_hat = net(b.x_t, b.c, t=b.t)
        v_star = self.guided(v_hat, net, ref, b)
        u_ahead = ref(b.x_t + H * v_star, b.c, t=b.t + H)[1]
        u_behind = ref(b.x_t - H * v_star, b.c, t=b.t - H)[1]
        u_star = v_star - lift(b.t, b.x_t) * (u_ahead - u_behind) / (2 * H)
        v_loss, u_loss = mean_square(v_hat - v_star), mean_square(u_hat - u_star)
        return Terms(v_loss + u_loss, {"v": v_loss, "u": u_loss})


class TrainsDifference(OwnDifference):
    """A difference of the network in training, with gradients."""

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        return super().loss(net, net, b)


class NetAsReference(Sound):
    def guided(self, v_hat: Sample, net: Net, ref: Frozen, b: NoisyBatch) -> Sample:
        return super().guided(v_hat, net, net, b)


class SkipsPass(Sound):
    def rows(self, v_loss: Tensor, u_loss: Tensor, b: NoisyBatch) -> Tensor:
        return v_loss + u_loss

    def guided(self, v_hat: Sample, net: Net, ref: Frozen, b: NoisyBatch) -> Sample:
        if not b.kept.any():
            return b.v_t
        ref(b.x_t, b.null, t=b.t)
        return super().guided(v_hat, net, ref, b)


class ByPlace(Law):
    """Numbers that go by the place of a row among those that are drawn."""

    kind: Literal["sharp"] = "sharp"

    def rows(self, key: Sequence[int | str], rows: range, batch: int, shape: Sequence[int]) -> PerSample:
        return torch.linspace(1, 2, len(rows))


class DrawsByPosition(Sound):
    @property
    def needs(self) -> Needs:
        return replace(super().needs, laws={"weight": ByPlace()})


class ImagesOnly(Sound):
    def mean_velocity_target(self, v_star: Sample, v_hat: Sample, du_dt: Sample, b: NoisyBatch) -> Sample:
        return v_star - lift(b.t, b.x_t) * du_dt * (1 if b.x_t.ndim == 4 else torch.inf)


class ReadsVelocityByTwoPasses(Sound):
    def readings(self, net: Net) -> Readings:
        readings = super().readings(net)
        return replace(readings, velocity=lambda x, t, c: (net(x, c, t=t)[0] + net(x, c, t=t)[0]) / 2)


class ReadsAnotherHead(Sound):
    def readings(self, net: Net) -> Readings:
        return replace(super().readings(net), velocity=lambda x, t, c: net(x, c, t=t)[1])


class JumpsTooFar(Sound):
    def readings(self, net: Net) -> Readings:
        return Readings(velocity=super().readings(net).velocity, endpoint=lambda x, t, c: x - net(x, c, t=t)[1])


class Mutable(Sound):
    model_config = ConfigDict(frozen=False)


class DescendsAway(Sound):
    """At the flow the gradient vanishes, and away from it descent leads further away."""

    def rows(self, v_loss: Tensor, u_loss: Tensor, b: NoisyBatch) -> Tensor:
        return 100 + v_loss - u_loss


FAULTS: dict[type[Sound], tuple[str, ...]] = {
    WrongSign: ("gradient_vanishes_at_the_flow",),
    WrongTime: ("gradient_vanishes_at_the_flow",),
    TargetWithGradient: ("targets_have_no_gradient",),
    ChangesBatch: ("loss_changes_nothing", "rows_are_independent"),
    Draws: ("loss_draws_nothing",),
    MeanOverRows: ("loss_is_one_number_per_row",),
    ComparesRows: ("rows_are_independent",),
    UnusedHead: ("every_parameter_learns", "data_without_classes_is_served", "descent_leads_back_to_the_flow"),
    GradientThroughGuidance: ("targets_have_no_gradient", "guided_target_has_no_gradient"),
    KeepsState: ("loss_is_the_same_twice", "rows_are_independent"),
    OwnDifference: ("bf16_is_served_or_refused", "gradient_vanishes_at_the_flow"),
    TrainsDifference: (
        "targets_are_of_the_reference",
        "one_pass_has_gradients",
        "bf16_is_served_or_refused",
        "gradient_vanishes_at_the_flow",
    ),
    NetAsReference: ("targets_are_of_the_reference",),
    SkipsPass: ("passes_do_not_depend_on_the_batch",),
    DrawsByPosition: ("draws_are_keyed_by_row",),
    ImagesOnly: ("points_are_served", "gradient_vanishes_at_the_flow", "descent_leads_back_to_the_flow"),
    ReadsVelocityByTwoPasses: ("readings_make_one_pass_each",),
    ReadsAnotherHead: ("readings_are_those_of_the_flow",),
    JumpsTooFar: ("a_jump_of_no_time_stays", "readings_are_those_of_the_flow"),
    Mutable: ("spec_is_a_value",),
    DescendsAway: ("descent_leads_back_to_the_flow",),
}


@pytest.mark.parametrize(("fault", "properties"), FAULTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_found_and_its_property_named(fault: type[Sound], properties: tuple[str, ...]) -> None:
    with pytest.raises(CheckError) as found:
        check_objective(fault())
    assert tuple(found.value.failures) == properties
    assert all(f"- {name}: " in str(found.value) for name in properties)


@pytest.mark.parametrize(
    "objective", [Sound(), Sound(guide=Guide(zeta=0.5)), Outside()], ids=["plain", "guided", "outside"]
)
def test_what_is_right_passes(objective: ObjectiveSpec) -> None:
    check_objective(objective)


def test_properties_that_an_objective_lacks_by_design_are_skipped() -> None:
    check_objective(WrongSign(), skip=["gradient_vanishes_at_the_flow"])


class Renamed(Sound):
    """Heads of names that nobody knows."""

    @property
    def needs(self) -> Needs:
        return replace(super().needs, heads=("slope", "chord"))


def test_heads_of_other_names_are_given() -> None:
    check_objective(Renamed(), heads={"slope": velocity_head, "chord": mean_velocity_head})
