"""Convert an epsilon- or v-prediction diffusion model into a velocity model on the linear path.

A diffusion model has x_vp = a x_0 + s z, a^2 + s^2 = 1, and the linear path has x_t = (1 - t) x_0 + t z. With

    n = sqrt(t^2 + (1 - t)^2),   t = s / (a + s),   a = (1 - t) / n,   s = t / n

they are the same point, x_t = n x_vp. The velocity follows from the model's output F:

    epsilon        F is the noise z, and x_0 = (x_t - t F) / (1 - t):   dx_t/dt = F - x_0 = (F - x_t) / (1 - t)
    v_prediction   F is a z - s x_0:   dx_t/dt = (s - a) x_vp + (a + s) F = ((2 t - 1) x_t / n + F) / n

x_t - t dx_t/dt is the model's prediction of the data. Both formulas are linear in F, so they commute with guidance and
averages. An epsilon-prediction contains no information about the data at t = 1, and hardly any if the share of the data
is less than `MIN_DATA_SHARE`, as in the cosine schedule. Such schedules need v-prediction (Lin et al. 2023).

`read_scheduler` creates a `DiffusionToVelocity` from a scheduler_config.json, and `scheduler_settings` returns the
entries of such a file. `dumo.nets.dualized` calls the `DiffusionToVelocity` in each pass.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

from torch import nn

from dumo.flow.noise_schedule import BetaSchedule, Schedule, TimeToIndex
from dumo.types import Array, Sample, Time, UserError, lift

Prediction = Literal["epsilon", "v_prediction"]

BETA_SCHEDULES = get_args(BetaSchedule)
# The smallest share of the data at the end of a schedule for epsilon-prediction, whose errors are divided by this share
# (our choice). DiT's schedule has 6e-3.
MIN_DATA_SHARE = 1e-3


class DiffusionToVelocity(nn.Module):
    """Convert x_t and t to the inputs of a diffusion model, and its output to a velocity. It has no weights.

    x_t is on the path `Diffusion`, on which t = 1 is T = `schedule.last_time` of the linear path.
    """

    def __init__(self, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.schedule = schedule
        self.prediction = prediction
        self.time_to_index = TimeToIndex(schedule)

    def forward(self, x: Sample, t: Time) -> tuple[Sample, Array, Callable[[Array], Array]]:
        """Return the model's inputs x_vp (b, ...) and index (b,), and a function from its output to the velocity.

        x (b, ...) is at time t (b,) of the path `Diffusion`, and the velocity is per unit of this t.
        """
        last = self.schedule.last_time
        linear_t = last * t
        time = lift(linear_t, x)
        n = (time * time + (1 - time) * (1 - time)) ** 0.5
        x_vp = x / n

        def to_velocity(model_output: Array) -> Array:
            if self.prediction == "epsilon":
                return last * ((model_output - x) / (1 - time))
            return last * (((2 * time - 1) * x_vp + model_output) / n)

        return x_vp, self.time_to_index(linear_t), to_velocity

    @property
    def max_index_slope(self) -> float:
        """The largest derivative of the index with respect to t, with the index scaled to [0, 1]."""
        return self.time_to_index.max_slope * self.schedule.last_time / self.schedule.steps


def read_scheduler(config: Mapping[str, Any]) -> DiffusionToVelocity:
    """Create the conversion for the scheduler of a scheduler_config.json.

    Raises UserError for an unknown beta schedule or prediction type, and for epsilon-prediction if the schedule ends
    with too small a share of the data.
    """
    scheduler_class = config.get("_class_name")
    beta_schedule = config.get("beta_schedule", "linear")
    subject = f"pipeline: its scheduler, a {scheduler_class},"
    if "beta_start" not in config or config.get("trained_betas") is not None or beta_schedule not in BETA_SCHEDULES:
        raise UserError(
            f"{subject} must have one of the beta schedules {', '.join(BETA_SCHEDULES)}: use a pipeline folder with "
            "the training scheduler"
        )
    prediction = config.get("prediction_type", "epsilon")
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    if prediction not in get_args(Prediction):
        raise UserError(
            f"{subject} has prediction_type {prediction!r}, but dumo supports {' and '.join(get_args(Prediction))}: "
            "use another model"
        )
    fields = {"kind": beta_schedule, "start": config["beta_start"], "end": config.get("beta_end"), "zero_snr": zero_snr}
    schedule = Schedule.model_validate(fields | {"steps": config["num_train_timesteps"]})
    data_share = 1 - schedule.last_time
    if prediction == "epsilon" and data_share < MIN_DATA_SHARE:
        raise UserError(
            f"{subject} has a weight of {data_share:.1e} on the data at its last step, but epsilon-prediction needs "
            f"at least {MIN_DATA_SHARE:g}: use a model with prediction_type v_prediction, or the scheduler that it was "
            "trained with"
        )
    return DiffusionToVelocity(schedule, cast(Prediction, prediction))


def scheduler_settings(diffusion: DiffusionToVelocity) -> dict[str, Any]:
    """Return the settings of a diffusers scheduler with this schedule and prediction type."""
    schedule = diffusion.schedule
    return {
        "beta_schedule": schedule.kind,
        "beta_start": schedule.start,
        "beta_end": schedule.end,
        "num_train_timesteps": schedule.steps,
        "rescale_betas_zero_snr": schedule.zero_snr,
        "prediction_type": diffusion.prediction,
    }
