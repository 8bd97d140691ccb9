"""The check of a user's network leaves all as it was, and is made when it is due. Its findings: test_refusals.py."""

import copy
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dumo
from contract.own import Perceptron, UNet
from dumo.flow.noisy_batch import path_velocity
from dumo.objectives import FlowMatching
from dumo.types import Frozen, Net, NoisyBatch, Terms, UserError
from unit.flow.test_refusals import IMAGES, TWO, Around, MixesRows, StartsByData, X, points


def test_a_check_in_evaluation_is_made_again_in_training() -> None:
    flow = dumo.Flow(UNet(norm="batch")).eval()
    flow(IMAGES)
    flow.train()
    with pytest.raises(UserError, match=r"norm\.running_mean"):
        flow(IMAGES)

    flow = dumo.Flow(UNet(dropout=0.3)).eval()
    flow(IMAGES)
    assert not flow.net_draws
    flow.train()(IMAGES)
    assert flow.net_draws


def test_a_share_of_no_row_is_for_validation() -> None:
    flow = dumo.Flow(points(), teacher=path_velocity, prior=0.5).eval()
    flow(X[:1])
    with pytest.raises(UserError, match=r"prior = 0\.5"):
        flow.train()(X[:1])
    flow(X)


def test_generators_stay_where_a_check_refuses() -> None:
    flow = dumo.Flow(MixesRows())
    before = torch.get_rng_state()
    with pytest.raises(UserError):
        flow(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_refused_network_is_as_it_was() -> None:
    net = StartsByData()
    with pytest.raises(UserError):
        dumo.Flow(net)(X)
    assert not net.is_started


def test_a_network_whose_layers_are_lazy_is_tried_as_it_is() -> None:
    class Lazy(Around):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = nn.LazyLinear(2)

        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            return self.net(self.lazy(x), t)

    flow = dumo.Flow(Lazy())
    assert flow(X).isfinite()
    assert not flow.is_check_of_copy


def test_rows_that_a_zero_layer_hides_are_seen_to_mix_at_the_second_check() -> None:
    class UncopiedMixesRows(MixesRows):
        def __deepcopy__(self, memo: object) -> "UncopiedMixesRows":
            raise RuntimeError("not me")

    net = UncopiedMixesRows()
    last_layer = cast(Perceptron, net.net).out
    nn.init.zeros_(last_layer.weight)
    nn.init.zeros_(last_layer.bias)
    flow = dumo.Flow(net)
    flow(X)
    nn.init.normal_(last_layer.weight)
    flow.step = 100
    with pytest.raises(UserError, match="head 'v'"):
        flow(X)


def test_a_network_that_cannot_be_copied_is_checked_as_it_is_and_once_more() -> None:
    class Uncopied(Around):
        def __deepcopy__(self, memo: object) -> "Uncopied":
            raise RuntimeError("not me")

    flow = dumo.Flow(Uncopied())
    checks: list[int] = []
    own_check = flow.check
    flow.__dict__["check"] = lambda *given: checks.append(flow.step) or own_check(*given)
    flow(X)
    flow.step = 99
    flow(X)
    flow.eval()(X)
    flow.train()
    for _ in range(2):
        flow(X)
    assert checks == [0, 100]


def test_a_network_is_as_it_was_after_a_check() -> None:
    net = Perceptron(TWO)
    nn.init.zeros_(net.out.weight)
    before = copy.deepcopy(net.state_dict())
    dumo.Flow(net).check(X)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_data_with_gradients_are_read_where_none_are_taken() -> None:
    flow = dumo.Flow(points())
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert flow(x).isfinite()
    assert flow(x.detach()).isfinite()
    assert flow.velocity(x, 0.5).isfinite().all()


def test_a_number_of_numpy_says_how_many_samples() -> None:
    flow = dumo.Flow(points())
    assert torch.equal(flow.sample(cast(int, np.int64(2)), shape=(2,)), flow.sample(2, shape=(2,)))


class DrawsOfTorch(Around):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return self.net(x + 0.1 * torch.randn(len(x), 2), t)


class DrawingLoss(FlowMatching):
    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        return Terms(super().loss(net, ref, b).loss * torch.rand(len(b.t)))


def test_draws_of_torch_are_keyed_in_a_network_and_in_a_loss() -> None:
    losses = [dumo.Flow(DrawsOfTorch())(X).item() for _ in range(2)]
    assert losses[0] == losses[1]
    torch.manual_seed(0)
    flow = dumo.Flow(points(), DrawingLoss(), call=lambda net, x, t, c: net(x, t)[0])
    assert flow(X, step=1).item() == flow(X, step=1).item()
    assert flow(X, step=1).item() != flow(X, step=2).item()
