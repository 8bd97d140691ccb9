"""What a run is, counted on a network without values: its size, and what a step costs and teaches."""

from dataclasses import dataclass
from typing import Any

from dumo.config.spec import Run
from dumo.run import flops
from dumo.run.net import meta_net, num_parameters
from dumo.runtime.random import stream
from dumo.types import Objective

# Where t - r is larger, one-step sampling is taught.
_LARGE_STEP = 0.9
# Draws of times by which the share of such rows is measured.
_NUM_DRAWS = 1_000_000


@dataclass(frozen=True)
class RunFacts:
    """What a run is before it is run. `dumo show --json` prints the fields."""

    spec: dict[str, Any]  # the run as plain values
    parameters: int
    parameters_trained: int
    forward_flops_per_image: float  # floating-point operations of a forward pass, for an image or a point
    forward_units_per_step: float  # floating-point operations of a step over those of a forward pass
    # How a dual slope computes du/dt: `DualStrategy` and its `text`; None without a dual slope.
    slope: dict[str, Any] | None
    far: float | None  # P(t - r > 0.9), the rows that teach one-step sampling; None if no jump is taught
    guidance_scale: float  # the effective one in training; 1 is none


def show(run: Run) -> RunFacts:
    """Count what a run is."""
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
    """P(t - r > 0.9), measured on a million draws: the share of the rows that teach one-step sampling."""
    t, r = objective.times(_NUM_DRAWS, stream("show"))
    return (t - r > _LARGE_STEP).double().mean().item()
