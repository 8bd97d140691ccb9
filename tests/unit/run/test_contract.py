"""A net or a loss of a user's own that cannot be trained is refused in a line, before the first step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dumo
from dumo.flow import dropout
from dumo.flow.precision import Precision
from dumo.flow.trainable import MAX_DIFFERENCE, outputs_match
from dumo.run import contract, flops
from dumo.run.net import meta_net
from dumo.run.random_net import random_net, short_run
from dumo.types import Heads
from unit.run.known import same
from unit.run.returning import RETURNS, Named, Returning

STEPS = {"train.steps": 2, "train.batch": 8, "train.schedule": {"kind": "constant"}, "evaluate.protocol.samples": 40}


class Plain(nn.Module):
    """Two heads over points or images, and a part of the layer between that a test chooses."""

    def __init__(self, between: nn.Module | None = None, numbers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(numbers + 1, 16), nn.Linear(16, 2 * numbers)
        self.between = between or nn.Identity()

    def forward(self, x: Tensor, c: Tensor, t: Tensor) -> Heads:
        h = torch.tanh(self.first(torch.cat([x.flatten(1), t[:, None]], 1)))
        v, u = self.last(self.between(h)).chunk(2, 1)
        return v.view(x.shape), u.view(x.shape)


class Rounded(Plain):
    """In training it knows 200 times alone, between which it does not change: a difference is no derivative there."""

    def forward(self, x: Tensor, c: Tensor, t: Tensor) -> Heads:
        return super().forward(x, c, (200 * t).round() / 200 if self.training else t)


class Functional(nn.Module):
    """Dropout without a layer."""

    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5, self.training)


class Numpy(nn.Module):
    """Noise of another library's generator."""

    def forward(self, h: Tensor) -> Tensor:
        return h + float(np.random.default_rng().normal())


class Centred(nn.Module):
    """Each row depends on all rows of the batch."""

    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class Keyed(nn.Module):
    """Dropout by dumo's masks, as docs/library.md has it."""

    def forward(self, h: Tensor) -> Tensor:
        keys = dropout.current(len(h)) if self.training else None
        return h if keys is None else dropout.drop(h, dropout.layer_keys(keys, 0), 0.5)


def train(folder: Path, net: nn.Module | None = None, objective: Any = None, **changes: Any) -> Any:  # noqa: ANN401
    return dumo.train("moons", {**STEPS, **changes}, net=net, objective=objective, out=folder, device="cpu")


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.Dropout(0.5), "two passes"),
        (Functional(), "two passes"),
        (Numpy(), "two passes"),
        (Centred(), "another row"),
        (nn.BatchNorm1d(16), "buffer"),
    ],
    ids=["Dropout", "dropout", "numpy", "rows", "BatchNorm"],
)
@pytest.mark.parametrize("slope", ["central", "dual"])
def test_a_net_that_draws_or_changes_in_a_pass_is_refused(
    between: nn.Module, reason: str, slope: str, tmp_path: Path
) -> None:
    """Each for its own reason: another check may refuse the same network later."""
    with pytest.raises(dumo.UserError, match=reason):
        train(tmp_path / "run", Plain(between), **{"objective.slope": {"kind": slope}})
    assert not (tmp_path / "run").exists()


def test_the_slope_is_examined_in_the_mode_of_training(tmp_path: Path) -> None:
    with pytest.raises(dumo.UserError):
        train(tmp_path / "run", Rounded(), **{"objective.slope": {"kind": "central"}})


