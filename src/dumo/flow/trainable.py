"""Check that a user's network has no side effects, independent rows and finite outputs.

A step makes several passes of one network on the same rows: for the loss, for derivatives, for theta^-. A resumed run
must repeat the passes of an uninterrupted one, and each row has its own time. A network that violates these rules would
train without an error, but on another target; `require_trainable` checks it on a few rows before the first step.
"""

from math import lcm

import torch
from torch import Tensor, nn

from dumo.flow.adapter import NetAdapter, heads_of
from dumo.flow.precision import Precision, precision_of
from dumo.types import Cond, Heads, Needs, NoisyBatch, Objective, Sample, Terms, Time, UserError, unwrap
from dumo.types.outside import name_of

# The largest difference of two passes on a GPU relative to the norm of the outputs. Kernels may sum in another order.
MAX_DIFFERENCE: dict[Precision, float] = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2}
# The largest change of a row, relative to the largest value, if another row changes. Kernels may round differently.
_MAX_MIXING = 1e-4
_TRIED_ROWS = 4


@torch.no_grad()
def require_trainable(net: nn.Module, b: NoisyBatch, needs: Needs) -> None:
    """Raise UserError unless a network has no side effects, independent rows and finite outputs, by passes on b.

    net: with the signature that objectives call, in training mode. Heads that are zero hide a dependence of rows.
    """
    module = unwrap(net.net) if isinstance(net, NetAdapter) else net
    name = f"net {name_of(type(module))}"
    inputs = inputs_of(b, needs)

    def heads(x: Sample, c: Cond, inputs: dict[str, Time]) -> Heads:
        return heads_of(net(x, c, **inputs), x, needs, name_of(type(module)))

    # Check that a pass changes neither its input nor a buffer, and that its outputs are finite.
    buffers_before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    for key, buffer in buffers_before.items():
        if buffer.isnan().any():
            raise UserError(f"{name}: its buffer '{key}' contains NaN: check the code that writes it")
    x = b.x_t.clone()
    outputs = heads(x, b.c, inputs)
    if not torch.allclose(x, b.x_t, rtol=0.0, atol=0.0, equal_nan=True):
        raise UserError(f"{name} modifies its input x in place, which later passes use: write x = x + ...")
    for key, buffer in module.named_buffers():
        if key in buffers_before and not torch.equal(buffer, buffers_before[key]):
            raise UserError(
                f"{name} changes its buffer '{key}' in a pass, but a step makes several passes at different times t: "
                "use a norm within one row, such as nn.GroupNorm or nn.LayerNorm"
            )
    # `strict=False`, because gauges follow the heads.
    for head, output in zip(needs.heads, outputs, strict=False):
        if not output.isfinite().all():
            raise UserError(f"{name}: head '{head}' is not finite on the first rows: check the data and the weights")

    # Check that a second pass on the same rows returns the same outputs.
    repeated_outputs = heads(b.x_t, b.c, inputs)
    max_difference = max_pass_difference(b.x_t)
    for output, repeated in zip(outputs, repeated_outputs, strict=True):
        if not outputs_match(output, repeated, max_difference):
            raise UserError(
                f"{name}: two passes on the same rows differ, so du/dt is undefined and a resumed run would differ: "
                "remove state; draw random numbers with torch's default generator in dumo.Flow, and with "
                "dumo.flow.dropout in dumo train"
            )

    if len(b.t) == 1:
        return
    # Check that another x, other times and another condition in the first row change this row only.
    x = b.x_t.clone()
    x[0] += 1
    c = b.c.clone()
    c[0] = b.c[-1]
    changed_inputs: dict[str, Time] = {}
    for key, values in inputs.items():
        changed_inputs[key] = values.clone()
        changed_inputs[key][0] = values[-1]
    changed_outputs = heads(x, c, changed_inputs)
    for head, output, changed_output in zip(needs.heads, outputs, changed_outputs, strict=False):
        largest_change = (changed_output[1:] - output[1:]).abs().max()
        # False if the change is not finite.
        rows_are_independent = largest_change <= _MAX_MIXING * output[1:].abs().max()
        if not rows_are_independent:
            raise UserError(
                f"{name}: head '{head}' of one row depends on another row, but each row has its own time: remove batch "
                "norm, attention over the first axis, and the use of one row's time for all"
            )


def inputs_of(b: NoisyBatch, needs: Needs) -> dict[str, Time]:
    """Return the times and knobs (b,) of a pass on a batch, by the names of an objective's needs.

    Knobs have their default values. Further inputs, which a batch does not contain, get t.
    """
    values = {"t": b.t, "r": b.r}
    for name, value in needs.knobs.items():
        values[name] = torch.full_like(b.t, value)
    return {name: values.get(name, b.t) for name in needs.names}


def max_pass_difference(x: Sample) -> float:
    """Return the tolerance of `outputs_match` for two passes on x in the current precision; 0 on a CPU."""
    if x.device.type == "cpu":
        return 0.0
    precision = precision_of(x)
    if precision == "fp32" or precision == "tf32":
        return MAX_DIFFERENCE[precision]
    return MAX_DIFFERENCE["bf16"]


def outputs_match(first: Tensor, second: Tensor, max_difference: float) -> bool:
    """Whether the norm of the difference of two outputs is at most `max_difference` times the norm of the first.

    With max_difference = 0 they must be bit-identical. Non-finite values must be equal.
    """
    if max_difference == 0:
        return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)
    finite = first.isfinite() & second.isfinite()
    if not torch.allclose(first[~finite], second[~finite], rtol=0.0, atol=0.0, equal_nan=True):
        return False
    values = first[finite].cpu().double()  # MPS has no float64
    difference = torch.linalg.vector_norm(second[finite].cpu().double() - values)
    return bool(difference <= max_difference * torch.linalg.vector_norm(values))


def require_loss_per_row(terms: Terms, rows: int, objective: str) -> Terms:
    """Return the terms of an objective's loss. Raises UserError unless the loss is one number per row.

    The trainer takes the mean, so another shape would change the scale of the loss.
    """
    if terms.loss.shape != (rows,):
        raise UserError(
            f"objective '{objective}': its loss has shape {tuple(terms.loss.shape)}: return dumo.types.Terms(loss), "
            f"where loss has one number per row, shape ({rows},), such as dumo.types.mean_square(e)"
        )
    return terms


def rows_to_try(objective: Objective) -> int:
    """Return the number of rows for the check: a few, in at least two whole groups of related rows."""
    group = group_size(objective)
    min_groups = 2 if group > 1 else 1
    return max(_TRIED_ROWS // group, min_groups) * group


def group_size(objective: Objective) -> int:
    """Return the size of a group of related consecutive rows: whole groups of the objective and of its times."""
    return lcm(objective.times.group, objective.needs.group)
