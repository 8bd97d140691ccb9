"""Whether a run's du/dt is the derivative on this machine, examined before any training rests on it.

`examine` compares on a copy of two blocks with random parameters, before the first step; `examine_weights` on the
weights in training, before the first checkpoint. Both, in this order,

1. draw the rows of an `ExamplePoint` (`example_point`);
2. take the configured slope there, in its precision and on its device, and the derivative in float64
   (`dumo.autodiff.float64`), and measure the relative error of each head (`slope_errors`);
3. return an `Examination`, whose `require` raises where an error is above the limit.

Why it is needed: few-step objectives regress on du/dt. Where that is wrong, training does not crash: the loss falls
towards another target, and the samples are poor for no reason that a log shows. And it is wrong easily. A difference
quotient divides the rounding of two passes by 2 h: under bf16 that is as large as the derivative. On a net that reads
1000 t, as image models do, h = 0.005 spans more than a turn of the embedding. And a tangent rule or a kernel may be
wrong, perhaps on one device alone.

Why random parameters: the last layers of a fresh net are zero, so u = du/dt = 0, and anything passes.

Others make a run's net cheap to try by `randomly_initialized_net`, `cut_to_two_blocks` and
`with_random_texts_if_missing`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dumo.autodiff.float64 import copy_sharing_weights, exact_derivative
from dumo.config.code import has_own_net, has_own_parts
from dumo.config.spec import Run
from dumo.data import Data
from dumo.flow import dropout
from dumo.flow.path import FlowPath
from dumo.flow.precision import using
from dumo.flow.slope import MAX_SLOPE_ERROR, slope_of
from dumo.nets import Net, is_pretrained
from dumo.run.weights import build
from dumo.runtime import dist
from dumo.runtime.random import stream
from dumo.types import Cond, Frozen, Objective, Sample, Time, UserError

MAX_ERROR_AT_ZERO = 1e-6  # the l2 error allowed where du/dt is zero: ours
ROWS_RANDOM = 4  # rows on random parameters, so t = 1/4, 1/2, 3/4 and 1: ours
ROWS_IN_TRAINING = 2  # rows on the weights in training, where the memory of a pass counts: ours
VECTOR_NOISE = 0.1  # the sd of what is added to biases and gains, so that gains stay near 1: ours
SUBJECT_SCALE = 0.1  # of the random weights of a subject's adapter, which adds a third part to a layer: ours
STREAM_KEY = "doctor"  # of all draws: a command's name. Another key would draw other numbers


@dataclass(frozen=True)
class ExamplePoint:
    """Rows on which a slope is compared, and the direction in which they move."""

    x_t: Sample  # (b, *d)
    direction: Sample  # (b, *d), dx_t/dt
    c: Cond  # (b,)
    inputs: dict[str, Time]  # (b,) each: t, and what else the net takes

    def to(self, device: torch.device) -> "ExamplePoint":
        """A copy on this device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return ExamplePoint(self.x_t.to(device), self.direction.to(device), self.c.to(device), inputs)


@dataclass(frozen=True)
class Examination:
    """How far a slope is from the derivative: the relative l2 error of d/dt, by head."""

    slope: str | None  # None: the objective takes no derivative
    precision: str
    time_scale: float
    weights: str  # a label: which weights were examined
    errors: Mapping[str, float]  # by head
    limit: float = MAX_SLOPE_ERROR

    @property
    def passed(self) -> bool:
        """Whether the error of every head is within the limit; NaN is not."""
        return all(error <= self.limit for error in self.errors.values())

    def __str__(self) -> str:
        """What was measured, in a line."""
        if self.slope is None:
            return "nothing to examine: this objective takes no derivative"
        head_errors = ", ".join(f"{head} {100 * error:.2g} %" for head, error in self.errors.items())
        return (
            f"slope '{self.slope}' in precision {self.precision} at time_scale {self.time_scale:g}, with "
            f"{self.weights}: d/dt is off float64 by {head_errors} (limit {100 * self.limit:g} %)"
        )

    @property
    def fix(self) -> str:
        """What to try where the examination failed."""
        other_slope = "jvp" if self.slope == "dual" else "dual"
        fixes = [f"objective.slope.kind={other_slope}"]
        if self.precision != "fp32":
            fixes.append("train.precision=fp32")
        if self.slope == "central":
            fixes += ["another objective.slope.h", "a smaller net.time_scale"]
        if not all(math.isfinite(error) for error in self.errors.values()):
            fixes.append("a lower train.optimizer.lr")
        return "train with " + ", or ".join(fixes)

    def require(self) -> None:
        """Raise UserError, with what to try, where the examination failed."""
        if not self.passed:
            raise UserError(f"{self}. Training on that is training on noise: {self.fix}")


