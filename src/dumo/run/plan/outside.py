"""Whether a net and a loss of a user's own can be trained, tried once before the first step.

A step makes several passes of one net on the same rows: to learn, to be differentiated, for theta^-. And a run that is
resumed makes the passes that it would have made. So a net and a loss draw no random numbers of their own and change
nothing, and a loss has a number for each row. Where that does not hold, a difference of two passes is no derivative, a
resumed run is another one, or training ends in a traceback: each is a line here instead.

A net and a loss are called twice, as the first step calls them, on random numbers in place of data. dumo's own keep all
this by their tests, and are not tried.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dumo.flow import dropout
from dumo.flow.draw import drawn, noised
from dumo.flow.precision import using
from dumo.nets import Module
from dumo.nets.module import require_heads
from dumo.run.config.spec import Run
from dumo.runtime.random import random_batch
from dumo.training.step import pieces
from dumo.types import Frozen, Needs, Noised, Spec, Terms, UserError
from dumo.types.outside import TAG, kind_of, name_of

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
ROUNDING = 1e-4  # ours: by how much two passes may differ on a GPU, whose kernels may add in another order
KEYED = (
    "drop by dumo.flow.dropout, whose masks are functions of row, step and layer "
    "(docs/library.md, Dropout in a network of your own)"
)


def is_own_net(run: Run) -> bool:
    """Whether the net is a module of Python, or of a class from outside."""
    return isinstance(run.net, Module) or is_from_outside(run.net)


def is_from_outside(part: Spec) -> bool:
    """Whether a part of a run is of a class that is not dumo's."""
    return kind_of(part) == TAG


def has_own_parts(run: Run) -> bool:
    """Whether the net or the loss is a user's own."""
    return is_own_net(run) or is_from_outside(run.objective)


def require_contract(run: Run, net: nn.Module, device: torch.device) -> None:
    """Raise UserError where a user's own net or loss draws, changes a buffer, or gives no number for each row.

    `net` is the run's, with drawn weights: where the last layer is zero, nothing that is drawn would be seen. It is
    left in training mode.
    """
    objective = run.objective
    if is_from_outside(run.net):  # a module of Python was asked when it was built
        with device:
            require_heads(net, objective.needs, run.data.shape, run.data.classes)
    net.train()
    ref = Frozen(net if run.train.ref == "self" else copy.deepcopy(net).eval())
    b, keys = first_rows(run, device)
    with using(run.train.precision, device), dropout.using(keys):
        if is_own_net(run):
            require_pure_net(net, b, objective.needs)
        if is_from_outside(objective):
            first = require_terms(objective.loss(net, ref, b), len(b.t), objective.kind).loss.detach()
            again = objective.loss(net, ref, b).loss.detach()
            if not same(again, first):
                raise UserError(
                    f"objective '{objective.kind}': two losses of the same rows differ, so it draws random numbers or "
                    "keeps a state, and a resumed run would be another one: name what is drawn in Needs.laws, and read "
                    "it from b.drawn (docs/own-objective.md)"
                )


def first_rows(run: Run, device: torch.device) -> tuple[Noised, dropout.Keys]:
    """The rows of the first pass of training, of random numbers in place of data, and the keys of their masks."""
    objective, train, needs = run.objective, run.train, run.objective.needs
    rows = pieces(train, objective)[0]
    x, c = random_batch("outside", rows.stop - rows.start, run.data.shape, run.data.classes)
    draws = drawn(objective, run.data.shape, seed=train.seed, step=0, batch=train.batch, rows=rows)
    between = None
    if needs.teacher.points:  # of the path, in place of a teacher's trajectory
        assert draws.z is not None
        times = [torch.full_like(draws.t, k / needs.teacher.points) for k in range(1, needs.teacher.points)]
        between = torch.stack([run.path.at(x / run.path.sd, draws.z, t)[0] for t in times], 1).to(device)
    b = noised(
        draws,
        run.path,
        x.to(device),
        c.to(device),
        run.data.classes,
        teacher=(lambda x, t, c, v: v) if run.teacher else None,  # none is open yet
        between=between,
    )
    return b, draws.keys.to(device)


def require_terms(found: object, rows: int, objective: str) -> Terms:
    """What a loss returned. Raises UserError where it is no `Terms` of one number per row, or has no gradient."""
    who, wanted = f"objective '{objective}': its loss", f"one number per row, shape ({rows},)"
    if isinstance(found, Tensor):
        raise UserError(
            f"{who} returned a tensor of shape {tuple(found.shape)}: return dumo.types.Terms(loss, parts), where loss "
            f"has {wanted}; the trainer takes the mean"
        )
    if not isinstance(found, Terms):
        raise UserError(
            f"{who} returned a {type(found).__name__}: return dumo.types.Terms(loss, parts), where loss has {wanted}"
        )
    for field in ("parts", "notes"):
        value: object = getattr(found, field)
        if not isinstance(value, Mapping):
            raise UserError(
                f"{who} returned Terms whose {field} are a {type(value).__name__}: give a dict of names and tensors "
                f"of {wanted}"
            )
    values: dict[str, object] = {"loss": found.loss, **found.parts, **found.notes}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{who} returned Terms where '{name}' is a {type(value).__name__}: give {wanted}")
        if value.shape != (rows,):
            raise UserError(
                f"{who} returned Terms where '{name}' has shape {tuple(value.shape)}: give {wanted}, for squares "
                "dumo.types.mean_square(e); the trainer takes the mean over rows"
            )
    if not found.loss.requires_grad:
        raise UserError(
            f"{who} has no gradient: the pass that learns is net(...), without torch.no_grad() and detach()"
        )
    return found


@torch.no_grad()
def require_pure_net(net: nn.Module, b: Noised, needs: Needs) -> None:
    """Raise UserError where a pass in training changes a buffer, or two passes on the same rows differ."""
    known = {"t": b.t, "r": b.r}
    known |= {name: torch.full_like(b.t, value) for name, value in needs.knobs.items()}
    inputs = {name: known.get(name, b.t) for name in needs.names}
    who = f"net {name_of(type(net))}"
    first = net(b.x_t, b.c, **inputs)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    again = net(b.x_t, b.c, **inputs)
    for name, buffer in net.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            owner = type(net.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"{who}: a pass in training changes its buffer '{name}' (of {owner}). A step makes several passes, at "
                "several times, and a statistic of all of them is of none: use a norm of one row, such as nn.GroupNorm "
                "or nn.LayerNorm"
            )
    if all(same(head, other) for head, other in zip(again, first, strict=True)):
        return
    for name, part in net.named_modules():
        if isinstance(part, DROPOUTS) and part.p > 0:
            raise UserError(
                f"{who}: {type(part).__name__}(p={part.p:g}) at '{name}' draws another mask in every pass, so a "
                f"difference of two passes is no derivative, and a resumed run is another one: {KEYED}, or set p=0"
            )
    raise UserError(
        f"{who}: two passes in training on the same rows differ, so it draws random numbers or keeps a state: then a "
        f"difference of two passes is no derivative, and a resumed run is another one. Draw nothing, or {KEYED}"
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two passes gave the same, NaN included: to the bit on a CPU."""
    rtol = 0.0 if one.device.type == "cpu" else ROUNDING
    return torch.allclose(one, other, rtol=rtol, atol=0.0, equal_nan=True)
