"""Whether a network and a loss can be trained, tried once on a few rows: what would go wrong in silence is a line.

A step makes several passes of one network on the same rows: to learn, to be differentiated, for theta^-. And a resumed
run makes the passes that it would have made. So a pass draws nothing that is not keyed and changes nothing, its rows do
not mix, and a loss has a number for each row. du/dt is `dumo.flow.derivative`'s.
"""

from collections.abc import Mapping
from math import lcm

import torch
from torch import Tensor, nn

from dumo.flow.passes import Passes, call_of, generators, inner
from dumo.flow.precision import Precision
from dumo.flow.slope import precision_of
from dumo.types import Needs, Noised, Objective, Sample, Terms, Time, UserError
from dumo.types.outside import name_of

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Ours: by how much two passes may differ on a GPU, whose kernels may add in another order; of the outputs' norm
MAX_DIFFERENCE: dict[Precision, float] = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2}
KEYED = (
    "drop by dumo.flow.dropout, whose masks are functions of row, step and layer "
    "(docs/library.md, Dropout in a network of your own)"
)
ROWS = 4  # that are tried
MIXED = 1e-4  # ours: a change of one row may move another by this share, as kernels round


# ------------------------------------------------------------------------------------------------------- what a loss is


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
    if torch.is_grad_enabled() and not returned.loss.requires_grad:
        raise UserError(
            f"{subject} has no gradient: the pass that learns is net(...), without torch.no_grad() and detach()"
        )
    return returned


# ------------------------------------------------------------------------------------------------------- what a pass is


def inputs_of(b: Noised, needs: Needs) -> dict[str, Time]:
    """The times and knobs of a pass on a record."""
    known = {"t": b.t, "r": b.r}
    known |= {name: torch.full_like(b.t, value) for name, value in needs.knobs.items()}
    return {name: known.get(name, b.t) for name in needs.names}


@torch.no_grad()
def require_pure_net(net: nn.Module, b: Noised, needs: Needs, max_difference: float) -> None:
    """Raise UserError where a pass in training changes a buffer, or two on the same rows differ (`outputs_match`)."""
    inputs = inputs_of(b, needs)
    module = inner(net.net) if isinstance(net, Passes) else net
    subject = f"net {name_of(type(module))}"
    x = b.x_t.clone()
    first = net(x, b.c, **inputs)
    if not torch.allclose(x, b.x_t, rtol=0.0, atol=0.0, equal_nan=True):
        raise UserError(f"{subject}: a pass changes its input x in place, which later passes get: write x = x + ...")
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    again = net(b.x_t, b.c, **inputs)
    for name, buffer in module.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"{subject}: a pass in training changes its buffer '{name}' (of {owner}). A step makes several passes "
                "at different times t, so such a statistic mixes them: use a norm within one row, such as nn.GroupNorm "
                "or nn.LayerNorm"
            )
    if all(outputs_match(head, repeated, max_difference) for head, repeated in zip(first, again, strict=True)):
        return
    for name, part in module.named_modules():
        if isinstance(part, DROPOUTS) and part.p > 0 and not isinstance(net, Passes):  # which keys them
            raise UserError(
                f"{subject}: {type(part).__name__}(p={part.p:g}) at '{name}' draws another mask in every pass, so a "
                f"difference of two passes is no derivative, and a resumed run is another one: {KEYED}, or set p=0"
            )
    way = f"Draw nothing, or {KEYED}"
    if isinstance(net, Passes):  # in which torch's default generator is keyed
        way = (
            "Keep no state, and draw with torch's default generator alone, not with numpy's, Python's or one of its own"
        )
    raise UserError(
        f"{subject}: two passes in training on the same rows differ, so it draws random numbers or keeps a state: then "
        f"a difference of two passes is no derivative, and a resumed run is another one. {way}"
    )


def tolerance(x: Sample) -> float:
    """By how much two passes on x may differ (`outputs_match`): on a CPU not at all."""
    if x.device.type == "cpu":
        return 0.0
    match precision_of(x):
        case "fp32":
            return MAX_DIFFERENCE["fp32"]
        case "tf32":
            return MAX_DIFFERENCE["tf32"]
        case _:
            return MAX_DIFFERENCE["bf16"]


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


