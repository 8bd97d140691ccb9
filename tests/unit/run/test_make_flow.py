"""The flow that a run trains has the settings of the run."""

from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import torch
from torch import nn

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.data import Latents
from dumo.flow.noisy_batch import PRIOR, path_velocity
from dumo.run.net import make_flow
from dumo.run.weights import build
from dumo.runtime.random import keyed_normal, random_row_mask
from dumo.training.state import State

SMALL = ["net.width=16", "net.depth=1", "train.batch=12", "train.seed=3"]


def state_of(net: nn.Module, **averages: nn.Module) -> State:
    named = {float(decay): SimpleNamespace(module=module) for decay, module in averages.items()}
    return cast(State, Mock(spec=State, net=net, averages=named))


def test_the_flow_in_training_has_what_the_run_says() -> None:
    run = load("digits", [*SMALL, "train.coupling.group=6"])
    net = build(run)
    flow = make_flow(run, state_of(net))
    x = torch.randn(12, *run.data.shape)
    c = torch.zeros(12, dtype=torch.long)

    # Its noise is drawn by the seed of the run, and coupled.
    z = flow.add_noise(x, c, flow.make_draws(0, run.data.shape, batch=12)).z
    noise = keyed_normal(3, 0, "z", rows=range(12), shape=run.data.shape)
    assert run.train.coupling is not None
    assert not torch.equal(z, noise)
    assert torch.equal(z, run.train.coupling(x / run.path.sd, noise, c))

    # The network itself is called, without an adapter, in the precision of the run, and is theta^-.
    assert flow._net_for_objective(None, None) is net
    assert flow._theta_minus(net).module is net
    assert flow.precision == run.train.precision


def test_an_average_is_theta_and_the_teacher_answers_its_share() -> None:
    run = load("digits", [*SMALL, "train.ema=[{decay: 0.9}]", "train.ref=0.9"])
    latents = Mock(spec=Latents, prior=0.5, classes=10)
    net, average = nn.Linear(2, 2), nn.Linear(2, 2)
    flow = make_flow(
        Mock(spec=Run, train=run.train, objective=run.objective, path=run.path, data=latents),
        state_of(net, **{"0.9": average}),
        teacher=path_velocity,
    )
    assert flow._theta_minus(net).module is average
    teacher_rows = flow.make_draws(0, (2,), batch=12).teacher_rows
    assert teacher_rows is not None
    assert torch.equal(teacher_rows, random_row_mask(3, 0, PRIOR, 12, 0.5))
