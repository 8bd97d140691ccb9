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
from dumo.flow.flow import require_loss_per_row
from dumo.flow.noise import add_noise, make_draws, path_velocity
from dumo.flow.path import FlowPath
from dumo.flow.precision import using
from dumo.flow.sampling import eval_mode
from dumo.flow.trainable import max_pass_difference, outputs_match, require_trainable
from dumo.runtime.random import random_batch
from dumo.training.step import passes_of_rank
from dumo.types import Array, Frozen, NoisyBatch, Objective, Sample, Trail, UserError

_STREAM_KEY = "outside"  # of the random numbers in place of data. Another key would draw other numbers


def require_contract(run: Run, net: nn.Module, device: torch.device) -> None:
    """Raise UserError if a user's own network or loss breaks the contract.

    `net` is the run's network with random weights, because a last layer of zeros would hide what it draws. It is tried
    in training mode, and has its own mode again afterwards.
    """
    b, keys = _first_rows(run, device)
    with eval_mode(net, training=True), using(run.train.precision, device), dropout.using(keys):
        if has_own_net(run):
            require_trainable(net, b, run.objective.needs)
        if is_from_outside(run.objective):
            target = net if run.train.ref == "self" else copy.deepcopy(net).eval()
            _require_repeatable_loss(run.objective, net, Frozen(target), b)


def _require_repeatable_loss(objective: Objective, net: nn.Module, ref: Frozen, b: NoisyBatch) -> None:
    """Raise UserError unless a loss has one number for each row, and two losses of the same batch are equal."""
    first = require_loss_per_row(objective.loss(net, ref, b), len(b.t), objective.kind).loss.detach()
    second = objective.loss(net, ref, b).loss.detach()
    if not outputs_match(first, second, max_pass_difference(b.x_t)):
        raise UserError(
            f"objective '{objective.kind}': two losses of the same rows differ, so a resumed run would differ: keep no "
            "state, name what is drawn in Needs.laws, and read it from b.drawn (docs/own-objective.md)"
        )


def _first_rows(run: Run, device: torch.device) -> tuple[NoisyBatch, dropout.Keys]:
    """The record of the first pass of training, of random numbers in place of data, and the keys of its dropout."""
    objective = run.objective
    train = run.train
    rows = passes_of_rank(train, objective)[0]
    x, c = random_batch(_STREAM_KEY, rows.stop - rows.start, run.data.shape, run.data.classes)
    draws = make_draws(objective, run.data.shape, seed=train.seed, step=0, batch=train.batch, rows=rows)
    between = None
    if objective.needs.teacher.points:
        assert draws.z is not None
        between = _points_on_path(run.path, x, draws.z, objective.needs.teacher.points).to(device)
    b = add_noise(
        draws,
        run.path,
        x.to(device),
        c.to(device),
        run.data.classes,
        teacher=path_velocity if run.teacher else None,  # none is open yet
        between=between,
    )
    return b, draws.keys.to(device)


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
