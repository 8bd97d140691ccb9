"""Check a user-defined network and loss before the first step of `dumo train`.

A step evaluates the network several times on the same rows, and a resumed run repeats the passes of an uninterrupted
run. The network must therefore be pure, with independent rows and finite outputs (`dumo.flow.trainable`), and the loss
must return one number per row, the same for the same batch. Otherwise training would silently use a wrong target.

`require_contract` calls both as the first step does, on random numbers instead of data. dumo's own networks and losses
are covered by tests and are not checked.
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

# The key of the random numbers that replace data.
_STREAM_KEY = "outside"


def require_contract(run: Run, net: nn.Module, device: torch.device) -> None:
    """Raise UserError if a user-defined network or loss violates the contract.

    `net` is the run's network with random weights, because a last layer of zeros would hide random operations. It is
    tested in training mode, and its mode is restored.
    """
    objective = run.objective
    train = run.train
    flow = Flow(
        net,
        objective,
        direct=True,
        classes=run.data.classes,
        path=run.path,
        # The teacher is not open yet.
        teacher=path_velocity if run.teacher else None,
        ref=None if train.ref == "self" else copy.deepcopy(net),
        precision=train.precision,
        seed=train.seed,
    )

    # Add noise to random numbers instead of data, as the first pass of training does.
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
                    f"objective '{objective.kind}': two losses of the same rows differ, so a resumed run would "
                    "differ: keep no state, declare random draws in Needs.laws, and read them from b.drawn "
                    "(docs/own-objective.md)"
                )


def _points_on_path(path: FlowPath, x: Sample, z: Sample, points: int) -> Trail:
    """Return x_t at the times k / points, (b, points - 1, ...), in place of a teacher's trajectory.

    x is in units of the data.
    """
    x_at_points: list[Array] = []
    for k in range(1, points):
        t = torch.full((len(x),), k / points)
        x_t, _ = path.at(x / path.sd, z, t)
        x_at_points.append(x_t)
    return torch.stack(x_at_points, 1)
