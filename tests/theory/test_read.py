"""Readings of an exact net: each lands where the flow does."""

import pytest

from contract.case import name, objectives
from dumo.flow.guide import Guide
from dumo.objectives import Objective
from dumo.types import NoisyBatch, Readings
from theory.exact import APART, PRODUCT, Exact, Flow, gaussian, record

GUESSED = ("pi_flow",)  # no finite number of guesses is a flow: its own test holds it to their order
FLOWS = [APART, PRODUCT, gaussian(Guide(zeta=0.55))]


def exact_readings(objective: Objective, flow: Flow) -> tuple[Readings, Flow, NoisyBatch]:
    """What an exact net tells, the flow on the objective's path, and where to ask."""
    net, b = Exact(flow, objective.needs), record(objective, flow, 64)
    readings = objective.readings(net)
    assert readings.velocity or readings.endpoint or readings.flow_map
    return readings, net.flow, b


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("objective", [o for o in objectives(exact=True) if o.kind not in GUESSED], ids=name)
def test_readings_are_those_of_the_flow(objective: Objective, flow: Flow) -> None:
    """The slope, the data, and jumps to any time and back; of a flow map of some jumps, those."""
    readings, flow, b = exact_readings(objective, flow)
    if readings.velocity:
        assert (readings.velocity(b.x_t, b.t, b.c) - flow.guided(b.x_t, b.c, b.t)).abs().max() < 1e-12
    if readings.endpoint:
        assert (readings.endpoint(b.x_t, b.t, b.c) - flow.carry(b.x_t, b.c, b.t, 0 * b.t)).abs().max() < 1e-12
    if readings.flow_map and not readings.hops:
        s = b.t.flip(0)
        x_s = readings.flow_map(b.x_t, b.t, s, b.c)
        assert (x_s - flow.carry(b.x_t, b.c, b.t, s)).abs().max() < 1e-12
        assert (readings.flow_map(x_s, s, b.t, b.c) - b.x_t).abs().max() < 1e-9
    if readings.flow_map and readings.hops:
        b = b[[i for i, moves in enumerate((b.r < b.t).tolist()) if moves]]
        assert len(b.t)
        assert all(readings.hops(t, r) for t, r in zip(b.t.tolist(), b.r.tolist(), strict=True))
        x_r = readings.flow_map(b.x_t, b.t, b.r, b.c)
        assert (x_r - flow.carry(b.x_t, b.c, b.t, b.r)).abs().max() < 1e-12


@pytest.mark.slow
def test_every_reading_is_tried() -> None:
    """Some objectives have no velocity, some no endpoint, and most flow maps go anywhere."""
    all_reads = [exact_readings(o, APART)[0] for o in objectives(exact=True)]
    for reading in ("velocity", "endpoint", "flow_map", "both", "hops"):
        assert any(getattr(readings, reading) is not None for readings in all_reads), reading
