"""Readings of an exact net: each lands where the flow does."""

import pytest

from contract.case import name, objectives
from dumo.flow.guide import Guide
from dumo.objectives import Objective
from dumo.testing import properties
from dumo.testing.exact import APART, ExactFlow, ExactNet, gaussian
from theory.exact import PRODUCT

# A finite number of guesses is no flow, and neither is a pulled prediction: their own tests hold them.
NO_FLOW = ("pi_flow", "self_e")
FLOWS = [APART, PRODUCT, gaussian(Guide(zeta=0.55))]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("objective", [o for o in objectives(exact=True) if o.kind not in NO_FLOW], ids=name)
def test_readings_are_those_of_the_flow(objective: Objective, flow: ExactFlow) -> None:
    """The slope, the data, and jumps to any time and back; of a flow map of some jumps, those."""
    properties.readings_are_those_of_the_flow(objective, flow)


@pytest.mark.slow
def test_every_reading_is_tried() -> None:
    """Some objectives have no velocity, some no endpoint, and most flow maps go anywhere."""
    all_reads = [o.readings(ExactNet(APART, o.needs)) for o in objectives(exact=True)]
    for reading in ("velocity", "endpoint", "flow_map", "both", "hops"):
        assert any(getattr(readings, reading) is not None for readings in all_reads), reading
