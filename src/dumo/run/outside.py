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

from dumo.config.spec import Run
from dumo.flow import dropout
from dumo.flow.draw import drawn, noised
from dumo.flow.precision import Precision, using
from dumo.nets import Module
from dumo.nets.module import require_heads
from dumo.runtime.random import random_batch
from dumo.training.step import pieces
from dumo.types import Frozen, Needs, Noised, Spec, Terms, UserError
from dumo.types.outside import TAG, kind_of, name_of

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Ours: by how much two passes may differ on a GPU, whose kernels may add in another order; of the outputs' norm
MAX_DIFFERENCE: dict[Precision, float] = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2}
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

    `net` is the run's net with every weight drawn: a last layer of zeros would hide what it draws. It is left in
    training mode.
    """
    objective = run.objective
    if is_from_outside(run.net):  # a module of Python was asked when it was built
        with device:
            require_heads(net, objective.needs, run.data.shape, run.data.classes)
    net.train()
    ref = Frozen(net if run.train.ref == "self" else copy.deepcopy(net).eval())
    b, keys = first_rows(run, device)
    max_difference = max_pass_difference(device, run.train.precision)
    with using(run.train.precision, device), dropout.using(keys):
        if is_own_net(run):
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


def require_terms(returned: object, rows: int, objective: str) -> Terms:
    """What a loss returned. Raises UserError where it is no `Terms` of one number per row, or has no gradient."""
    subject = f"objective '{objective}': its loss"
    expected = f"one number per row, shape ({rows},)"
    if isinstance(returned, Tensor):
        raise UserError(
            f"{subject} returned a tensor of shape {tuple(returned.shape)}: return dumo.types.Terms(loss, parts), "
            f"where loss has {expected}; the trainer takes the mean"
        )
    if not isinstance(returned, Terms):
        raise UserError(
            f"{subject} returned a {type(returned).__name__}: return dumo.types.Terms(loss, parts), where loss has "
            f"{expected}"
        )
    for field in ("parts", "notes"):
        value: object = getattr(returned, field)
        if not isinstance(value, Mapping):
            raise UserError(
                f"{subject} returned Terms whose {field} are a {type(value).__name__}: give a dict of names and "
                f"tensors of {expected}"
            )
    values: dict[str, object] = {"loss": returned.loss, **returned.parts, **returned.notes}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{subject} returned Terms where '{name}' is a {type(value).__name__}: give {expected}")
        if value.shape != (rows,):
            raise UserError(
                f"{subject} returned Terms where '{name}' has shape {tuple(value.shape)}: give {expected}, for squares "
                "dumo.types.mean_square(e); the trainer takes the mean over rows"
            )
    if not returned.loss.requires_grad:
        raise UserError(
            f"{subject} has no gradient: the pass that learns is net(...), without torch.no_grad() and detach()"
        )
    return returned


@torch.no_grad()
def require_pure_net(net: nn.Module, b: Noised, needs: Needs, max_difference: float) -> None:
    """Raise UserError where a pass in training changes a buffer, or two on the same rows differ (`outputs_match`)."""
    known = {"t": b.t, "r": b.r}
    known |= {name: torch.full_like(b.t, value) for name, value in needs.knobs.items()}
    inputs = {name: known.get(name, b.t) for name in needs.names}
    subject = f"net {name_of(type(net))}"
    first = net(b.x_t, b.c, **inputs)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    again = net(b.x_t, b.c, **inputs)
    for name, buffer in net.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            owner = type(net.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"{subject}: a pass in training changes its buffer '{name}' (of {owner}). A step makes several passes "
                "at different times t, so such a statistic mixes them: use a norm within one row, such as nn.GroupNorm "
                "or nn.LayerNorm"
            )
    if all(outputs_match(head, repeated, max_difference) for head, repeated in zip(first, again, strict=True)):
        return
    for name, part in net.named_modules():
        if isinstance(part, DROPOUTS) and part.p > 0:
            raise UserError(
                f"{subject}: {type(part).__name__}(p={part.p:g}) at '{name}' draws another mask in every pass, so a "
                f"difference of two passes is no derivative, and a resumed run is another one: {KEYED}, or set p=0"
            )
    raise UserError(
        f"{subject}: two passes in training on the same rows differ, so it draws random numbers or keeps a state: then "
        f"a difference of two passes is no derivative, and a resumed run is another one. Draw nothing, or {KEYED}"
    )


def max_pass_difference(device: torch.device, precision: Precision) -> float:
    """By how much two passes may differ, as `outputs_match` has it; 0 on a CPU."""
    return 0.0 if device.type == "cpu" else MAX_DIFFERENCE[precision]


def outputs_match(first: Tensor, second: Tensor, max_difference: float) -> bool:
    """Whether two passes gave the same, what is not finite included.

    `max_difference`: the norm of their difference over the norm of the first; 0: they are equal to the bit.
    """
    if max_difference == 0:
        return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
    finite = first.isfinite() & second.isfinite()
    if not torch.allclose(first[~finite], second[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return False
    values = first[finite].double()
    difference = torch.linalg.vector_norm(second[finite].double() - values)
    return bool(difference <= max_difference * torch.linalg.vector_norm(values))
