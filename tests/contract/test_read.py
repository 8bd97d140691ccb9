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
    reads = objective.read(bind_knobs(model, **objective.needs.knobs))
    assert (model.graded, model.still) == (0, 0)

    g = torch.Generator().manual_seed(0)
    x, t, c = torch.randn(5, 2, 4, 4, generator=g), torch.rand(5, generator=g), torch.arange(5) % 4
    arguments = {"velocity": (x, t, c), "endpoint": (x, t, c), "flow_map": (x, t, t / 2, c), "both": (x, t, c)}
    taught = [reading for reading in arguments if getattr(reads, reading) is not None]
    assert taught
    for i, reading in enumerate(taught, start=1):
        found = getattr(reads, reading)(*arguments[reading])
        assert model.graded + model.still == i
        for out in found if reading == "both" else (found,):
            assert out.shape == x.shape
            assert out.isfinite().all()
            assert out.requires_grad


@pytest.mark.parametrize("objective", list(objectives()), ids=name)
def test_a_jump_of_no_time_stays(objective: Objective) -> None:
    net = randomise(nets()[0].build(objective.needs, (2, 4, 4), 3))
    bound = bind_knobs(net, **objective.needs.knobs)
    reads, x = objective.read(bound), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    zero, half, c = torch.zeros(3), torch.full((3,), 0.5), torch.zeros(3, dtype=torch.long)
    if reads.endpoint is not None:
        assert torch.equal(reads.endpoint(x, zero, c), x)
    if reads.flow_map is not None:
        assert torch.equal(reads.flow_map(x, half, half, c), x)
    if reads.flow_map is not None and reads.endpoint is not None and objective.kind != "several":  # heads of their own
        assert torch.equal(reads.flow_map(x, half, zero, c), reads.endpoint(x, half, c))
    if reads.both is not None and reads.velocity is not None and reads.endpoint is not None:
        assert torch.equal(reads.both(x, half, c)[0], reads.velocity(x, half, c))
        assert torch.equal(reads.both(x, half, c)[1], reads.endpoint(x, half, c))
