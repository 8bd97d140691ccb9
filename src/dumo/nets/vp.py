"""Velocities of nets that learned the noise of a diffusion, or its own v, on the linear path (`dumo.flow.schedule`).

With x_t = n x_vp, t = s / (a + s), a = (1 - t) / n, s = t / n, what such a net F gives is

    epsilon        the noise:  dx_t/dt = F - x_0 = (F - x_t) / (1 - t),            for x_0 = (x_t - t F) / (1 - t)
    v_prediction   a z - s x:  dx_t/dt = (s - a) x_vp + (a + s) F = ((2 t - 1) x_t / n + F) / n

So x_t - t dx_t/dt is its guess of the data, as for any velocity. Where nothing of the data is left, t = 1, noise says
nothing of them, and hardly anything below `MIN_DATA_SHARE` (the cosine schedule): such a schedule takes v (Lin et al.
2023). Both are linear in F, so guidance and means commute with it.

`read_scheduler` makes a `DiffusionToVelocity` of a scheduler_config.json; `settings` gives the entries of such a file.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

from torch import nn

from dumo.flow.schedule import Clock, Law, Schedule
from dumo.io.read import foreign
from dumo.types import Array, Sample, Time, UserError, lift

Prediction = Literal["epsilon", "v_prediction"]

LAWS = get_args(Law)
# The least share of the data at the end of the schedule, for a net of noise: its errors are divided by it (ours). DiT's
# schedule has 6e-3.
MIN_DATA_SHARE = 1e-3


class DiffusionToVelocity(nn.Module):
    """Maps x_t and t to the inputs of a net of a diffusion, and its output to a velocity.

    x_t is on the path `Diffusion`, which ends at T, `schedule.last`, on the linear path: its t is T times ours.
    """

    def __init__(self, schedule: Schedule, prediction: Prediction) -> None:
        """Take the schedule that the net learned, and what it predicts. There are no weights."""
        super().__init__()
        self.schedule = schedule
        self.prediction = prediction
        self.clock = Clock(schedule)

    def forward(self, x: Sample, t: Time) -> tuple[Sample, Array, Callable[[Array], Array]]:
        """For x (b, ...) and our t (b,), return x_vp, the index (b,), and a function from the output to a velocity.

        The output and the velocity, per unit of our t, are shaped like x.
        """
        last = self.schedule.last
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
    def steepest(self) -> float:
        """The largest slope of the index, scaled to go from 0 to 1, by our t."""
        return self.clock.fastest * self.schedule.last / self.schedule.steps


def read_scheduler(config: Mapping[str, Any]) -> DiffusionToVelocity:
    """Make the map of a scheduler_config.json. Raises UserError for one without a table of betas that dumo knows."""
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
    with foreign(f"{subject} describes no schedule", "take the folder of a pipeline with the scheduler that it has"):
        schedule = Schedule.model_validate(fields | {"steps": config["num_train_timesteps"]})
    data_share = 1 - schedule.last
    if prediction == "epsilon" and data_share < MIN_DATA_SHARE:
        raise UserError(
            f"{subject} ends in noise alone but for {data_share:.1e} of the data, less than {MIN_DATA_SHARE:g}, and "
            "says of them through a net that predicts noise nothing but its errors: take a model of prediction_type "
            "v_prediction, or the scheduler that this one was trained by"
        )
    return DiffusionToVelocity(schedule, cast(Prediction, prediction))


def settings(frame: DiffusionToVelocity) -> dict[str, Any]:
    """Return the settings of a scheduler of diffusers with this table and prediction. `read_scheduler` reads them."""
    schedule = frame.schedule
    return {
        "beta_schedule": schedule.kind,
        "beta_start": schedule.start,
        "beta_end": schedule.end,
        "num_train_timesteps": schedule.steps,
        "rescale_betas_zero_snr": schedule.zero_snr,
        "prediction_type": frame.prediction,
    }
