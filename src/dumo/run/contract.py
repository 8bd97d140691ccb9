"""Whether a net and a loss of a user's own keep the contract of training, tried once before the first step.

`require_contract` is the entrance, for a run that `dumo.config.code.has_own_parts`. A step makes several passes of one
net on the same rows: to learn, to be differentiated, for theta^-. And a run that is resumed makes the passes that it
would have made. So a net and a loss draw no random numbers of their own and change nothing, and a loss has a number for
each row. Where that does not hold, a difference of two passes is no derivative, a resumed run is another one, or
training ends in a traceback: each is a line here instead.

A net and a loss are called twice, as the first step calls them, on random numbers in place of data. dumo's own keep all
this by their tests, and are not tried.
"""

import copy

import torch
from torch import Tensor, nn

from dumo.config.code import has_own_net, is_from_outside
from dumo.config.spec import Run
from dumo.flow import dropout
from dumo.flow.check import MAX_DIFFERENCE, outputs_match, require_pure_net
from dumo.flow.draw import add_noise, make_draws
from dumo.flow.flow import require_terms
from dumo.flow.precision import Precision, using
from dumo.runtime.random import random_batch
from dumo.training.step import passes_of_rank
from dumo.types import Frozen, Noised, UserError


def require_contract(run: Run, net: nn.Module, device: torch.device) -> None:
    """Raise UserError where a user's own net or loss draws, changes a buffer, or gives no number for each row.

    `net` is the run's net with every weight drawn: a last layer of zeros would hide what it draws. It is left in
    training mode.
    """
    objective = run.objective
    if is_from_outside(run.net):  # a module of Python was asked when it was built
        from dumo.nets.module import require_heads

        with device:
            require_heads(net, objective.needs, run.data.shape, run.data.classes)
    net.train()
    ref = Frozen(net if run.train.ref == "self" else copy.deepcopy(net).eval())
    b, keys = _first_rows(run, device)
    max_difference = max_pass_difference(device, run.train.precision)
    with using(run.train.precision, device), dropout.using(keys):
        if has_own_net(run):
            require_pure_net(net, b, objective.needs, max_difference)
        if is_from_outside(objective):
            first = require_terms(objective.loss(net, ref, b), len(b.t), objective.kind).loss.detach()
            again = objective.loss(net, ref, b).loss.detach()
            if not outputs_match(first, again, max_difference):
                raise UserError(
                    f"objective '{objective.kind}': two losses of the same rows differ, so it draws random numbers or "
                    "keeps a state, and a resumed run would be another one: name what is drawn in Needs.laws, and read "
                    "it from b.drawn (docs/own-objective.md)"
                )


def _first_rows(run: Run, device: torch.device) -> tuple[Noised, dropout.Keys]:
    """The rows of the first pass of training, of random numbers in place of data, and the keys of their masks."""
    objective = run.objective
    train = run.train
    points = objective.needs.teacher.points
    rows = passes_of_rank(train, objective)[0]
    x, c = random_batch("outside", rows.stop - rows.start, run.data.shape, run.data.classes)
    draws = make_draws(objective, run.data.shape, seed=train.seed, step=0, batch=train.batch, rows=rows)
    between = None
    if points:  # of the path, in place of a teacher's trajectory
        assert draws.z is not None
        x_at_points: list[Tensor] = []
        for k in range(1, points):
            x_t, _ = run.path.at(x / run.path.sd, draws.z, torch.full_like(draws.t, k / points))
            x_at_points.append(x_t)
        between = torch.stack(x_at_points, 1).to(device)
    b = add_noise(
        draws,
        run.path,
        x.to(device),
        c.to(device),
        run.data.classes,
        teacher=(lambda x, t, c, v: v) if run.teacher else None,  # none is open yet
        between=between,
    )
    return b, draws.keys.to(device)


def max_pass_difference(device: torch.device, precision: Precision) -> float:
    """By how much two passes may differ, as `outputs_match` has it; 0 on a CPU."""
    return 0.0 if device.type == "cpu" else MAX_DIFFERENCE[precision]
