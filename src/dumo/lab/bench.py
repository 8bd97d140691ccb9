"""`dumo bench`: measure time, operations, memory and error of a training step with every slope.

A slope is a method to compute du/dt (`dumo.flow.slope`). A step is the forward pass, the targets and the backward pass
on random data, without the optimizer. The unit is F, a forward pass: a third of a plain flow-matching step of the same
network in the same precision, or a quarter with activation checkpointing. The error of a slope is relative to the
derivative in float64 (`slope_error`).

`measure` is the entry point. Figure 4b (`dumo.lab.fig4b`) also uses `prepare` and `StepBench.make_step`.
"""

import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.config.suggestion import require_known
from dumo.flow import dropout
from dumo.flow.noisy_batch import draw, path_velocity
from dumo.flow.precision import Precision, autocast, product_precision, using
from dumo.flow.slope import CentralSlope, Slope, slope_of
from dumo.io.read import null_nonfinite
from dumo.run import examination, flops, memory
from dumo.run.net import meta_net, require_room
from dumo.run.random_net import random_net
from dumo.runtime.device import choose_device, known_peak_tflops, software_versions
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.random import random_batch
from dumo.runtime.stopwatch import RoundTimes, Stopwatch, quartiles
from dumo.training.compile import compile_blocks
from dumo.types import (
    Frozen,
    Needs,
    Net,
    NoisyBatch,
    Objective,
    Readings,
    Spec,
    Terms,
    Time,
    TimeLaw,
    UserError,
    frozen,
    mean_square,
)

# Runs one training step.
Step = Callable[[], None]

# Compile nothing, each block of the network, or the whole loss.
_COMPILE_CHOICES = ("none", "blocks", "loss")
# The plain flow-matching step in the column `slope`.
PLAIN = "none"
# The cost of a plain step in forward passes: one, and a backward pass that costs two.
_PLAIN_UNITS = 3
# The error of du/dt is measured on at least this many rows.
_MIN_EXAMINED_ROWS = 8
# Slope classes by their kind.
SLOPES: dict[str, Any] = {slope.model_fields["kind"].default: slope for slope in get_args(get_args(Slope)[0])}


@dataclass(frozen=True)
class StepRow:
    """Measurements of one slope in one precision. Unavailable ones are None."""

    slope: str
    precision: Precision
    compile: str
    # How dual numbers compute the tangent: deferred, fused or separate.
    strategy: str | None = None
    # The error message with which training would refuse this slope.
    refused: str | None = None
    # Operations in F, then the median and quartiles of the time in F.
    units_counted: float | None = None
    units_timed: float | None = None
    units_low: float | None = None
    units_high: float | None = None
    # Medians over rounds.
    milliseconds: float | None = None
    images_per_second: float | None = None
    # Bytes in use before the step (weights and batch), and the peak of the step itself.
    bytes_before: int | None = None
    bytes: int | None = None
    bytes_over_central: float | None = None
    # The relative error of du/dt.
    error: float | None = None
    # Counted operations per second over the GPU's bf16 peak.
    share_of_peak: float | None = None