@pytest.mark.nightly
def test_dropout_of_no_numbers_and_dumos_own_are_trained(tmp_path: Path) -> None:
    """And with dumo's a run that is resumed is the same to the bit."""
    train(tmp_path / "none", Plain(nn.Dropout(0.0)))
    whole = train(tmp_path / "whole", Plain(Keyed()), **{"train.steps": 4})
    train(tmp_path / "parts", Plain(Keyed()))
    parts = train(tmp_path / "parts", Plain(Keyed()), **{"train.steps": 4})
    plain = train(tmp_path / "plain", Plain(), **{"train.steps": 4})
    assert same(whole.net, parts.net)
    assert not torch.equal(whole.net.first.weight, plain.net.first.weight)


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-7), ("tf32", 2e-4), ("bf16", 2e-3)])
def test_outputs_that_differ_by_rounding_match_on_a_gpu(precision: Precision, rounding: float) -> None:
    """Also where one of them is near zero; on a CPU they are equal to the bit."""
    first = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    first[0, 0] = 1e-6
    second = first + rounding * torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    gpu = MAX_DIFFERENCE[precision]
    cpu = 0.0
    assert outputs_match(first, second, gpu)
    assert not outputs_match(first, second, cpu)
    for max_difference in (gpu, cpu):
        assert outputs_match(first, first.clone(), max_difference)
        assert outputs_match(0 * first, 0 * first, max_difference)
        assert not outputs_match(first, F.dropout(first, 0.1), max_difference)
        assert not outputs_match(0 * first, second, max_difference)


@pytest.mark.parametrize("max_difference", [0.0, 1e-4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_the_same_alone_in_the_same_place(value: float, max_difference: float) -> None:
    first = torch.tensor([1.0, value, 2.0])
    assert outputs_match(first, first.clone(), max_difference)
    for second in (torch.tensor([1.0, 1.0, 2.0]), torch.tensor([value, 1.0, 2.0]), torch.tensor([1.0, value, 3.0])):
        assert not outputs_match(first, second, max_difference)
        assert not outputs_match(second, first, max_difference)


@pytest.mark.parametrize("what", RETURNS)
def test_a_loss_that_is_no_number_per_row_or_draws_is_refused(what: str, tmp_path: Path) -> None:
    with pytest.raises(dumo.UserError):
        train(tmp_path / "run", objective=Returning(what=what))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["random", "mean"])
def test_a_net_has_its_mode_again_where_a_loss_is_refused(what: str) -> None:
    objective = {"kind": Returning().kind, "what": what}
    run = dumo.recipe("moons", {"objective": objective, "sample.solver": {"kind": "euler"}, "train.batch": 8})
    net = random_net(short_run(run), torch.device("cpu")).eval()
    next(net.children()).train()
    modes = [part.training for part in net.modules()]
    with pytest.raises(dumo.UserError):
        contract.require_contract(run, net, torch.device("cpu"))
    assert [part.training for part in net.modules()] == modes


@pytest.mark.parametrize("what", ["mean", "column"])
def test_a_step_of_such_a_loss_is_not_counted(what: str) -> None:
    """As `dumo show` does before anything is trained."""
    run = dumo.recipe(
        "moons", {"objective": {"kind": Returning().kind, "what": what}, "sample.solver": {"kind": "euler"}}
    )
    with pytest.raises(dumo.UserError):
        flops.forward_units(meta_net(run), run.objective, run.path, run.data.shape)


@pytest.mark.slow
def test_images_are_no_way_round(tmp_path: Path) -> None:
    """There steps are proposed, and one is timed, before the run is opened."""
    images = np.zeros((16, 1, 16, 16), np.uint8)
    net = Plain(nn.Dropout(0.5), 256)
    with pytest.raises(dumo.UserError):
        dumo.train(data=images, net=net, overrides=STEPS, out=tmp_path / "run", device="cpu")
    with pytest.raises(dumo.UserError):
        dumo.train(data=images, objective=Returning(what="column"), overrides=STEPS, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dumos_own_nets_and_losses_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(contract, "require_contract", lambda run, net, device: tried.append(run.objective.kind))
    train(tmp_path / "own")
    assert not tried
    train(tmp_path / "net", Plain())
    train(tmp_path / "loss", objective=Named())
    assert tried == ["dumo", Named().kind]
