"""Readings of an exact net: each lands where the flow does."""

import pytest
from torch import nn

from contract.case import name, objectives
from dumo.flow.guide import Guide
from dumo.objectives import Objective
from dumo.types import Noised, Reads
from theory.exact import APART, PRODUCT, Exact, Flow, gaussian, record

GUESSED = ("pi_flow",)  # no finite number of guesses is a flow: its own test holds it to their order
FLOWS = [APART, PRODUCT, gaussian(Guide(zeta=0.55))]


def readings(objective: Objective, flow: Flow) -> tuple[Reads, Flow, Noised]:
    """What an exact net tells, the flow on the objective's path, and where to ask."""
    net, b = Exact(flow, objective.needs), record(objective, flow, 64)
    reads = objective.read(net)
    assert reads.velocity or reads.endpoint or reads.flow_map
    return reads, net.flow, b


def having(reading: str, *, hops: bool | None = None) -> pytest.MarkDecorator:
    """The objectives that teach a reading; of flow maps those of some jumps alone, or of all."""
    taught = [(o, o.read(nn.Identity())) for o in objectives(exact=True) if o.kind not in GUESSED]
    some = [o for o, reads in taught if getattr(reads, reading) and hops in (None, reads.hops is not None)]
    return pytest.mark.parametrize("objective", some, ids=name)


@pytest.mark.parametrize("flow", FLOWS)
class TestReads:
    @having("velocity")
    def test_velocity_is_the_slope_of_the_flow(self, objective: Objective, flow: Flow) -> None:
        reads, flow, b = readings(objective, flow)
        assert reads.velocity
        assert (reads.velocity(b.x_t, b.t, b.c) - flow.guided(b.x_t, b.c, b.t)).abs().max() < 1e-12

    @having("endpoint")
    def test_endpoint_is_the_data(self, objective: Objective, flow: Flow) -> None:
        reads, flow, b = readings(objective, flow)
        assert reads.endpoint
        assert (reads.endpoint(b.x_t, b.t, b.c) - flow.carry(b.x_t, b.c, b.t, 0 * b.t)).abs().max() < 1e-12

    @having("flow_map", hops=False)
    def test_flow_map_goes_to_any_time_and_back(self, objective: Objective, flow: Flow) -> None:
        reads, flow, b = readings(objective, flow)
        assert reads.flow_map
        s = b.t.flip(0)
        x_s = reads.flow_map(b.x_t, b.t, s, b.c)
        assert (x_s - flow.carry(b.x_t, b.c, b.t, s)).abs().max() < 1e-12
        assert (reads.flow_map(x_s, s, b.t, b.c) - b.x_t).abs().max() < 1e-9

    @having("flow_map", hops=True)
    def test_a_flow_map_of_some_jumps_goes_where_they_go(self, objective: Objective, flow: Flow) -> None:
        reads, flow, b = readings(objective, flow)
        assert reads.flow_map
        assert reads.hops
        taught = [i for i, (t, r) in enumerate(zip(b.t.tolist(), b.r.tolist(), strict=True)) if r < t]
        assert taught
        b = b[taught]
        assert all(reads.hops(t, r) for t, r in zip(b.t.tolist(), b.r.tolist(), strict=True))
        x_r = reads.flow_map(b.x_t, b.t, b.r, b.c)
        assert (x_r - flow.carry(b.x_t, b.c, b.t, b.r)).abs().max() < 1e-12


def test_every_reading_is_tried() -> None:
    """Some objectives have no velocity, some no endpoint, and most flow maps go anywhere."""
    all_reads = [readings(o, APART)[0] for o in objectives(exact=True)]
    for reading in ("velocity", "endpoint", "flow_map", "both", "hops"):
        assert any(getattr(reads, reading) is not None for reads in all_reads), reading
