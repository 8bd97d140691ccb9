"""Dropout and routing in a training step: keyed, they reach the net, and are the same in every pass of the step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dumo.encoders.tokens import ByteTokenizer
from dumo.flow.guide import Guide
from dumo.flow.path import Linear
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets import DiT, Net, UNet
from dumo.nets.learned import LearnedTexts
from dumo.nets.route import Route
from dumo.objectives import DuMo
from dumo.training.metrics import StepMetrics
from dumo.training.settings import Train
from dumo.training.state import begin
from rows_given import load_captions
from trained import ToyTrainer
from unit.training.toy import flow_of

SMALL = {"width": 8, "multipliers": (1, 2), "attend": (4,), "depth": 1}
SHAPE, CAPTIONS = (3, 8, 8), ("one", "two", "a three")


@pytest.fixture(params=["unet", "words", "tread"])
def net(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[float], Net]:
    """Nets that drop so much: numbers of a layer, or tokens of captions; or route that share of the tokens."""
    if request.param == "tread":
        deep, route = DiT(width=8, depth=4, attention=2), Route(share=0, first=1, last=1)
        return lambda p: deep.model_copy(update={"route": route.model_copy(update={"share": p})})
    if request.param == "unet":
        return lambda p: UNet(**SMALL, dropout=p)
    texts = LearnedTexts(tokenizer=ByteTokenizer(length=8), width=8, depth=1)
    return lambda p: DiT(width=8, depth=2, attention=2, texts=texts.model_copy(update={"drop": p}))


def step(spec: Net, rows: int | None = None, exact: bool = False) -> tuple[StepMetrics, torch.Tensor]:
    """One step of a small net, and its gradient."""
    objective = DuMo(slope=JvpSlope() if exact else DualSlope(), guide=Guide(zeta=0.5), drop=0.25)
    torch.manual_seed(0)
    net = spec.build(objective.needs, SHAPE, len(CAPTIONS))
    load_captions(net, CAPTIONS)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    train = Train(steps=1, batch=8, seed=1, micro_batch=rows)
    state = begin(net, train)
    x, c = torch.randn(8, *SHAPE), torch.arange(8) % 3
    done = ToyTrainer(state, flow_of(state, train, objective, Linear(), 3), train).step((x, c))
    return done, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.slow
def test_dropout_changes_the_step_and_draws_nothing(net: Callable[[float], Net]) -> None:
    (plain, _), (one, first), (again, second) = step(net(0.0)), step(net(0.3)), step(net(0.3))
    assert one.loss != plain.loss
    assert one.loss == again.loss
    assert torch.equal(first, second)


@pytest.mark.slow
def test_pieces_of_a_batch_meet_the_masks_of_the_whole(net: Callable[[float], Net]) -> None:
    (whole, one), (pieces, other) = step(net(0.3)), step(net(0.3), rows=2)
    assert abs(whole.loss - pieces.loss) < 1e-5 * whole.loss
    assert (one - other).norm() < 1e-5 * one.norm()