@torch.no_grad()
def require_rows_apart(net: Passes, b: Noised, needs: Needs) -> None:
    """Raise UserError where a head is not finite, or another row changes with the first one."""
    inputs = inputs_of(b, needs)
    x = b.x_t.clone()
    x[0] += 1
    name = type(inner(net.net)).__name__
    for head, here, moved in zip(needs.heads, net(b.x_t, b.c, **inputs), net(x, b.c, **inputs), strict=False):
        if not here.isfinite().all():
            raise UserError(f"{name}: head '{head}' is not finite on the first rows: look at the data and the weights")
        if len(here) > 1 and (here[1:] - moved[1:]).abs().max() > MIXED * here[1:].abs().max():
            raise UserError(
                f"{name}: head '{head}' of one row changes with another row, so the rows of a batch mix (a batch norm, "
                "attention over the first axis, a reshape). Each row has a time of its own: keep them apart"
            )


def rows_to_try(objective: Objective) -> int:
    """A few rows, in whole groups of those that belong together."""
    group = group_of(objective)
    least = 2 if group > 1 else 1
    return max(ROWS // group, least) * group


def group_of(objective: Objective) -> int:
    """How many neighbouring rows belong together."""
    return lcm(objective.times.group, objective.needs.group)


def draws_itself(passes: Passes, b: Noised, needs: Needs) -> bool:
    """Whether a pass, whose draws are not keyed, draws of torch's generators. Raises UserError where it fails."""
    before = generators(b.x_t.device)
    try:
        with torch.no_grad():
            passes(b.x_t, b.c, **inputs_of(b, needs))
    except UserError:
        raise
    except Exception as error:  # a module of somebody else may raise anything
        raise UserError(
            f"{type(inner(passes.net)).__name__} failed on x {tuple(b.x_t.shape)} at times {tuple(b.t.shape)}: "
            f"{short(error)}. {why_it_failed(error, passes, b)}"
        ) from error
    return before != generators(b.x_t.device)


def why_it_failed(error: Exception, passes: Passes, b: Noised) -> str:
    """What is to be done about a pass that failed, by what is most often wrong."""
    weight = next(iter(inner(passes.net).parameters()), b.x_t)
    if weight.dtype != b.x_t.dtype and not torch.is_autocast_enabled(b.x_t.device.type):
        return f"x is {b.x_t.dtype}, and the network's weights {weight.dtype}: give x.to({weight.dtype})"
    if isinstance(error, IndexError) and passes.labelled:
        return "A label more than there are classes stands for none: an embedding needs classes + 1 rows"
    return f"It is called by {passes.described}: look at shapes, or give dumo.Flow({call_of(passes.needs)})"


# ------------------------------------------------------------------------------------------- what can be trained at all


def require_teachable(objective: Objective, rows: int, *, has_teacher: bool) -> None:
    """Raise UserError where an objective lacks its teacher, or the number of rows parts some that belong together."""
    if objective.needs.teacher.points:
        raise UserError(
            f"objective '{objective.kind}' learns from whole trajectories of a teacher, which dumo train makes: take "
            "that, or another objective"
        )
    if objective.needs.teacher.velocity == "must" and not has_teacher:
        raise UserError(
            f"objective '{objective.kind}' learns from a teacher's velocity: give dumo.Flow(teacher=...), a flow that "
            "was trained, or a function of (x_t, t, c, v_t)"
        )
    group = group_of(objective)
    if rows % group:
        raise UserError(
            f"{rows} rows, and {group} belong together in objective '{objective.kind}': give a multiple of {group}"
        )


def require_parameters(net: nn.Module) -> None:
    """Raise UserError where no parameter is trained."""
    parameters = list(net.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        raise UserError(
            f"no parameter of {type(inner(net)).__name__} is trained: call net.requires_grad_(), or make the flow of a "
            "network that learns"
        )


def short(error: BaseException) -> str:
    """What an error says, in a few words."""
    text = str(error).partition("\n")[0].partition(": use slope")[0][:140]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
