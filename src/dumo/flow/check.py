"""Whether a user's network can be trained, tried once on a few rows. What would fail in silence becomes a UserError.

A step makes several passes of one network on the same rows: to learn, to be differentiated, for theta^-. A resumed run
must make the same passes as an uninterrupted one. So a pass draws nothing that is not keyed and changes nothing, and
its rows do not mix.

`LoopFlow.check` calls, in this order:

1. before any pass: `require_formulas`, `require_teacher`, `require_prior`, `require_some_rows`, `require_first_stage`,
   `require_whole_groups`, `require_parameters` and `require_precise_weights`;
2. on the first `rows_to_try` rows: `try_pass`, `require_pure_net` (up to `max_pass_difference`),
   `require_finite_heads` of the outputs of `try_pass`, and `require_rows_apart`.

Then it compares du/dt (`dumo.flow.derivative`, which uses `inputs_of` and `short_text`). Each loss goes through
`flow.require_terms`. `dumo.run.contract` calls `require_pure_net`, `require_rows_apart` and `outputs_match` for nets
and objectives of users.
"""

from collections.abc import Mapping
from math import lcm

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dumo.flow.fit import (
    climb_problem,
    first_stage_problem,
    guide_problem,
    path_problem,
    picks_some_rows,
    prior_problem,
    teacher_problem,
)
from dumo.flow.passes import Passes
from dumo.flow.precision import HALVES, Precision, precision_of, require_precision
from dumo.flow.signature import call_example
from dumo.types import Heads, Needs, Noised, Objective, Sample, Time, UserError, unwrap
from dumo.types.outside import name_of

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# By how much two passes may differ on a GPU, whose kernels may add in another order, over the outputs' norm: ours
MAX_DIFFERENCE: dict[Precision, float] = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2}
_KEYED_DROPOUT = (
    "drop by dumo.flow.dropout, whose masks are functions of row, step and layer "
    "(docs/library.md, Dropout in a network of your own)"
)
_TRIED_ROWS = 4  # how many rows are tried, if no more belong together: ours
# By how much a change of one row may move another, over the largest value, because kernels round: ours
_MAX_MIXING = 1e-4
_MAX_TEXT = 140  # characters of an error that `short_text` keeps: ours


# ------------------------------------------------------------------------------------------------ what a pass must keep


def inputs_of(b: Noised, needs: Needs) -> dict[str, Time]:
    """The times and knobs (b,) of a pass on a record, by the names of an objective's needs.

    Knobs have their default values. An input of another name, which a record does not hold, gets t.
    """
    values = {"t": b.t, "r": b.r}
    for name, value in needs.knobs.items():
        values[name] = torch.full_like(b.t, value)
    return {name: values.get(name, b.t) for name in needs.names}


def _module_of(net: nn.Module) -> nn.Module:
    """The user's own network, out of `Passes` and of its wrappers."""
    return unwrap(net.net) if isinstance(net, Passes) else net


@torch.no_grad()
def require_pure_net(net: nn.Module, b: Noised, needs: Needs, max_difference: float) -> None:
    """Raise UserError where a pass in training changes its input or a buffer, or where two on the same rows differ.

    `max_difference`: how far two passes may differ, as `outputs_match` takes it.
    """
    inputs = inputs_of(b, needs)
    module = _module_of(net)
    subject = f"net {name_of(type(module))}"
    buffers_before = _copy_buffers(module)
    x = b.x_t.clone()
    first = net(x, b.c, **inputs)
    if not torch.allclose(x, b.x_t, rtol=0.0, atol=0.0, equal_nan=True):
        raise UserError(f"{subject}: a pass changes its input x in place, which later passes get: write x = x + ...")
    second = net(b.x_t, b.c, **inputs)
    _require_same_buffers(module, buffers_before)
    if all(outputs_match(head, repeated, max_difference) for head, repeated in zip(first, second, strict=True)):
        return
    if isinstance(net, Passes):  # it seeds torch's default generator for each pass
        fix = (
            "Keep no state, and draw with torch's default generator alone, not with numpy's, Python's or one of its own"
        )
    else:
        _require_no_dropout(module, subject)
        fix = f"Draw nothing, or {_KEYED_DROPOUT}"
    raise UserError(
        f"{subject}: two passes in training on the same rows differ, so it draws random numbers or keeps a state: then "
        f"a difference of two passes is no derivative, and a resumed run is another one. {fix}"
    )


