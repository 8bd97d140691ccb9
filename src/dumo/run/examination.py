"""Check that the du/dt of a run equals the derivative on this machine, using `dumo.flow.derivative`.

Before the first step, `examine` tests a network of two blocks with random weights. Before the first checkpoint,
`examine_weights` tests the weights in training. Both

1. draw the rows of an `ExamplePoint` (`example_point`);
2. compute the configured slope in its precision and on its device, and compare it with the derivative in float64
   (`slope_errors`);
3. return an `Examination`, whose `require` raises UserError if the error of a head exceeds the limit.

Weights are random because the last layers of a new network are zero, so u = du/dt = 0 and any slope would pass.
"""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dumo.autodiff import float64
from dumo.config.code import has_own_net, has_own_parts
from dumo.config.spec import Run
from dumo.data import Data
from dumo.flow import derivative, dropout
from dumo.flow.path import FlowPath
from dumo.flow.precision import using
from dumo.flow.slope import MAX_SLOPE_ERROR, slope_of
from dumo.run.memory import weight_bytes
from dumo.run.net import meta_net
from dumo.run.random_net import random_net, short_run
from dumo.run.weights import build
from dumo.runtime import dist
from dumo.runtime.device import total_memory
from dumo.runtime.formatting import bytes_text
from dumo.runtime.heap import low_memory_heap
from dumo.runtime.random import stream
from dumo.training import agreement, layout
from dumo.training.state import State
from dumo.types import Cond, Frozen, Objective, Sample, Time, UserError

# Number of rows for random weights, so t = 1/4, 1/2, 3/4 and 1.
_ROWS_RANDOM = 4
# Number of rows for the weights in training; small because memory is limited.
_ROWS_IN_TRAINING = 2


