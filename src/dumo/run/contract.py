"""Whether a user's own network and loss can be trained, tried once before the first step of `dumo train`.

A step makes several passes of one network on the same rows, and a resumed run makes the passes that an uninterrupted
one would have made. So the network must be pure, with independent rows and finite outputs (`dumo.flow.trainable`), and
the loss must have one number for each row, and give the same numbers for the same batch. Otherwise training would run
towards another target without an error.

`require_contract` calls both as the first step calls them, on random numbers in place of data. dumo's own keep the
contract by their tests, and are not tried.
"""

import copy

import torch
from torch import nn

from dumo.config.code import has_own_net, is_from_outside
from dumo.config.spec import Run
from dumo.flow import dropout
from dumo.flow.module import Flow
from dumo.flow.noisy_batch import path_velocity
from dumo.flow.path import FlowPath
from dumo.flow.precision import using
from dumo.flow.sampling import eval_mode
from dumo.flow.trainable import max_pass_difference, outputs_match, require_trainable
from dumo.runtime.random import random_batch
from dumo.training.micro_batch import rows_of_rank
from dumo.types import Array, Sample, Trail, UserError

_STREAM_KEY = "outside"  # of the random numbers in place of data. Another key would draw other numbers


def require_contract(run: Run, net: nn.Module, device: torch.device) -> None:
    """Raise UserError if a user's own network or loss breaks the contract.

    `net` is the run's network with random weights, because a last layer of zeros would hide what it draws. It is tried
    in training mode, and has its own mode again afterwards.
    """
    objective = run.objective
    train = run.train
    flow = Flow(
        net,
        objective,
        direct=True,
        classes=run.data.classes,
        path=run.path,
        teacher=path_velocity if run.teacher else None,  # none is open yet
        ref=None if train.ref == "self" else copy.deepcopy(net),
        precision=train.precision,
        seed=train.seed,
    )

    # Put noise to random numbers in place of data, as the first pass of training does.
    rank_rows, micro_batches = rows_of_rank(train, objective)
    rows = slice(rank_rows.start, rank_rows.start + micro_batches[0].stop)
    x, c = random_batch(_STREAM_KEY, rows.stop - rows.start, run.data.shape, run.data.classes)
    draws = flow.make_draws(0, run.data.shape, batch=train.batch, rows=rows)
    between = None
    if objective.needs.teacher.points:
        assert draws.z is not None
        between = _points_on_path(run.path, x, draws.z, objective.needs.teacher.points).to(device)
    batch = flow.add_noise(x.to(device), c.to(device), draws, between=between)

    with eval_mode(net, training=True), using(train.precision, device), dropout.using(draws.keys.to(device)):
        if has_own_net(run):
            require_trainable(net, batch, objective.needs)
        if is_from_outside(objective):
            first = flow.compute_loss(batch).loss.detach()
            second = flow.compute_loss(batch).loss.detach()
            if not outputs_match(first, second, max_pass_difference(batch.x_t)):
                raise UserError(
                    f"objective '{objective.kind}': two losses of the same rows differ, so a resumed run would differ: "
                    "keep no state, name what is drawn in Needs.laws, and read it from b.drawn (docs/own-objective.md)"
                )


def _points_on_path(path: FlowPath, x: Sample, z: Sample, points: int) -> Trail:
    """x_t at the times k / points between data and noise, (b, points - 1, ...): a stand-in for a teacher's trajectory.

    x are data in their own units.
    """
    x_at_points: list[Array] = []
    for k in range(1, points):
        t = torch.full((len(x),), k / points)
        x_t, _ = path.at(x / path.sd, z, t)
        x_at_points.append(x_t)
    return torch.stack(x_at_points, 1)
