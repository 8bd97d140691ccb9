"""What every reading keeps: it is made without a pass, and answers with one."""

import pytest
import torch

from contract.case import kind, name, nets, objectives
from dumo.nets import Net
from dumo.objectives import Objective
from dumo.testing import properties
from dumo.testing.network import randomise
from dumo.testing.properties import CLASSES, SHAPE


@pytest.mark.parametrize("objective", list(objectives()), ids=name)
@pytest.mark.parametrize("net", nets(), ids=kind)
def test_readings(objective: Objective, net: Net) -> None:
    properties.readings_make_one_pass_each(objective, randomise(net.build(objective.needs, SHAPE, CLASSES)).double())


@pytest.mark.parametrize("objective", list(objectives()), ids=name)
def test_a_jump_of_no_time_stays(objective: Objective) -> None:
    net = randomise(nets()[0].build(objective.needs, SHAPE, CLASSES)).double()
    properties.a_jump_of_no_time_stays(objective, net)


@pytest.mark.parametrize("objective", list(objectives()), ids=name)
def test_readings_agree(objective: Objective) -> None:
    net = randomise(nets()[0].build(objective.needs, SHAPE, CLASSES))
    readings = properties.readings_of(objective, net)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    zero, half, c = torch.zeros(3), torch.full((3,), 0.5), torch.zeros(3, dtype=torch.long)
    if (
        readings.flow_map is not None and readings.endpoint is not None and objective.kind != "several"
    ):  # heads of their own
        assert torch.equal(readings.flow_map(x, half, zero, c), readings.endpoint(x, half, c))
    if readings.both is not None and readings.velocity is not None and readings.endpoint is not None:
        assert torch.equal(readings.both(x, half, c)[0], readings.velocity(x, half, c))
        assert torch.equal(readings.both(x, half, c)[1], readings.endpoint(x, half, c))