def examine(run: Run, device: torch.device) -> Examination:
    """Examine the run's slope on its net, cut to two blocks, with random parameters.

    A user's own net or loss is tried first (`dumo.run.contract`). Raises UserError where it breaks the contract, and
    where the slope cannot be taken.
    """
    net = randomly_initialized_net(run, device)
    if has_own_parts(run):
        from dumo.run.contract import require_contract

        require_contract(run, net, device)
    point = example_point(run.objective, run.path, run.data, run.train.seed, ROWS_RANDOM)
    return _compare(net, run, point, device, "drawn weights")


def examine_weights(run: Run, net: nn.Module, device: torch.device) -> Examination:
    """Examine the run's slope on a net in training, which must not be sharded. The net is not changed.

    Raises UserError where the slope cannot be taken.
    """
    point = example_point(run.objective, run.path, run.data, run.train.seed, ROWS_IN_TRAINING)
    return _compare(copy_sharing_weights(net), run, point, device, "the weights in training")


def randomly_initialized_net(run: Run, device: torch.device) -> nn.Module:
    """Build the run's net, cut to two blocks, and draw every parameter by the run's seed, layers of zeros, too.

    Texts of which no table exists yet are random.
    """
    net = build(run.model_copy(update={"net": cut_to_two_blocks(with_random_texts_if_missing(run.net))}), device)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=stream(run.train.seed, STREAM_KEY, name)).to(p)
            if _is_of_subject(run.net, name):
                noise = SUBJECT_SCALE * noise
            if p.ndim > 1:
                fan_in = p[0].numel()
                p.copy_(noise / fan_in**0.5)
            else:
                p.copy_(p + VECTOR_NOISE * noise)
    return net


def _is_of_subject(net: Net, name: str) -> bool:
    """Whether the weight of this name belongs to an adapter of a subject."""
    if not net.lora:
        return False

    from dumo.nets.adapter import SUBJECT

    return f".{SUBJECT}." in name


def with_random_texts_if_missing(net: Net) -> Net:
    """The spec of a net. If it reads a table of texts that does not exist yet, random texts take its place."""
    if net.texts is None:
        return net

    from dumo.nets.text import or_drawn

    texts = or_drawn(net.texts)
    if texts is net.texts:
        return net
    return net.model_copy(update={"texts": texts})


def cut_to_two_blocks(net: Net) -> Net:
    """The spec of a net with at most two blocks of each kind. Of a pretrained net no weights are read."""
    if is_pretrained(net):
        return net.short(2)
    # a net without blocks, or a user's own, has none of these fields
    depth: int | None = getattr(net, "depth", None)
    route: object = getattr(net, "route", None)
    late: int | None = getattr(net, "late", None)
    if depth is None:
        return net
    short_depth = min(2, depth)
    update: dict[str, int | None] = {"depth": short_depth}
    if route:
        update["route"] = None  # it names blocks that are cut
    if late is not None:
        update["late"] = min(late, short_depth - 1)
    return net.model_copy(update=update)


