"""Whether the du/dt of a run is the derivative on this machine, by the comparison of `dumo.flow.derivative`.

`examine` compares on a new network cut to two blocks, with random weights, before the first step; `examine_weights` on
the weights in training, before the first checkpoint. Both

1. draw the rows of an `ExamplePoint` (`example_point`);
2. take the configured slope there, in its precision and on its device, and compare it with the derivative in float64
   (`slope_errors`);
3. return an `Examination`, whose `require` raises if the error of a head is above the limit.

Weights are random because the last layers of a new network are zero, so u = du/dt = 0, and any slope would pass.
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

_ROWS_RANDOM = 4  # rows on random weights, so t = 1/4, 1/2, 3/4 and 1: ours
_ROWS_IN_TRAINING = 2  # rows on the weights in training, where the memory of a pass counts: ours


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
    """Examine the run's slope on a fresh net cut to two blocks, with random weights. Every rank must call it.

    Call `require` on the result. A user's own net or loss is tried first (`dumo.run.contract`). Raises UserError where
    it breaks the contract, and where the slope cannot be taken.
    """
    net = random_net(short_run(run), device)
    if has_own_parts(run):
        from dumo.run.contract import require_contract

        require_contract(run, net, device)
    point = example_point(run.objective, run.path, run.data, run.train.seed, _ROWS_RANDOM)
    return _compare(net, run, point, device, "random weights")


def examine_weights(run: Run, net: nn.Module, device: torch.device) -> Examination:
    """Examine the run's slope on a net in training, which must not be sharded. Every rank must call it.

    Call `require` on the result. The net is not changed. Raises UserError where the slope cannot be taken.
    """
    point = example_point(run.objective, run.path, run.data, run.train.seed, _ROWS_IN_TRAINING)
    return _compare(float64.copy_sharing_weights(net), run, point, device, "the weights in training")


def examine_in_training(run: Run, state: State, device: torch.device, print_line: Callable[[str], object]) -> bool:
    """Examine the run's slope on the weights in training. Every rank must call it.

    Returns False if nothing is examined: the objective takes no du/dt, or the device has no room for copies of the
    weights, which `print_line` is told. Raises UserError if the slope is not the derivative.
    """
    if run.objective.needs.slope is None:
        return False
    net_without_values = meta_net(run)
    copies_bytes = weight_bytes(net_without_values) + float64.copied_bytes(net_without_values)
    if dist.world() > 1:
        # Ranks may share the weights, but each examines all of them.
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
        # The hooks of the copy in float64 are in reference cycles, which hold the network.
        del net
        gc.collect()
    return True


def example_point(objective: Objective, path: FlowPath, data: Data, seed: int, rows: int) -> ExamplePoint:
    """Draw the rows on which a slope is examined, by the seed.

    t goes from 1 / rows to 1 in equal steps, and other times from t, in the first row, to 0, in the last. Knobs have
    their default values.
    """
    needs = objective.needs
    generator = stream(seed, "examination")
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

    Errors are averaged over ranks, so that all ranks reach the same verdict. The mode of `net`, training or evaluation,
    is changed.
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

    # dumo's nets compute the same function in both modes but for dropout, so they are compared without it
    net.eval()
    mask_keys = None

    # A user's own net may do more in training: it is compared in that mode, with the dropout masks of a step. On MPS it
    # cannot be, because float64 is computed on the CPU, and the keys of the masks lie on the GPU.
    if has_own_net(run) and device.type != "mps":
        net.train()
        mask_keys = dropout.keys(train.seed, 0, len(point.x_t)).to(device)

    # theta^-: the net itself in its mode, or an average of its weights, which is in evaluation mode in training, too
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
    """The relative l2 error of the objective's slope at a point, by head, against d/dt of `ref` in float64.

    The slope is taken in the precision that is set around the call.
    """
    slope = slope_of(objective)
    assert slope is not None
    rows = point.x_t, point.direction, point.c
    if float64.is_from_dumo(ref.module):
        # Exact, and one pass. Pretrained models embed times in float32, so differences of theirs are 2 % off.
        exact = float64.exact_derivative(ref.module, *rows, **point.inputs)
    else:
        exact, _ = derivative.central_difference(ref.module, *rows, point.inputs)
    errors = derivative.slope_errors(slope, net, ref, *rows, point.inputs, exact)
    # A network may return gauges after its heads, which do not count.
    heads = objective.needs.heads
    return dict(zip(heads, errors[: len(heads)], strict=True))
