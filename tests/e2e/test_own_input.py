"""What is built around a net serves one whose heads do not all take the same inputs."""

import pytest
import torch

from contract.case import randomise
from dumo.flow.draw import draw
from dumo.lab.step import Plain, slope_error
from dumo.run.config.load import load
from dumo.run.plan.doctor import examine
from dumo.types import frozen


@pytest.mark.parametrize("name", ["digits-three-heads", "digits-three-heads-shortcut"])
def test_the_bench_and_the_doctor_serve_heads_with_inputs_of_their_own(name: str) -> None:
    run = load(name, ["net.width=16", "net.depth=2", "train.batch=16"])
    c, x = torch.arange(16) % 10, torch.randn(16, *run.data.shape, generator=torch.Generator().manual_seed(0))
    net = randomise(run.build())
    b = draw(run.objective, run.path, x, c, torch.full_like(c, 10), seed=0, step=0)
    Plain(of=run.objective).loss(net, frozen(net), b).loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.numel() > 11 * 16)
    assert slope_error(net, frozen(net), run.objective, b) < 1e-3
    errors = examine(run, torch.device("cpu")).errors
    assert list(errors) == ["v", "u", "m"]
    assert all(0 < error < 1e-4 for error in errors.values())
