"""Velocities of nets that learned the noise of a diffusion, or its own v, on the linear path (`flow.noise_schedule`).

A diffusion has x_vp = a x_0 + s z, and the linear path x_t = (1 - t) x_0 + t z. They are one point, x_t = n x_vp, for

    t = s / (a + s),   a = (1 - t) / n,   s = t / n.

Such a net gives F, of which the velocity dx_t/dt follows:

    epsilon        F is the noise z, and x_0 = (x_t - t F) / (1 - t):   dx_t/dt = F - x_0 = (F - x_t) / (1 - t)
    v_prediction   F is a z - s x_0:   dx_t/dt = (s - a) x_vp + (a + s) F = ((2 t - 1) x_t / n + F) / n

So x_t - t dx_t/dt is its guess of the data, as for any velocity. Both are linear in F, so guidance and means commute
with them. At t = 1 nothing of the data is left, and a guess of the noise says nothing about them; it says hardly any
more where less than `MIN_DATA_SHARE` is left, as in the cosine schedule. Such a schedule needs v (Lin et al. 2023).

`read_scheduler` makes a `DiffusionToVelocity` of a scheduler_config.json, and `scheduler_settings` gives the entries of
such a file. `dumo.nets.dualized` calls the `DiffusionToVelocity` in each pass.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

from torch import nn

from dumo.flow.noise_schedule import Clock, Law, Schedule
from dumo.types import Array, Sample, Time, UserError, lift

Prediction = Literal["epsilon", "v_prediction"]

LAWS = get_args(Law)  # of a scheduler's betas
# The least share of the data at the end of a schedule, for a net that predicts noise: its errors are divided by this
# share (ours). DiT's schedule has 6e-3.
MIN_DATA_SHARE = 1e-3


class DiffusionToVelocity(nn.Module):
    """Maps x_t and t to the inputs of a net of a diffusion, and its output to a velocity.

    x_t is on the path `Diffusion`, whose end, our t = 1, is at T = `schedule.last_time` on the linear path.
    """

    def __init__(self, schedule: Schedule, prediction: Prediction) -> None:
        """Take the schedule that the net learned, and what it predicts. There are no weights."""
        super().__init__()
        self.schedule = schedule
        self.prediction = prediction
        self.clock = Clock(schedule)

    def forward(self, x: Sample, t: Time) -> tuple[Sample, Array, Callable[[Array], Array]]:
        """Take x (b, ...) at our t (b,), and return the net's inputs and the function from its output to a velocity.

        The inputs are x_vp (b, ...) and the index of the time (b,). The output and the velocity, per unit of our t, are
        shaped like x.
        """
        last = self.schedule.last_time
        linear_t = last * t  # on the linear path
        time = lift(linear_t, x)
        n = (time * time + (1 - time) * (1 - time)) ** 0.5
        x_vp = x / n

        def to_velocity(out: Array) -> Array:
            if self.prediction == "epsilon":
                return last * ((out - x) / (1 - time))
            return last * (((2 * time - 1) * x_vp + out) / n)

        return x_vp, self.clock(linear_t), to_velocity

    @property
    def max_clock_slope(self) -> float:
        """The largest derivative of the index by our t, with the index scaled to go from 0 to 1."""
        return self.clock.fastest * self.schedule.last_time / self.schedule.steps


def read_scheduler(config: Mapping[str, Any]) -> DiffusionToVelocity:
    """Make the map for the scheduler of a scheduler_config.json.

    Raises UserError for a scheduler without a table of betas that dumo knows, for a prediction that is neither noise
    nor v, and for noise where the schedule leaves too little of the data.
    """
    scheduler_class = config.get("_class_name")
    law = config.get("beta_schedule", "linear")
    subject = f"pipeline: its scheduler, a {scheduler_class},"
    if "beta_start" not in config or config.get("trained_betas") is not None or law not in LAWS:
        raise UserError(
            f"{subject} has no table of betas by one of the laws {', '.join(LAWS)}, which say what its model learned: "
            "take the folder of a pipeline with the scheduler that it was trained by"
        )
    prediction = config.get("prediction_type", "epsilon")
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    if prediction not in get_args(Prediction):
        raise UserError(
            f"{subject} says prediction_type {prediction!r}, and dumo knows {' and '.join(get_args(Prediction))}: take "
            "a model that predicts one of them"
        )
    fields = {"kind": law, "start": config["beta_start"], "end": config.get("beta_end"), "zero_snr": zero_snr}
    schedule = Schedule.model_validate(fields | {"steps": config["num_train_timesteps"]})
    data_share = 1 - schedule.last_time
    if prediction == "epsilon" and data_share < MIN_DATA_SHARE:
        raise UserError(
            f"{subject} ends in noise alone but for {data_share:.1e} of the data, less than {MIN_DATA_SHARE:g}, and "
            "says of them through a net that predicts noise nothing but its errors: take a model of prediction_type "
            "v_prediction, or the scheduler that this one was trained by"
        )
    return DiffusionToVelocity(schedule, cast(Prediction, prediction))


def scheduler_settings(diffusion: DiffusionToVelocity) -> dict[str, Any]:
    """Return the settings of a scheduler of diffusers with this table and prediction. `read_scheduler` reads them."""
    schedule = diffusion.schedule
    return {
        "beta_schedule": schedule.kind,
        "beta_start": schedule.start,
        "beta_end": schedule.end,
        "num_train_timesteps": schedule.steps,
        "rescale_betas_zero_snr": schedule.zero_snr,
        "prediction_type": diffusion.prediction,
    }
