"""What a net of two times u(x_t, t, r) can tell a solver, and how its knobs are set."""

from collections.abc import Mapping

from dumo.types import Cond, Heads, Net, Objective, Reads, Sample, Time, lift


def bind(net: Net, **knobs: float) -> Net:
    """Fix the knobs of a net: what a sampler does before it reads."""

    def bound(x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        return net(x, c, **inputs, **{name: x.new_full((len(x),), value) for name, value in knobs.items()})

    return bound


def reading(objective: Objective, net: Net, knobs: Mapping[str, float] | None = None) -> Reads:
    """Read a net trained by an objective, with these of its knobs set and the others as the objective has them."""
    knobs = {**objective.needs.knobs, **(knobs or {})}
    return objective.read(bind(net, **knobs) if knobs else net)


def average(net: Net, head: int = 0) -> Reads:
    """Read the mean velocity u(x_t, t, r): x_r = x_t - (t - r) u, and v = u at r = t (MeanFlow, Eq. 12)."""

    def flow_map(x: Sample, t: Time, s: Time, c: Cond) -> Sample:
        return x - lift(t - s, x) * net(x, c, t=t, r=s)[head]

    return Reads(
        velocity=lambda x, t, c: net(x, c, t=t, r=t)[head],
        endpoint=lambda x, t, c: flow_map(x, t, 0 * t, c),
        flow_map=flow_map,
    )
