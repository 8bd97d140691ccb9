"""Whether a user's network can be trained: it is pure, its rows are independent, and its outputs are finite.

A step makes several passes of one network on the same rows: to learn, to be differentiated, for theta^-. A resumed run
must make the same passes as an uninterrupted one. Each row has a time of its own. A network that breaks these rules
trains without an error, towards another target; `require_trainable` tries it on a few rows before the first step.
"""

from math import lcm

import torch
from torch import Tensor, nn

from dumo.flow.adapter import NetAdapter, heads_of
from dumo.flow.precision import Precision, precision_of
from dumo.types import Cond, Heads, Needs, NoisyBatch, Objective, Sample, Terms, Time, UserError, unwrap
from dumo.types.outside import name_of

# The largest difference of two passes on a GPU, whose kernels may add in another order, over the norm of the outputs
MAX_DIFFERENCE: dict[Precision, float] = {"fp32": 1e-4, "tf32": 2e-3, "bf16": 2e-2}
# The largest change of a row when another row changes, over the largest value: kernels round differently
_MAX_MIXING = 1e-4
_TRIED_ROWS = 4


@torch.no_grad()
def require_trainable(net: nn.Module, b: NoisyBatch, needs: Needs) -> None:
    """Raise UserError unless a network is pure, has independent rows and finite outputs. Makes three passes on b.

    net: as objectives call it, in the mode of training. A head that is zero everywhere hides how rows mix.
    """
    module = unwrap(net.net) if isinstance(net, NetAdapter) else net
    name = f"net {name_of(type(module))}"
    inputs = inputs_of(b, needs)

    def heads(x: Sample, c: Cond, inputs: dict[str, Time]) -> Heads:
        return heads_of(net(x, c, **inputs), x, needs, name_of(type(module)))

    # One pass: it changes neither its input nor a buffer, and its outputs are finite.
    buffers_before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    x = b.x_t.clone()
    outputs = heads(x, b.c, inputs)
    if not torch.allclose(x, b.x_t, rtol=0.0, atol=0.0, equal_nan=True):
        raise UserError(f"{name} changes its input x in place, which later passes get: write x = x + ...")
    for key, buffer in module.named_buffers():
        if key in buffers_before and not torch.equal(buffer, buffers_before[key]):
            raise UserError(
                f"{name} changes its buffer '{key}' in a pass, and a step makes several passes at different times t: "
                "use a norm within one row, such as nn.GroupNorm or nn.LayerNorm"
            )
    for head, output in zip(needs.heads, outputs, strict=False):  # gauges follow the heads
        if not output.isfinite().all():
            raise UserError(f"{name}: head '{head}' is not finite on the first rows: look at the data and the weights")

    # A second pass on the same rows gives the same outputs.
    repeated_outputs = heads(b.x_t, b.c, inputs)
    max_difference = max_pass_difference(b.x_t)
    for output, repeated in zip(outputs, repeated_outputs, strict=True):
        if not outputs_match(output, repeated, max_difference):
            raise UserError(
                f"{name}: two passes on the same rows differ, so du/dt is undefined and a resumed run would differ: "
                "keep no state; draw by torch's default generator in dumo.Flow, and by dumo.flow.dropout in dumo train"
            )

    if len(b.t) == 1:
        return
    # Another x, other times and another condition in the first row change that row alone.
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
        rows_are_apart = largest_change <= _MAX_MIXING * output[1:].abs().max()
        if not rows_are_apart:
            raise UserError(
                f"{name}: head '{head}' of one row changes with another row, and each row has its own time: keep rows "
                "apart (no batch norm, attention over the first axis, or time of one row for all)"
            )


def inputs_of(b: NoisyBatch, needs: Needs) -> dict[str, Time]:
    """The times and knobs (b,) of a pass on a batch, by the names of an objective's needs.

    Knobs have their default values. An input of another name, which a batch does not hold, gets t.
    """
    values = {"t": b.t, "r": b.r}
    for name, value in needs.knobs.items():
        values[name] = torch.full_like(b.t, value)
    return {name: values.get(name, b.t) for name in needs.names}


def max_pass_difference(x: Sample) -> float:
    """The largest difference of two passes on x, as `outputs_match` takes it, in the precision that holds now.

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


def require_loss_per_row(terms: Terms, rows: int, objective: str) -> Terms:
    """What an objective's loss returned. Raises UserError unless it is one number for each of this many rows.

    The trainer takes the mean, so a mean, or a column, would be trained on at another scale.
    """
    if terms.loss.shape != (rows,):
        raise UserError(
            f"objective '{objective}': its loss has shape {tuple(terms.loss.shape)}: return dumo.types.Terms(loss), "
            f"where loss has one number per row, shape ({rows},), such as dumo.types.mean_square(e)"
        )
    return terms


def rows_to_try(objective: Objective) -> int:
    """How many rows the check tries: a few, in whole groups of those that belong together, of which two at least."""
    group = group_size(objective)
    min_groups = 2 if group > 1 else 1
    return max(_TRIED_ROWS // group, min_groups) * group


def group_size(objective: Objective) -> int:
    """How many neighbouring rows belong together: whole groups of the objective's and of its times'."""
    return lcm(objective.times.group, objective.needs.group)
