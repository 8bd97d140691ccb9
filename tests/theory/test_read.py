"""Readings of an exact net: each lands where the flow does."""

import pytest
from torch import Tensor

from contract.case import name, objectives
from dumo.flow.guide import Guide
from dumo.objectives import Objective
from dumo.types import Reads
from theory.exact import APART, PRODUCT, Exact, Flow, gaussian, record

FLOWS = [APART, PRODUCT, gaussian(Guide(zeta=0.55))]


def readings(objective: Objective, flow: Flow) -> tuple[Reads, Tensor, Tensor, Tensor]:
    b = record(objective, flow, 64)
    return objective.read(Exact(flow, objective.needs)), b.x_t, b.t, b.c


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("objective", list(objectives(exact=True)), ids=name)
class TestReads:
    def test_velocity_is_the_slope_of_the_flow(self, objective: Objective, flow: Flow) -> None:
        reads, x, t, c = readings(objective, flow)
        assert reads.velocity is not None
        assert (reads.velocity(x, t, c) - flow.guided(x, c, t)).abs().max() < 1e-12

    def test_endpoint_is_the_data(self, objective: Objective, flow: Flow) -> None:
        reads, x, t, c = readings(objective, flow)
        if reads.endpoint is not None:
            assert (reads.endpoint(x, t, c) - flow.carry(x, c, t, 0 * t)).abs().max() < 1e-12

    def test_flow_map_goes_to_any_time_and_back(self, objective: Objective, flow: Flow) -> None:
        reads, x, t, c = readings(objective, flow)
        if reads.flow_map is not None:
            s = t.flip(0)
            x_s = reads.flow_map(x, t, s, c)
            assert (x_s - flow.carry(x, c, t, s)).abs().max() < 1e-12
            assert (reads.flow_map(x_s, s, t, c) - x).abs().max() < 1e-9
