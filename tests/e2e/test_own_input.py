"""What is built around a net serves one whose heads are not all told the same."""

import pytest
import torch
from torch import nn

from contract.case import randomise
from dumo.flow.draw import draw
from dumo.flow.guide import Guide
from dumo.flow.slope import DualSlope
from dumo.lab.step import Plain, slope_error
from dumo.objectives import Several
from dumo.run.config.load import load
from dumo.run.config.spec import Run
from dumo.run.folder import sampler
from dumo.run.gallery import readings
from dumo.run.plan import cost, doctor
from dumo.training.record import ask
from dumo.types import Noised, frozen
from theory.exact import Exact, gaussian, record

NAMES = ("digits-three-heads", "digits-three-heads-shortcut")
TINY = ("net.width=16", "net.depth=2", "train.batch=16")
each = pytest.mark.parametrize("name", NAMES)


def tiny(name: str, *more: str) -> tuple[Run, nn.Module, Noised]:
    """A recipe made small, its net with random weights, and a record."""
    run = load(name, [*TINY, *more])
    c, g = torch.arange(16) % 10, torch.Generator().manual_seed(0)
    x = torch.randn(16, *run.data.shape, generator=g)
    return run, randomise(run.build()), draw(run.objective, run.path, x, c, torch.full_like(c, 10), seed=0, step=0)


def test_the_slope_is_examined() -> None:
    run, _, _ = tiny(NAMES[0])
    errors = doctor.examine(run, torch.device("cpu")).errors
    assert list(errors) == ["v", "u", "m"]
    assert all(0 < error < 1e-4 for error in errors.values())


def test_a_third_head_costs_its_layers_and_halves_two_passes_of_their_rows() -> None:
    """And that at full size: three forward units of the pass with gradients, one for all derivatives, little more."""
    runs = [load(name) for name in ("digits", *NAMES)]
    two, three, halves = (cost.forward_units(r.outline(), r.objective, r.path, r.data.shape) for r in runs)
    assert three == pytest.approx(two, abs=0.02)
    assert halves - three == pytest.approx(2 / 8, abs=1e-6)
    assert [r.train.steps * u / 5000 / two for r, u in zip(runs, (two, three, halves), strict=True)] == pytest.approx(
        [1, 1, 1], rel=2e-3
    )


@each
def test_three_parts_are_probed_two_by_two(name: str) -> None:
    run, net, b = tiny(name)
    loss = run.objective.loss
    found = ask(net, run.objective.read(net), ("v", "u", "m"), b, lambda: loss(net, frozen(net), b))
    assert found
    assert found.drift
    assert list(found.cosines) == ["v,u", "v,m", "u,m"]
    assert all(-1 <= cosine <= 1 for cosine in found.cosines.values())
    assert all(norm > 0 for norm in found.norms.values())


def test_the_endpoint_of_three_heads_rests_along_the_exact_flow() -> None:
    objective, flow = Several(guide=Guide(), slope=DualSlope()), gaussian()
    net, b = Exact(flow, objective.needs), record(objective, flow, 32)
    found = ask(net, objective.read(net), ("v",), b, lambda: objective.loss(net, frozen(net), b))
    assert found
    assert found.drift is not None
    assert found.drift < 1e-6


@each
def test_the_bench_has_its_yardstick_and_its_errors(name: str) -> None:
    run, net, b = tiny(name)
    plain = Plain(of=run.objective)
    plain.loss(net, frozen(net), b).loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.numel() > 11 * 16)
    assert slope_error(net, frozen(net), run.objective, b) < 1e-3


def test_a_reading_is_titled_by_the_head_it_reads() -> None:
    run, net, _ = tiny(NAMES[0])
    found = readings(sampler(run, net))
    assert found["u"].title == "u head, jumps (restart)"
    assert found["v"].title.startswith("v head")
    run, net, _ = tiny(NAMES[0], "sample.solver={kind: hop}")
    assert readings(sampler(run, net))["u"].title == "m head, jumps (hop)"
