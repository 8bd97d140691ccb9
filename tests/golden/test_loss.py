"""Losses that must not move: a refactoring gives the same numbers, or says in its changelog why not.

To set them anew after a change that is meant:  python tests/golden/test_loss.py
"""

import json
from pathlib import Path

import pytest
import torch

from contract.case import members
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.path import Linear
from dumo.nets import DiT
from dumo.objectives import Objective
from dumo.runtime.random import stream
from dumo.types import Spec, frozen

OBJECTIVES = members(Objective)
FILE = Path(__file__).with_name("loss.json")
CLASSES, SHAPE, ROWS = 3, (1, 4, 4), 8


def measured(kind: type[Spec]) -> dict[str, list[float]]:
    """Loss and gradient norm of an objective with its defaults, in float64, at steps of one net, and of its cycle."""
    objective = kind()
    torch.manual_seed(0)  # the net's; what a step draws is keyed
    net = DiT(patch=2, width=16, depth=1, attention=2).build(objective.needs, SHAPE, CLASSES).double()
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=stream("golden", p.numel()), dtype=p.dtype)  # no zero layers
    rows = max(ROWS, objective.needs.group)  # those that belong together
    x = torch.randn(rows, *SHAPE, generator=stream("golden"), dtype=torch.float64)
    c = torch.arange(rows) % CLASSES
    found: dict[str, list[float]] = {"loss": [], "gradient": []}
    for step in sorted({0, 1, 2, *(step for step, _ in objective.needs.cycle)}):
        b = draw(objective, Linear(), x, c, CLASSES, seed=0, step=step, teacher=path_velocity)
        net.zero_grad()
        loss = objective.loss(net, frozen(net), b).loss.mean()
        loss.backward()
        found["loss"].append(loss.item())
        found["gradient"].append(
            sum(p.grad.square().sum().item() for p in net.parameters() if p.grad is not None) ** 0.5
        )
    return found


@pytest.mark.parametrize("kind", OBJECTIVES, ids=lambda kind: kind.__name__)
def test_losses_stand(kind: type[Spec]) -> None:
    golden = json.loads(FILE.read_text())
    assert kind.__name__ in golden, "a new objective: run python tests/golden/test_loss.py once"
    for name, values in measured(kind).items():
        assert values == pytest.approx(golden[kind.__name__][name], rel=1e-5)  # times are drawn in float32


if __name__ == "__main__":
    FILE.write_text(json.dumps({kind.__name__: measured(kind) for kind in OBJECTIVES}, indent=2) + "\n")
