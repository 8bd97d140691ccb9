"""Whether a net and a loss of a user's own keep the contract of training, tried once before the first step.

A step makes several passes of one net on the same rows: to learn, to be differentiated, for theta^-. And a run that is
resumed makes the passes that it would have made. So the contract is:

1. a net returns the heads that the objective needs;
2. a pass of a net draws no random numbers of its own and changes nothing, and its rows do not mix;
3. a loss has one number for each row, and gives the same numbers for the same record.

Where that does not hold, a difference of two passes is no derivative, a resumed run is another one, or training ends in
a traceback: each is a UserError here instead.

`require_contract` is the entrance, for a run that `dumo.config.code.has_own_parts`. It calls a net and a loss as the
first step calls them, on random numbers in place of data. dumo's own keep the contract by their tests, and are not
tried.
"""

import copy

import torch
from torch import nn

from dumo.config.code import has_own_net, is_from_outside
from dumo.config.spec import Run
from dumo.flow import dropout
from dumo.flow.check import max_pass_difference, outputs_match, require_pure_net, require_rows_apart
from dumo.flow.draw import add_noise, make_draws, path_velocity
from dumo.flow.flow import require_terms
from dumo.flow.generate import training_mode
from dumo.flow.path import FlowPath
from dumo.flow.precision import using
from dumo.runtime.random import random_batch
from dumo.training.step import passes_of_rank
from dumo.types import Array, Frozen, Noised, Objective, Sample, Trail, UserError

_STREAM_KEY = "outside"  # of the random numbers in place of data. Another key would draw other numbers


def require_contract(run: Run, net: nn.Module, device: torch.device) -> None:
    """Raise UserError where a user's own net or loss breaks the contract.

    `net` is the run's net with every weight drawn: a last layer of zeros would hide what it draws. It is tried in
    training mode, and has its own mode again afterwards.
    """
    if is_from_outside(run.net):  # a module of Python was asked when it was built
        from dumo.nets.module import require_heads

        with device:
            require_heads(net, run.objective.needs, run.data.shape, run.data.classes)
    b, keys = _first_rows(run, device)
    with training_mode(net), using(run.train.precision, device), dropout.using(keys):
        if has_own_net(run):
            require_pure_net(net, b, run.objective.needs, max_pass_difference(b.x_t))
            require_rows_apart(net, b, run.objective.needs)
        if is_from_outside(run.objective):
            target = net if run.train.ref == "self" else copy.deepcopy(net).eval()
            _require_repeatable_loss(run.objective, net, Frozen(target), b)


def _require_repeatable_loss(objective: Objective, net: nn.Module, ref: Frozen, b: Noised) -> None:
    """Raise UserError where a loss has not one number for each row, or where two losses of the same record differ."""
    first = require_terms(objective.loss(net, ref, b), len(b.t), objective.kind).loss.detach()
    second = objective.loss(net, ref, b).loss.detach()
    if not outputs_match(first, second, max_pass_difference(b.x_t)):
        raise UserError(
            f"objective '{objective.kind}': two losses of the same rows differ, so it draws random numbers or "
            "keeps a state, and a resumed run would be another one: name what is drawn in Needs.laws, and read "
            "it from b.drawn (docs/own-objective.md)"
        )


def _first_rows(run: Run, device: torch.device) -> tuple[Noised, dropout.Keys]:
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