@dataclass(frozen=True)
class ExamplePoint:
    """Inputs at which a slope is compared, and the direction of the derivative."""

    # (b, *d)
    x_t: Sample
    # dx_t/dt, (b, *d)
    direction: Sample
    # (b,)
    c: Cond
    # t and the other scalar inputs of the net, each (b,)
    inputs: dict[str, Time]

    def to(self, device: torch.device) -> "ExamplePoint":
        """Return a copy on this device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return ExamplePoint(self.x_t.to(device), self.direction.to(device), self.c.to(device), inputs)


@dataclass(frozen=True)
class Examination:
    """The relative l2 error of d/dt for each head."""

    # None if the objective takes no derivative
    slope: str | None
    precision: str
    time_scale: float
    # a label for the examined weights
    weights: str
    # by head
    errors: Mapping[str, float]
    limit: float = MAX_SLOPE_ERROR

    @property
    def passed(self) -> bool:
        """Whether the error of every head is within the limit. NaN fails."""
        return all(error <= self.limit for error in self.errors.values())

    def __str__(self) -> str:
        """Return the result in a line."""
        if self.slope is None:
            return "nothing to examine: this objective has no derivative"
        head_errors = ", ".join(f"{head} {100 * error:.2g} %" for head, error in self.errors.items())
        return (
            f"slope '{self.slope}' in precision {self.precision} at time_scale {self.time_scale:g}, with "
            f"{self.weights}: d/dt is off float64 by {head_errors} (limit {100 * self.limit:g} %)"
        )

    @property
    def fix(self) -> str:
        """Settings to try if the examination failed."""
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
        """Raise UserError with a suggested fix if the examination failed."""
        if not self.passed:
            raise UserError(f"{self}. With this error the target would be wrong: {self.fix}")


def examine(run: Run, device: torch.device) -> Examination:
    """Examine the run's slope on a net of two blocks with random weights. Every rank must call it.

    Call `require` on the result. A user-defined net or loss is checked first (`dumo.run.contract`). Raise UserError if
    it violates the contract, or if the slope cannot be computed.
    """
    net = random_net(short_run(run), device)
    if has_own_parts(run):
        from dumo.run.contract import require_contract

        require_contract(run, net, device)
    point = example_point(run.objective, run.path, run.data, run.train.seed, _ROWS_RANDOM)
    return _compare(net, run, point, device, "random weights")


def examine_weights(run: Run, net: nn.Module, device: torch.device) -> Examination:
    """Examine the run's slope on a net in training, which must not be sharded. Every rank must call it.

    Call `require` on the result. The net is not changed. Raise UserError if the slope cannot be computed.
    """
    point = example_point(run.objective, run.path, run.data, run.train.seed, _ROWS_IN_TRAINING)
    return _compare(float64.copy_sharing_weights(net), run, point, device, "the weights in training")


def examine_in_training(run: Run, state: State, device: torch.device, print_line: Callable[[str], object]) -> bool:
    """Examine the run's slope on the weights in training. Every rank must call it.

    Return False if nothing is examined, because the objective has no du/dt, or because copies of the weights do not fit
    into memory, which `print_line` reports. Raise UserError if the slope deviates from the derivative.
    """
    if run.objective.needs.slope is None:
        return False
    net_without_values = meta_net(run)
    copies_bytes = weight_bytes(net_without_values) + float64.copied_bytes(net_without_values)
    if dist.world() > 1:
        # Weights may be sharded, but each rank examines all of them.
        copies_bytes += weight_bytes(net_without_values)
    device_bytes = agreement.on_main_rank(lambda: total_memory(device))
    if copies_bytes > device_bytes:
        print_line(
            f"the slope is not examined on the weights in training: copies of them take {bytes_text(copies_bytes)} of "
            f"memory, and {device} has {bytes_text(device_bytes)}"
        )
        return False
    with low_memory_heap():
        net = layout.gather_net(state.net, partial(build, run))
        examine_weights(run, net, device).require()
        # Collect reference cycles: the hooks of the float64 copy keep the network alive.
        del net
        gc.collect()
    return True


def example_point(objective: Objective, path: FlowPath, data: Data, seed: int, rows: int) -> ExamplePoint:
    """Draw the rows at which a slope is examined from the seed.

    t increases from 1 / rows to 1 in equal steps; other times decrease from t in the first row to 0 in the last. Knobs
    have their default values.
    """
    needs = objective.needs
    generator = stream(seed, "examination")
    x, z = torch.randn(2, rows, *data.shape, generator=generator).unbind()
    # Include the null class.
    c = torch.randint(data.classes + 1, (rows,), generator=generator)
    t = torch.linspace(0, 1, rows + 1)[1:]
    inputs: dict[str, Time] = {}
    for name in needs.names:
        inputs[name] = t if name == "t" else t * torch.linspace(1, 0, rows)
    for name, value in needs.knobs.items():
        inputs[name] = torch.full_like(t, value)
    x_t, direction = path.at(x, z, t)
    return ExamplePoint(x_t, direction, c, inputs)


def _compare(net: nn.Module, run: Run, point: ExamplePoint, device: torch.device, weights_label: str) -> Examination:
    """Compare the slope, computed as in training, with the derivative in float64. Every rank must call it.

    Errors are averaged over ranks, so that all ranks reach the same result. The training mode of `net` is changed.
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

    # dumo's nets differ between training and evaluation mode only by dropout, so compare in evaluation mode.
    net.eval()
    mask_keys = None

    # A user-defined net may differ in other ways, so compare it in training mode with the dropout masks of a step. This
    # is impossible on MPS, where float64 is computed on the CPU and the keys of the masks are on the GPU.
    if has_own_net(run) and device.type != "mps":
        net.train()
        mask_keys = dropout.keys(train.seed, 0, len(point.x_t)).to(device)

    # theta^- is the net itself in its mode, or an average of its weights, which is always in evaluation mode.
    target_module = net
    if train.ref != "self":
        target_module = float64.copy_sharing_weights(net).eval()
    target_net = Frozen(target_module)

    with using(train.precision, device), dropout.using(mask_keys):
        errors = slope_errors(objective, net, target_net, point)
    mean_errors = dist.mean(torch.stack([*errors.values()]).to(point.x_t))
    error_by_head = dict(zip(errors, mean_errors.tolist(), strict=True))
    return Examination(
        slope=slope.kind,
        precision=train.precision,
        time_scale=time_scale,
        weights=weights_label,
        errors=error_by_head,
        limit=MAX_SLOPE_ERROR if has_own_net(run) else derivative.max_slope_error(slope, train.precision),
    )


def slope_errors(objective: Objective, net: nn.Module, ref: Frozen, point: ExamplePoint) -> dict[str, Tensor]:
    """Compute the relative l2 error, by head, of the objective's slope at a point against d/dt of `ref` in float64.

    The slope is computed in the caller's autocast precision.
    """
    slope = slope_of(objective)
    assert slope is not None
    rows = point.x_t, point.direction, point.c
    if float64.is_from_dumo(ref.module):
        # Exact in one pass. Pretrained models embed times in float32, so their finite differences are off by 2 %.
        exact = float64.exact_derivative(ref.module, *rows, **point.inputs)
    else:
        exact, _ = derivative.central_difference(ref.module, *rows, point.inputs)
    errors = derivative.slope_errors(slope, net, ref, *rows, point.inputs, exact)
    # Ignore gauges, which a network may return after its heads.
    heads = objective.needs.heads
    return dict(zip(heads, errors[: len(heads)], strict=True))