def _copy_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's buffers by name, without those that its first pass makes (torch's lazy layers)."""
    return {name: buffer.clone() for name, buffer in module.named_buffers() if not is_lazy(buffer)}


def _require_same_buffers(module: nn.Module, buffers_before: Mapping[str, Tensor]) -> None:
    """Raise UserError where a buffer is no longer as it was before a pass."""
    for name, buffer in module.named_buffers():
        if name in buffers_before and not torch.equal(buffer, buffers_before[name]):
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"net {name_of(type(module))}: a pass in training changes its buffer '{name}' (of {owner}). A step "
                "makes several passes at different times t, so such a statistic mixes them: use a norm within one row, "
                "such as nn.GroupNorm or nn.LayerNorm"
            )


def _require_no_dropout(module: nn.Module, subject: str) -> None:
    """Raise UserError for one of torch's dropout layers, whose masks have no key."""
    for name, part in module.named_modules():
        if isinstance(part, _DROPOUTS) and part.p > 0:
            raise UserError(
                f"{subject}: {type(part).__name__}(p={part.p:g}) at '{name}' draws another mask in every pass, so a "
                "difference of two passes is no derivative, and a resumed run is another one: "
                f"{_KEYED_DROPOUT}, or set p=0"
            )


def max_pass_difference(x: Sample) -> float:
    """By how much two passes on x may differ, as `outputs_match` takes it, in the precision that holds now.

    On a CPU it is 0.
    """
    if x.device.type == "cpu":
        return 0.0
    precision = precision_of(x)
    if precision == "fp32" or precision == "tf32":
        return MAX_DIFFERENCE[precision]
    return MAX_DIFFERENCE["bf16"]  # autocast, or weights of 16 bits