@dataclass(frozen=True)
class StepBench:
    """A network and its training settings, to run steps with any slope. Made by `prepare`."""

    run: Run
    device: torch.device
    # One of _COMPILE_CHOICES.
    compile: str
    meta_net: nn.Module
    net: nn.Module
    # theta^- of the training.
    ref: Frozen
    # The share of the training that is done. Some losses depend on it.
    progress: float

    def attempt(self, row: StepRow, objective: Objective) -> tuple[StepRow, Step | None]:
        """Return the row with its error, operations and bytes, and its step.

        If the step fails, it is None and the row's `refused` has the error message. Errors of the plain step propagate,
        since all rows are relative to it.
        """
        try:
            step = self.make_step(objective, row.precision, row.compile)
            examined_row = self.examine(row, objective)
            return self.count(examined_row, objective, step), step
        except (UserError, torch.OutOfMemoryError) as error:
            if row.slope == PLAIN:
                raise
            return replace(row, refused=str(error).splitlines()[0]), None

    def _draw_batch(self, objective: Objective, rows: int) -> NoisyBatch:
        """Draw a noisy batch of random data and labels as in training."""
        data = self.run.data
        x, c = random_batch("bench", rows, data.shape, data.classes)
        x, c = x.to(self.device), c.to(self.device)
        return draw(
            objective,
            self.run.path,
            x,
            c,
            data.classes,
            seed=0,
            step=0,
            progress=self.progress,
            teacher=path_velocity,
        )

    def make_step(self, objective: Objective, precision: Precision, compile: str) -> Step:
        """Return a training step without the optimizer: forward pass, targets and backward pass on one random batch."""
        b = self._draw_batch(objective, self.run.train.batch)
        loss = objective.loss
        if compile == "loss":
            loss = torch.compile(objective.loss, fullgraph=True, dynamic=False)

        def step() -> None:
            self.net.zero_grad()
            with product_precision(precision, self.device), self._compile_mode(compile), self._dropout_keys(len(b.t)):
                with autocast(precision, self.device):
                    mean = loss(self.net, self.ref, b).loss.mean()
                mean.backward()

        return step

    def _compile_mode(self, compile: str) -> AbstractContextManager[object]:
        """Return a context that runs compiled blocks eagerly, unless `compile` is the network's own mode."""
        if compile == self.compile:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _dropout_keys(self, rows: int) -> AbstractContextManager[None]:
        """Return a context with the random keys of dropout and routing for this number of rows."""
        return dropout.using(dropout.keys(0, 0, rows).to(self.device))

    def examine(self, row: StepRow, objective: Objective) -> StepRow:
        """Return the row with the error of its slope. A compiled loss is examined without compilation."""
        if row.slope == PLAIN:
            return row
        row_multiple = flops.exact_rows(objective)
        b = self._draw_batch(objective, row_multiple * max(_MIN_EXAMINED_ROWS // row_multiple, 1))
        with using(row.precision, self.device), self._compile_mode(row.compile), self._dropout_keys(len(b.t)):
            return replace(row, error=slope_error(self.net, self.ref, objective, b))

    def count(self, row: StepRow, objective: Objective, step: Step) -> StepRow:
        """Return the row with its operations, bytes, and the method by which dual numbers compute the tangent.

        Bytes are measured by the allocator on a GPU, and counted otherwise.
        """
        run = self.run
        shape, rows, ref = run.data.shape, run.train.batch, run.train.ref
        step_cost = flops.step_cost(self.meta_net, objective, run.path, shape, rows=rows, ref=ref)
        if self.device.type == "cuda":
            # Run once first, since kernels keep memory after their first call.
            step()
            self.net.zero_grad()
            step_memory = memory.allocated_bytes(step, self.device)
        else:
            step_memory = memory.step_bytes(
                self.meta_net, objective, run.path, shape, rows=rows, ref=ref, precision=row.precision
            )
        return replace(
            row,
            strategy=step_cost.strategy.name if step_cost.strategy else None,
            units_counted=step_cost.units,
            bytes_before=step_memory.preexisting,
            bytes=step_memory.peak,
        )


def measure(
    run: Run,
    *,
    slopes: Sequence[str] | None = None,
    precisions: Sequence[str] = ("fp32",),
    compile: str = "none",
    rounds: int = 9,
    device: str = "auto",
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Measure each slope and the plain step `none` in each precision at the run's batch size; return the report.

    If `slopes` is None, all are measured. A slope that training refuses is measured if possible, and its row has the
    error message. Raises UserError if this run or device does not support a slope, precision or compile mode.
    """
    # Prepare a row and a step for each slope and precision.
    torch_device = choose_device(device)
    known_precisions = _checked_precisions(precisions, torch_device)
    variants = list(_variants(run.objective, run.net.time_scale, slopes, known_precisions, compile))
    bench = prepare(run, torch_device, compile)
    attempts = [bench.attempt(row, objective) for row, objective in variants]

    # Time all steps in turn, so that a temporary slowdown affects them alike.
    steps = [step for _, step in attempts if step]
    seconds = Stopwatch.for_bench(torch_device).time_rounds(steps, rounds, bar=bar, title="training steps")

    # Write the report.
    batch = run.train.batch
    flops_per_row = flops.forward_flops(bench.meta_net, run.objective, run.data.shape)
    peak = known_peak_tflops(torch_device)
    rows = with_times(attempts, seconds, batch, batch * flops_per_row / (1e12 * peak) if peak else None)
    return {
        "net": run.net.model_dump(),
        "objective": run.model_dump(mode="json")["objective"],
        "shape": run.data.shape,
        "batch": batch,
        "parameters": sum(p.numel() for p in bench.net.parameters()),
        "forward_flops_per_image": flops_per_row,
        "rounds": rounds,
        "machine": device_name(torch_device),
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
        "rows": [null_nonfinite(asdict(row)) for row in rows],
    }


def prepare(run: Run, device: torch.device, compile: str = "none", progress: float = 0.0) -> StepBench:
    """Build the network of a run with random weights, and theta^-; if `compile` is "blocks", compile its blocks.

    Raises UserError if the network does not fit in memory, or has no blocks to compile.
    """
    require_known("compile mode", compile, _COMPILE_CHOICES)
    require_room(run, device)
    net = random_net(run, device)
    ref = frozen(net) if run.train.ref == "self" else Frozen(copy.deepcopy(net))
    if compile == "blocks":
        compile_blocks(net, dynamic=False)
    return StepBench(run, device, compile, meta_net(run), net, ref, progress)


def _checked_precisions(names: Sequence[str], device: torch.device) -> tuple[Precision, ...]:
    """Return the precisions with these names. Raises UserError if one is unknown or unsupported by the device."""
    for name in names:
        require_known("precision", name, get_args(Precision))
        if name == "tf32" and device.type != "cuda":
            raise UserError("precision 'tf32' needs a GPU: use fp32 or bf16")
    return cast(tuple[Precision, ...], tuple(names))


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _variants(
    objective: Objective,
    time_scale: float,
    slopes: Sequence[str] | None,
    precisions: Sequence[Precision],
    compile: str,
) -> Iterator[tuple[StepRow, Objective]]:
    """Yield an empty row and an objective for the plain step and then every slope, in each precision.

    Raises UserError if a slope is unknown, or if slopes are given but the objective has none.
    """
    objective_slope = slope_of(objective)
    if slopes is not None:
        slope_names = [name for name in slopes if name != PLAIN]
    elif objective_slope is not None:
        slope_names = list(SLOPES)
    else:
        slope_names = []
    for name in slope_names:
        require_known("slope", name, [*SLOPES, PLAIN])
        if objective_slope is None:
            raise UserError(f"objective '{objective.kind}' has no slope: only its plain step '{PLAIN}' can be timed")
    for precision in precisions:
        yield StepRow(PLAIN, precision, compile), PlainStep(of=objective)
        for name in slope_names:
            slope = SLOPES[name]()
            if objective_slope and objective_slope.kind == name:
                # Keep the run's settings of its slope.
                slope = objective_slope
            # Inductor fails on jvp (torch 2.13).
            row_compile = "none" if name == "jvp" else compile
            row = StepRow(name, precision, row_compile, refused=_refusal(slope, precision, time_scale))
            if isinstance(slope, CentralSlope):
                slope = _UncheckedSlope(h=slope.h)
            yield row, objective.model_copy(update={"slope": slope})


def _refusal(slope: Any, precision: Precision, time_scale: float) -> str | None:  # noqa: ANN401, any slope
    """Return the error message with which training would refuse this slope; None if it is accepted."""
    try:
        slope.check(precision, time_scale)
    except UserError as error:
        return str(error)
    return None


def with_times(
    attempts: Sequence[tuple[StepRow, Step | None]], seconds: RoundTimes, batch: int, seconds_at_peak: float | None
) -> Iterator[StepRow]:
    """Yield the rows with their times in units of F, and their bytes relative to slope `central`.

    attempts: rows and steps. The plain step of each precision is not None.
    seconds: (steps, rounds), times of all steps that are not None.
    seconds_at_peak: time of a forward pass of the batch at the GPU's peak.
    """
    numbers_of_steps = [number for number, (_, step) in enumerate(attempts) if step]
    seconds_of_row = dict(zip(numbers_of_steps, seconds.unbind(), strict=True))
    unit_seconds: dict[Precision, torch.Tensor] = {}
    central_bytes: dict[Precision, int | None] = {}
    for number, (row, _) in enumerate(attempts):
        if row.slope == PLAIN:
            units = round(row.units_counted or _PLAIN_UNITS)
            unit_seconds[row.precision] = seconds_of_row[number] / units
        if row.slope == "central":
            central_bytes[row.precision] = row.bytes

    for number, (row, _) in enumerate(attempts):
        central = central_bytes.get(row.precision)
        if row.bytes and central:
            row = replace(row, bytes_over_central=row.bytes / central)
        if number in seconds_of_row:
            step_seconds = seconds_of_row[number]
            low, median, high = quartiles(step_seconds / unit_seconds[row.precision])
            median_seconds = step_seconds.median().item()
            share_of_peak = None
            if seconds_at_peak and row.units_counted:
                share_of_peak = row.units_counted * seconds_at_peak / median_seconds
            row = replace(
                row,
                units_timed=median,
                units_low=low,
                units_high=high,
                milliseconds=1e3 * median_seconds,
                images_per_second=batch / median_seconds,
                share_of_peak=share_of_peak,
            )
        yield row


class PlainStep(Spec):
    """The plain flow-matching loss on every head of another objective's network. A step costs 3 F."""

    # The other objective.
    of: Any

    @property
    def kind(self) -> str:
        """The name of the plain step."""
        return PLAIN

    @property
    def needs(self) -> Needs:
        """The network inputs and heads of the other objective."""
        needs: Needs = self.of.needs
        return Needs(
            inputs=needs.inputs,
            heads=needs.heads,
            gauges=needs.gauges,
            knobs=needs.knobs,
            own=needs.own,
            formulas=needs.formulas,
        )

    @property
    def times(self) -> TimeLaw:
        """The time distribution of the other objective."""
        return self.of.times

    @property
    def drop(self) -> float:
        """The label dropout of the other objective."""
        return self.of.drop

    def __iter__(self) -> Iterator[tuple[str, object]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Iterate over the fields of the other objective, so that batches are drawn as for it."""
        return iter(self.of)

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        """Compute the mean squares of all heads against the velocity v_t, with knobs at zero."""
        heads = net(b.x_t, b.c, **_net_inputs(self.of, b))[: len(self.of.needs.heads)]
        loss = torch.zeros_like(b.t)
        for head in heads:
            loss = loss + mean_square(head - b.v_t)
        return Terms(loss)

    def readings(self, net: Net) -> Readings:
        """Return the readings of the other objective."""
        return self.of.read(net)


class _UncheckedSlope(CentralSlope):
    """The central difference without its checks, to measure settings that training refuses."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Accept everything."""


def _net_inputs(objective: Objective, b: NoisyBatch) -> dict[str, Time]:
    """Return the network's named inputs, each (n,): the times of the batch, and knobs at zero."""
    times = {"t": b.t, "r": b.r}
    return {name: times.get(name, torch.zeros_like(b.t)) for name in objective.needs.names}


def slope_error(net: nn.Module, ref: Frozen, objective: Objective, b: NoisyBatch) -> float | None:
    """Compute the relative error of du/dt along v_t on a batch; None if the objective has no slope."""
    if objective.needs.slope is None:
        return None
    point = examination.ExamplePoint(x_t=b.x_t, direction=b.v_t, c=b.c, inputs=_net_inputs(objective, b))
    errors = examination.slope_errors(objective, net, ref, point)
    head = "u" if "u" in errors else objective.needs.heads[-1]
    return errors[head].item()
