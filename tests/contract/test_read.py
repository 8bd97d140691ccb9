"""What every reading keeps: it is made without a pass, and answers with one."""

import pytest
import torch

from contract.case import Counted, kind, name, nets, objectives, randomise
from dumo.flow.reading import bind_knobs
from dumo.nets import Net
from dumo.objectives import Objective


@pytest.mark.parametrize("objective", list(objectives()), ids=name)
@pytest.mark.parametrize("net", nets(), ids=kind)
def test_readings(objective: Objective, net: Net) -> None:
    model = Counted(randomise(net.build(objective.needs, (2, 4, 4), 3)))
    readings = objective.readings(bind_knobs(model, **objective.needs.knobs))
    assert (model.graded, model.still) == (0, 0)

    g = torch.Generator().manual_seed(0)
    x, t, c = torch.randn(5, 2, 4, 4, generator=g), torch.rand(5, generator=g), torch.arange(5) % 4
    arguments = {"velocity": (x, t, c), "endpoint": (x, t, c), "flow_map": (x, t, t / 2, c), "both": (x, t, c)}
    taught = [reading for reading in arguments if getattr(readings, reading) is not None]
    assert taught
    for i, reading in enumerate(taught, start=1):
        found = getattr(readings, reading)(*arguments[reading])
        assert model.graded + model.still == i
        for out in found if reading == "both" else (found,):
            assert out.shape == x.shape
            assert out.isfinite().all()
            assert out.requires_grad


@pytest.mark.parametrize("objective", list(objectives()), ids=name)
def test_a_jump_of_no_time_stays(objective: Objective) -> None:
    net = randomise(nets()[0].build(objective.needs, (2, 4, 4), 3))
    bound = bind_knobs(net, **objective.needs.knobs)
    readings, x = objective.readings(bound), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    zero, half, c = torch.zeros(3), torch.full((3,), 0.5), torch.zeros(3, dtype=torch.long)
    if readings.endpoint is not None:
        assert torch.equal(readings.endpoint(x, zero, c), x)
    if readings.flow_map is not None:
        assert torch.equal(readings.flow_map(x, half, half, c), x)
    if (
        readings.flow_map is not None and readings.endpoint is not None and objective.kind != "several"
    ):  # heads of their own
        assert torch.equal(readings.flow_map(x, half, zero, c), readings.endpoint(x, half, c))
    if readings.both is not None and readings.velocity is not None and readings.endpoint is not None:
        assert torch.equal(readings.both(x, half, c)[0], readings.velocity(x, half, c))
        assert torch.equal(readings.both(x, half, c)[1], readings.endpoint(x, half, c))