def example_point(objective: Objective, path: FlowPath, data: Data, seed: int, rows: int) -> ExamplePoint:
    """Draw the rows on which a slope is examined, by the seed.

    t goes from 1 / rows to 1 in equal steps, and other times from t, in the first row, to 0, in the last. Knobs have
    their default values.
    """
    needs = objective.needs
    generator = stream(seed, STREAM_KEY)
    x, z = torch.randn(2, rows, *data.shape, generator=generator).unbind()
    c = torch.randint(data.classes + 1, (rows,), generator=generator)  # the null class, too
    t = torch.linspace(0, 1, rows + 1)[1:]
    inputs: dict[str, Time] = {}
    for name in needs.names:
        inputs[name] = t if name == "t" else t * torch.linspace(1, 0, rows)
    for name, value in needs.knobs.items():
        inputs[name] = torch.full_like(t, value)
    x_t, direction = path.at(x, z, t)
    return ExamplePoint(x_t, direction, c, inputs)


def _compare(net: nn.Module, run: Run, point: ExamplePoint, device: torch.device, weights_label: str) -> Examination:
    """Compare the slope, used as training uses it, with the derivative in float64. Every rank must call it.

    Errors are averaged over ranks, so that all ranks reach the same verdict.

    The mode of `net` is changed. dumo's nets are compared in evaluation mode, because in training they are the same
    function but for dropout. A user's own is in training mode, with the dropout masks of a step.
    """
    objective = run.objective
    train = run.train
    time_scale = run.net.time_scale
    slope = slope_of(objective)
    if slope is None:
        return Examination(
            slope=None, precision=train.precision, time_scale=time_scale, weights=weights_label, errors={}
        )
    point = point.to(device)
    keys = None
    net.eval()
    # on MPS float64 is computed on the CPU, and the keys of the masks lie on the GPU
    if has_own_net(run) and device.type != "mps":
        net.train()
        keys = dropout.keys(train.seed, 0, len(point.x_t)).to(device)
    ref = Frozen(net if train.ref == "self" else copy_sharing_weights(net).eval())
    with using(train.precision, device), dropout.using(keys):
        errors = slope_errors(objective, net, ref, point.x_t, point.direction, point.c, **point.inputs)
    mean_errors = dist.mean(torch.stack([*errors.values()]).to(point.x_t))
    error_by_head = dict(zip(errors, mean_errors.tolist(), strict=True))
    return Examination(
        slope=slope.kind,
        precision=train.precision,
        time_scale=time_scale,
        weights=weights_label,
        errors=error_by_head,
    )


def slope_errors(
    objective: Objective,
    net: nn.Module,
    ref: Frozen,
    x_t: Sample,
    direction: Sample,
    c: Cond,
    /,
    **inputs: Time,
) -> dict[str, Tensor]:
    """The relative l2 error of the objective's slope, by head, against d/dt of `ref` in float64.

    x_t (b, *d) moves along `direction` (b, *d). The slope is taken in the precision that is set around the call. It has
    two uses, with the direction known before the pass of the net or only after it: the larger error counts.
    """
    slope = slope_of(objective)
    assert slope is not None
    exact_derivatives = exact_derivative(ref.module, x_t, direction, c, **inputs)

    def errors_of_use(direction_before_pass: Sample | None) -> Tensor:
        _, derivatives_along = slope(net, ref, x_t, c, toward=direction_before_pass, moving=None, **inputs)
        with torch.no_grad():
            derivatives = derivatives_along(direction)
        errors: list[Tensor] = []
        for derivative, truth in zip(derivatives, exact_derivatives, strict=True):
            errors.append(_relative_error(derivative, truth))
        return torch.stack(errors)

    errors_if_known_before = errors_of_use(direction)
    errors_if_known_after = errors_of_use(None)
    largest_errors = torch.maximum(errors_if_known_before, errors_if_known_after)
    heads = objective.needs.heads
    return dict(
        zip(heads, largest_errors[: len(heads)], strict=True)
    )  # after the heads come gauges, which do not count


def _relative_error(derivative: Tensor, exact: Tensor) -> Tensor:
    """The l2 error over the l2 norm. Where the norm is 0, an l2 error of MAX_ERROR_AT_ZERO is just within the limit."""
    norm = exact.norm()
    return (derivative.to(exact) - exact).norm() / norm.where(norm > 0, MAX_ERROR_AT_ZERO / MAX_SLOPE_ERROR)
