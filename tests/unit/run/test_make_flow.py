"""The flow that a run trains has the settings of the run."""

from unittest.mock import Mock

import torch

from dumo.config.load import load
from dumo.data import Latents
from dumo.flow.noise import PRIOR, path_velocity
from dumo.run.net import draw_net, make_flow
from dumo.runtime.random import keyed_normal, random_row_mask
from dumo.training.state import begin

SMALL = ["net.width=16", "net.depth=1", "train.batch=12", "train.seed=3"]


def test_the_flow_in_training_has_what_the_run_says() -> None:
    run = load("digits", [*SMALL, "train.coupling.group=6"])
    net = draw_net(run)
    state = begin(net, run.train)
    x, c = torch.randn(12, *run.data.shape), torch.arange(12) % run.data.classes
    flow = make_flow(run, state)

    # Its noise is drawn by the seed of the run, and coupled.
    z = flow.add_noise(x, c, flow.make_draws(0, run.data.shape, batch=12)).z
    noise = keyed_normal(3, 0, "z", rows=range(12), shape=run.data.shape)
    assert run.train.coupling is not None
    assert not torch.equal(z, noise)
    assert torch.equal(z, run.train.coupling(x, noise, c))

    # The network itself is called, without an adapter, in the precision of the run, and is theta^-.
    assert flow._as_called(None, None) is net
    assert flow._reference(net).module is net
    assert flow.precision == run.train.precision


def test_an_average_is_theta_and_the_teacher_answers_its_share() -> None:
    run = load("digits", [*SMALL, "train.ema=[{decay: 0.9}]", "train.ref=0.9"])
    run = run.model_copy(update={"data": Mock(spec=Latents, prior=0.5, classes=10)})
    state = begin(torch.nn.Linear(2, 2), run.train)
    flow = make_flow(run, state, teacher=path_velocity)
    assert flow._reference(state.net).module is state.averages[0.9].module
    teacher_rows = flow.make_draws(0, (2,), batch=12).teacher_rows
    assert teacher_rows is not None
    assert torch.equal(teacher_rows, random_row_mask(3, 0, PRIOR, 12, 0.5))
