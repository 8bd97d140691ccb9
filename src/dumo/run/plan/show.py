"""What a run is, said before it is run."""

from typing import Any

from torch import nn

from dumo.run.config.spec import Run
from dumo.run.plan import cost
from dumo.runtime.random import stream


def show(run: Run, net: nn.Module | None = None) -> dict[str, Any]:
    """What a run is before it is run: its spec, its size, and what a step costs and teaches.

    `forward_units_per_step` counts floating-point operations; `slope` is the way of a slope that rides; `far` is
    P(t - r > 0.9), the share of rows where one-step sampling is taught, None where no jump is; `guidance_scale` is the
    effective one, 1 for none. `net`: its outline, if there is one already.
    """
    net = run.outline() if net is None else net
    jumps = run.reads.endpoint or run.reads.flow_map
    way = cost.way(net, run.objective, run.path, run.data.shape, ref=run.train.ref)
    return {
        "spec": run.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in net.parameters()),
        "parameters_trained": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "forward_flops_per_image": cost.forward_flops(net, run.objective, run.data.shape),
        "forward_units_per_step": cost.forward_units(net, run.objective, run.path, run.data.shape, ref=run.train.ref),
        "slope": way and {**way._asdict(), "text": way.text},
        "far": far(run) if jumps else None,
        "guidance_scale": run.guided.scale,
    }


def far(run: Run) -> float:
    """P(t - r > 0.9), of a million draws: the share of the rows where one-step sampling is taught."""
    t, r = run.objective.times(1_000_000, stream("show"))
    return (t - r > 0.9).double().mean().item()
