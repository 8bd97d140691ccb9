"""Velocities of nets that learned the noise of a diffusion, or its own v, on the linear path (`dumo.flow.schedule`).

With x_t = n x_vp, t = s / (a + s), a = (1 - t) / n, s = t / n, what such a net F gives is

    epsilon        the noise:  dx_t/dt = F - x_0 = (F - x_t) / (1 - t),            for x_0 = (x_t - t F) / (1 - t)
    v_prediction   a z - s x:  dx_t/dt = (s - a) x_vp + (a + s) F = ((2 t - 1) x_t / n + F) / n

So x_t - t dx_t/dt is its guess of the data, as for any velocity. Where nothing of the data is left, t = 1, noise says
nothing of them, and hardly anything below `LEAST` (the cosine schedule): such a schedule takes v (Lin et al. 2023).
Both are linear in F, so guidance and means commute with it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

from torch import nn

from dumo.flow.schedule import Clock, Law, Schedule
from dumo.io.read import foreign
from dumo.types import Array, Sample, Time, UserError, lift

Prediction = Literal["epsilon", "v_prediction"]

LAWS = get_args(Law)
LEAST = 1e-3  # of the data, at the end of a net of noise, whose errors are divided by it: DiT's has 6e-3; ours


class DiffusionToVelocity(nn.Module):
    """What goes into a net of a diffusion and what comes out, as a path `Diffusion` has it: its t is T times ours."""

    def __init__(self, schedule: Schedule, prediction: Prediction) -> None:
        """It has no weights."""
        super().__init__()
        self.schedule = schedule
        self.prediction = prediction
        self.clock = Clock(schedule)

    def forward(self, x: Sample, t: Time) -> tuple[Sample, Array, Callable[[Array], Array]]:
        """x_vp, the index (b,), and a function from the net's output to a velocity per unit of our t."""
        last = self.schedule.last
        now = last * t
        at = lift(now, x)
        n = (at * at + (1 - at) * (1 - at)) ** 0.5
        scaled = x / n

        def velocity(out: Array) -> Array:
            return last * ((out - x) / (1 - at) if self.prediction == "epsilon" else ((2 * at - 1) * scaled + out) / n)

        return scaled, self.clock(now), velocity

    @property
    def steepest(self) -> float:
        """How much faster than t the index may run, where it goes from 0 to 1."""
        return self.clock.fastest * self.schedule.last / self.schedule.steps


def framed(config: Mapping[str, Any]) -> DiffusionToVelocity:
    """The frame of a scheduler_config.json. Raises UserError for what has no table, or one that does not fit."""
    kind = config.get("_class_name")
    law = config.get("beta_schedule", "linear")
    said = f"pipeline: its scheduler, a {kind},"
    if "beta_start" not in config or config.get("trained_betas") is not None or law not in LAWS:
        raise UserError(
            f"{said} has no table of betas by one of the laws {', '.join(LAWS)}, which say what its model learned: "
            "take the folder of a pipeline with the scheduler that it was trained by"
        )
    prediction = config.get("prediction_type", "epsilon")
    zero = bool(config.get("rescale_betas_zero_snr", False))
    if prediction not in get_args(Prediction):
        raise UserError(
            f"{said} says prediction_type {prediction!r}, and dumo knows {' and '.join(get_args(Prediction))}: take a "
            "model that predicts one of them"
        )
    spec = {"kind": law, "start": config["beta_start"], "end": config.get("beta_end"), "zero_snr": zero}
    with foreign(f"{said} describes no schedule", "take the folder of a pipeline with the scheduler that it has"):
        schedule = Schedule.model_validate(spec | {"steps": config["num_train_timesteps"]})
    if prediction == "epsilon" and (left := 1 - schedule.last) < LEAST:
        raise UserError(
            f"{said} ends in noise alone but for {left:.1e} of the data, less than {LEAST:g}, and says of them through "
            "a net that predicts noise nothing but its errors: take a model of prediction_type v_prediction, or the "
            "scheduler that this one was trained by"
        )
    return DiffusionToVelocity(schedule, cast(Prediction, prediction))


def settings(frame: DiffusionToVelocity) -> dict[str, Any]:
    """The settings by which a scheduler of diffusers has this table and prediction: `framed`, inverted."""
    schedule = frame.schedule
    return {
        "beta_schedule": schedule.kind,
        "beta_start": schedule.start,
        "beta_end": schedule.end,
        "num_train_timesteps": schedule.steps,
        "rescale_betas_zero_snr": schedule.zero_snr,
        "prediction_type": frame.prediction,
    }