def outputs_match(first: Tensor, second: Tensor, max_difference: float) -> bool:
    """Whether two outputs agree: the norm of their difference is at most `max_difference` times that of the first.

    With max_difference = 0 they must be equal to the bit. Values that are not finite must be equal.
    """
    if max_difference == 0:
        return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
    finite = first.isfinite() & second.isfinite()
    if not torch.allclose(first[~finite], second[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return False
    values = first[finite].cpu().double()  # MPS has no float64
    difference = torch.linalg.vector_norm(second[finite].cpu().double() - values)
    return bool(difference <= max_difference * torch.linalg.vector_norm(values))


def require_finite_heads(outputs: Heads, net: nn.Module, needs: Needs) -> None:
    """Raise UserError where a head among the outputs of a pass of `net` is not finite."""
    # outputs also hold the gauges, after the heads
    for head, output in zip(needs.heads, outputs, strict=False):
        if not output.isfinite().all():
            raise UserError(
                f"{type(_module_of(net)).__name__}: head '{head}' is not finite on the first rows: look at the data "
                "and the weights"
            )


@torch.no_grad()
def require_rows_apart(net: nn.Module, b: Noised, needs: Needs) -> None:
    """Raise UserError where another first row changes what the net returns for the other rows.

    A head that is zero everywhere, as new ones often are, hides that.
    """
    inputs = inputs_of(b, needs)
    outputs = net(b.x_t, b.c, **inputs)

    # another x, other times and another condition in the first row alone
    x = b.x_t.clone()
    x[0] += 1
    c = b.c.clone()
    c[0] = b.c[-1]
    changed_inputs: dict[str, Time] = {}
    for name, values in inputs.items():
        changed_inputs[name] = values.clone()
        changed_inputs[name][0] = values[-1]
    changed_outputs = net(x, c, **changed_inputs)

    # outputs also hold the gauges, after the heads
    for head, output, changed_output in zip(needs.heads, outputs, changed_outputs, strict=False):
        is_finite = output[1:].isfinite()
        before = output[1:][is_finite]
        if not len(before):
            continue
        largest_change = (changed_output[1:][is_finite] - before).abs().max()
        rows_are_apart = largest_change <= _MAX_MIXING * before.abs().max()  # false where the change is not finite
        if not rows_are_apart:
            raise UserError(
                f"{type(_module_of(net)).__name__}: head '{head}' of one row changes with another row, so the rows of "
                "a batch mix (a batch norm, attention over the first axis, a reshape, the time of one row for all). "
                "Each row has a time of its own: keep them apart"
            )


def rows_to_try(objective: Objective) -> int:
    """How many rows the check tries: a few, in whole groups of those that belong together, of which two at least."""
    group = group_size(objective)
    min_groups = 2 if group > 1 else 1
    return max(_TRIED_ROWS // group, min_groups) * group


def group_size(objective: Objective) -> int:
    """How many neighbouring rows belong together: whole groups of the objective's and of its times'."""
    return lcm(objective.times.group, objective.needs.group)


@torch.no_grad()
def try_pass(passes: Passes, b: Noised, needs: Needs) -> Heads:
    """Make a pass on a record. Raises UserError, with the likely fix, where it fails or changes a buffer."""
    module = _module_of(passes)
    buffers_before = _copy_buffers(module)
    try:
        outputs = passes(b.x_t, b.c, **inputs_of(b, needs))
    except UserError:
        raise
    except Exception as error:  # a module of somebody else may raise anything
        raise UserError(
            f"{type(module).__name__} failed on x {tuple(b.x_t.shape)} at times {tuple(b.t.shape)}: "
            f"{short_text(error)}. {_likely_fix(error, passes, b)}"
        ) from error
    _require_same_buffers(module, buffers_before)
    return outputs


def _likely_fix(error: Exception, passes: Passes, b: Noised) -> str:
    """The fix for a pass that failed, by what is most often wrong: memory, devices, dtypes, classes, shapes."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"It has no room on {b.x_t.device}: give a smaller network, or a device of more memory"
    weight = next(iter(unwrap(passes.net).parameters()), b.x_t)
    if weight.device != b.x_t.device:
        return f"x is on {b.x_t.device}, and the network's weights on {weight.device}: give x.to('{weight.device}')"
    if weight.dtype != b.x_t.dtype and not torch.is_autocast_enabled(b.x_t.device.type):
        return f"x is {b.x_t.dtype}, and the network's weights {weight.dtype}: give x.to({weight.dtype})"
    if isinstance(error, IndexError) and passes.labelled:
        return "A label more than there are classes stands for none: an embedding needs classes + 1 rows"
    return f"It is called by {passes.call_description}: look at shapes, or give dumo.Flow({call_example(passes.needs)})"


# ------------------------------------------------------------------------------------------- what can be trained at all


def require_teacher(objective: Objective, *, has_teacher: bool) -> None:
    """Raise UserError where an objective lacks the teacher that it learns from, or learns nothing of the one it has."""
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
    problem = teacher_problem(objective)
    if has_teacher and problem:
        raise UserError(f"{problem}: leave out teacher=")


def require_prior(prior: float, objective: Objective, *, has_teacher: bool) -> None:
    """Raise UserError where no teacher can answer this share `prior` of the rows, and the data the others."""
    if not 0 < prior < 1:
        raise UserError(
            f"prior = {prior:g}: give a share of the rows, above 0 and below 1, or leave it out: a teacher answers all"
        )
    if not has_teacher:
        raise UserError(
            f"prior = {prior:g} is the share of the rows that a teacher answers, and there is no teacher: give "
            "dumo.Flow(teacher=...), or leave out prior="
        )
    problem = prior_problem(objective)
    if problem:
        raise UserError(f"{problem}: leave out prior=, or take another objective, such as 'dumo'")


def require_some_rows(prior: float, batch: int) -> None:
    """Raise UserError where the share `prior` of a batch of `batch` rows is no row, or all of them."""
    if not picks_some_rows(prior, batch):
        raise UserError(
            f"prior = {prior:g} of a batch of {batch} rows is no row, or all of them: give another share, or more rows"
        )


def require_formulas(objective: Objective, path: str) -> None:
    """Raise UserError where an objective has no formulas for this kind of path, or its times do not serve it."""
    wrong_path = path_problem(objective, path)
    if wrong_path:
        raise UserError(f"{wrong_path}: give dumo.Flow(path=...) another of dumo.flow.path")
    wrong_times = climb_problem(objective) or guide_problem(objective)
    if wrong_times:
        raise UserError(wrong_times)


def require_first_stage(objective: Objective, *, has_ref: bool) -> None:
    """Raise UserError where an objective lacks the net of a first stage, which is its theta^-."""
    problem = first_stage_problem(objective)
    if problem and not has_ref:
        raise UserError(f"{problem}: give dumo.Flow(ref=...) a copy of it, which stays as it is")


def require_whole_groups(objective: Objective, rows: int) -> None:
    """Raise UserError where a batch of `rows` rows splits a group of rows that belong together."""
    group = group_size(objective)
    if rows % group:
        raise UserError(
            f"{rows} rows, and {group} belong together in objective '{objective.kind}': give a multiple of {group}; a "
            "DataLoader leaves out a smaller last batch by drop_last=True"
        )


def require_parameters(net: nn.Module) -> None:
    """Raise UserError where a network has parameters and none of them requires a gradient."""
    parameters = list(net.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        raise UserError(
            f"no parameter of {type(unwrap(net)).__name__} is trained: call net.requires_grad_(), or make the flow of "
            "a network that learns"
        )


def require_precise_weights(objective: Objective, net: nn.Module) -> None:
    """Raise UserError where a network computes with weights of 16 bits, too coarse for what the objective amplifies."""
    from torch.distributed.fsdp import FSDPModule  # slow to import

    dtypes: list[torch.dtype | None] = [p.dtype for p in net.parameters()]
    for part in net.modules():
        if isinstance(part, FSDPModule):
            state = part._get_fsdp_state()  # noqa: SLF001, there is no public way to the policy
            dtypes.append(state._mp_policy.param_dtype)  # noqa: SLF001
    for dtype in dtypes:
        if dtype in HALVES:
            weights = f"weights in {str(dtype).removeprefix('torch.')}"
            require_precision(weights, objective.needs.amplifies, objective.kind)


def short_text(error: BaseException) -> str:
    """The first line of an error's text, _MAX_TEXT characters at most, with its type where dumo did not raise it.

    The advice of `dumo.flow.slope` to use another slope is left out, for the others are tried anyway.
    """
    first_line, _, _ = str(error).partition("\n")
    cause, _, _ = first_line.partition(": use slope")
    text = cause[:_MAX_TEXT]
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}"
