"""Count the size of a run's network and the cost of a step on the meta device, for `dumo show`."""

from dataclasses import dataclass
from typing import Any

from dumo.config.spec import Run
from dumo.run import flops
from dumo.run.net import meta_net, num_parameters
from dumo.runtime.random import stream
from dumo.types import Objective

# Rows with t - r above this value train one-step sampling.
_LARGE_STEP = 0.9
# Number of sampled times from which the share of these rows is estimated.
_NUM_DRAWS = 1_000_000


@dataclass(frozen=True)
class RunFacts:
    """The properties of a run before training. `dumo show --json` prints the fields."""

    # The run as plain values.
    spec: dict[str, Any]
    parameters: int
    parameters_trained: int
    # Floating-point operations of a forward pass, per image or point.
    forward_flops_per_image: float
    # Floating-point operations of a step over those of a forward pass.
    forward_units_per_step: float
    # How a dual slope computes du/dt: `DualStrategy` and its `text`; None without a dual slope.
    slope: dict[str, Any] | None
    # P(t - r > 0.9), the share of rows that train one-step sampling; None if the objective learns no jumps.
    far: float | None
    # The effective guidance scale in training; 1 means no guidance.
    guidance_scale: float


def show(run: Run) -> RunFacts:
    """Count the properties of a run."""
    net = meta_net(run)
    step = flops.step_cost(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    learns_jumps = run.readings.endpoint or run.readings.flow_map
    return RunFacts(
        spec=run.model_dump(mode="json", exclude=None if run.resolved else {"resolved"}),
        parameters=num_parameters(net),
        parameters_trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
        forward_flops_per_image=step.pass_flops,
        forward_units_per_step=step.units,
        slope={**step.strategy._asdict(), "text": step.strategy.text} if step.strategy else None,
        far=far_share(run.objective) if learns_jumps else None,
        guidance_scale=run.training_guidance.scale,
    )


def far_share(objective: Objective) -> float:
    """Estimate P(t - r > 0.9) from a million sampled times: the share of rows that train one-step sampling."""
    t, r = objective.times(_NUM_DRAWS, stream("show"))
    return (t - r > _LARGE_STEP).double().mean().item()
