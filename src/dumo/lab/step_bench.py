"""`dumo bench step`: a training step with every slope: its operations, time, memory and error.

A slope is a way to take du/dt (`dumo.flow.slope`). `measure` is the entrance. In this order it

1. lists a row for every slope and precision (`_variants`), and first of each precision the plain step (`PlainStep`);
2. builds the net once for all rows (`prepare`, which returns a `StepBench`);
3. for each row judges its slope, counts operations and bytes, and makes its step (`StepBench.attempt`);
4. times all steps in turn, and completes the rows (`with_times`).

A step is the forward pass, the targets and the backward pass, without the optimizer, on random data. Its yardstick is
the plain flow-matching step of the same net in the same precision: three forward passes (3 F), four where the blocks
are computed again in the backward pass (checkpointing). The error of a slope is relative to the true derivative
(`slope_error`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dumo.config.spec import Run
from dumo.config.suggestion import require_known
from dumo.flow import dropout
from dumo.flow.draw import draw, path_velocity
from dumo.flow.path import FlowPath
from dumo.flow.precision import Precision, autocast, product_precision, using
from dumo.flow.slope import CentralSlope, Slope, slope_of
from dumo.io.read import null_nonfinite
from dumo.lab import random_net
from dumo.plan import machine
from dumo.run import cost, examination, memory, trial_net
from dumo.runtime.device import choose_device, known_peak_tflops, software_versions
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.random import random_batch
from dumo.runtime.stopwatch import RoundTimes, Stopwatch, quartiles
from dumo.training.compile import compile_blocks
from dumo.training.spec import Train
from dumo.types import (
    Frozen,
    Needs,
    Net,
    Noised,
    Objective,
    Reads,
    Spec,
    Terms,
    Time,
    TimeLaw,
    UserError,
    frozen,
    mean_square,
)

Step = Callable[[], None]  # makes one training step

_COMPILE_CHOICES = ("none", "blocks", "loss")  # what may be compiled
PLAIN = "none"  # the name of the plain step in the column of slopes
_PLAIN_UNITS = 3  # forward passes of a plain step: one, and a backward pass that costs two
_MIN_JUDGED_ROWS = 8  # rows of a batch on which du/dt is judged, at least: ours
_MAX_COMPILED_VARIANTS = 64  # of one block, which serves every precision, slope and number of rows: ours
# the class of each slope, by its kind
SLOPES: dict[str, Any] = {slope.model_fields["kind"].default: slope for slope in get_args(get_args(Slope)[0])}


@dataclass(frozen=True)
class StepRow:
    """The measures of one slope in one precision. None: not available, or not measured."""

    slope: str
    precision: Precision
    compile: str
    way: str | None = None  # how dual numbers get the tangent: tape, ride or pass
    refused: str | None = None  # why training would not take this slope
    units_counted: float | None = None  # operations, in forward passes F
    units_timed: float | None = None  # time, in forward passes F: the median
    units_low: float | None = None  # and the lower quartile
    units_high: float | None = None  # and the upper quartile
    milliseconds: float | None = None  # the median
    images_per_second: float | None = None
    bytes_before: int | None = None  # in use before the step: weights, batch
    bytes: int | None = None  # the most that the step itself has in use at one time
    bytes_over_central: float | None = None
    error: float | None = None  # of du/dt, relative
    share_of_peak: float | None = None  # counted operations per second over the GPU's bf16 peak


@dataclass(frozen=True)
class StepBench:
    """What makes and measures the steps of all rows: the net, and how it is trained. `prepare` makes it."""

    path: FlowPath
    train: Train
    classes: int
    shape: tuple[int, ...]  # of a sample
    device: torch.device
    compile: str  # one of _COMPILE_CHOICES
    meta_net: nn.Module  # the net on the meta device
    net: nn.Module
    ref: Frozen  # theta^-, as in training

    def attempt(self, row: StepRow, objective: Objective) -> tuple[StepRow, Step | None]:
        """The row with all measures but times, and its step.

        Where the step cannot be made, it is None, and the row's `refused` says why. Raises what a plain step raises:
        without it nothing can be compared.
        """
        try:
            step = self.make_step(row, objective)
            judged_row = self.judge(row, objective)
            return self.count(judged_row, objective, step), step
        except (UserError, torch.OutOfMemoryError) as error:
            if row.slope == PLAIN:
                raise
            return replace(row, refused=str(error).splitlines()[0]), None

    def _draw_batch(self, objective: Objective, rows: int) -> Noised:
        """A batch of random data and labels, with noise added as when the objective is trained."""
        x, c = random_batch("bench", rows, self.shape, self.classes)
        x, c = x.to(self.device), c.to(self.device)
        return draw(objective, self.path, x, c, self.classes, seed=0, step=0, teacher=path_velocity)

    def make_step(self, row: StepRow, objective: Objective) -> Step:
        """The step of a row: forward pass, targets and backward pass on one batch of random data."""
        b = self._draw_batch(objective, self.train.batch)
        loss = objective.loss
        if row.compile == "loss":
            loss = torch.compile(objective.loss, fullgraph=True, dynamic=False)

        def step() -> None:
            self.net.zero_grad()
            with product_precision(row.precision, self.device), self._compile_mode(row), self._dropout_keys(len(b.t)):
                with autocast(row.precision, self.device):
                    mean = loss(self.net, self.ref, b).loss.mean()
                mean.backward()

        return step

    def _compile_mode(self, row: StepRow) -> AbstractContextManager[object]:
        """Within it, compiled blocks run compiled if the row is of a compiled net, else eagerly."""
        if row.compile == self.compile:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def _dropout_keys(self, rows: int) -> AbstractContextManager[None]:
        """Within it, passes of this number of rows use dropout and routing as in training."""
        return dropout.using(dropout.keys(0, 0, rows).to(self.device))

    def judge(self, row: StepRow, objective: Objective) -> StepRow:
        """The row with the error of its slope, if it has one. A compiled loss is judged as it is without compiling."""
        if row.slope == PLAIN:
            return row
        row_multiple = cost.exact_rows(objective)  # the batch has a multiple of these
        b = self._draw_batch(objective, row_multiple * max(_MIN_JUDGED_ROWS // row_multiple, 1))
        with using(row.precision, self.device), self._compile_mode(row), self._dropout_keys(len(b.t)):
            return replace(row, error=slope_error(self.net, self.ref, objective, b))

    def count(self, row: StepRow, objective: Objective, step: Step) -> StepRow:
        """The row with its operations and bytes, and how dual numbers get the tangent.

        Bytes are counted on a CPU; on a GPU the allocator measures them.
        """
        rows = self.train.batch
        ref = self.train.ref
        step_cost = cost.step_cost(self.meta_net, objective, self.path, self.shape, rows=rows, ref=ref)
        if self.device.type == "cuda":
            step()  # kernels keep memory after their first call
            self.net.zero_grad()
            step_memory = memory.allocated_bytes(step, self.device)
        else:
            step_memory = memory.step_bytes(
                self.meta_net, objective, self.path, self.shape, rows=rows, ref=ref, precision=row.precision
            )
        return replace(
            row,
            way=step_cost.way.name if step_cost.way else None,
            units_counted=step_cost.units,
            bytes_before=step_memory.preexisting,
            bytes=step_memory.peak,
        )


def measure(
    run: Run,
    *,
    slopes: Sequence[str] | None = None,
    precisions: Sequence[str] = ("fp32",),
    shape: Sequence[int] | None = None,
    compile: str = "none",
    rounds: int = 9,
    peak_tflops: float | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Measure each slope in each precision at the run's batch, and always the plain step, `none`; return the report.

    `slopes` None: all. A slope that training refuses is measured all the same where it can be, and its row says why.
    Raises UserError for a slope, precision or way to compile that this run or device does not have.
    """
    torch_device = choose_device(device)
    shape = tuple(shape or run.data.shape)
    batch = run.train.batch
    known_precisions = random_net.checked_precisions(precisions, torch_device)
    variants = list(_variants(run.objective, run.net.time_scale, slopes, known_precisions, compile))
    bench = prepare(run, shape, torch_device, compile)
    attempts = [bench.attempt(row, objective) for row, objective in variants]
    steps = [step for _, step in attempts if step]
    seconds = Stopwatch.for_bench(torch_device).time_rounds(steps, rounds, bar=bar, title="training steps")

    flops = cost.forward_flops(bench.meta_net, run.objective, shape)
    peak = peak_tflops or known_peak_tflops(torch_device)
    seconds_at_peak = batch * flops / (1e12 * peak) if peak else None
    rows = with_times(attempts, seconds, batch, seconds_at_peak)
    return {
        "net": run.net.model_dump(),
        "objective": run.model_dump(mode="json")["objective"],
        "shape": shape,
        "batch": batch,
        "parameters": sum(p.numel() for p in bench.net.parameters()),
        "forward_flops_per_image": flops,
        "rounds": rounds,
        "machine": machine.hardware(torch_device).text,
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
        "rows": [null_nonfinite(asdict(row)) for row in rows],
    }


def prepare(run: Run, shape: tuple[int, ...], device: torch.device, compile: str) -> StepBench:
    """Build the net for samples of this shape, and theta^-; with `compile` "blocks", compile the net's blocks.

    Raises UserError where the net does not fit the shape or the memory, or has no blocks to compile.
    """
    require_known("way to compile", compile, _COMPILE_CHOICES)
    needs = run.objective.needs
    classes = run.data.classes
    net_with_texts = trial_net.with_random_texts_if_missing(run.net)
    net = random_net.build(net_with_texts, needs, shape, classes, device, rows=run.train.batch)
    ref = frozen(net) if run.train.ref == "self" else Frozen(copy.deepcopy(net))
    if compile == "blocks":
        torch.compiler.config.recompile_limit = _MAX_COMPILED_VARIANTS
        compile_blocks(net, dynamic=False)  # as training does, tape and all
    meta_net = random_net.build_on_meta(run.net, needs, shape, classes)
    return StepBench(
        path=run.path,
        train=run.train,
        classes=classes,
        shape=shape,
        device=device,
        compile=compile,
        meta_net=meta_net,
        net=net,
        ref=ref,
    )


def _variants(
    objective: Objective,
    time_scale: float,
    slopes: Sequence[str] | None,
    precisions: Sequence[Precision],
    compile: str,
) -> Iterator[tuple[StepRow, Objective]]:
    """For each precision the plain step, then every slope: the row without measures, and the objective.

    Raises UserError for an unknown slope, or any where the objective has none.
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
            raise UserError(f"objective '{objective.kind}' has no slope: only '{PLAIN}', its plain step, can be timed")
    for precision in precisions:
        yield StepRow(PLAIN, precision, compile), PlainStep(of=objective)
        for name in slope_names:
            slope = SLOPES[name]()
            if objective_slope and objective_slope.kind == name:
                slope = objective_slope  # with the run's own settings
            row_compile = "none" if name == "jvp" else compile  # inductor fails on jvp (torch 2.13)
            row = StepRow(name, precision, row_compile, refused=_refusal(slope, precision, time_scale))
            if isinstance(slope, CentralSlope):
                slope = _UncheckedSlope(h=slope.h)
            yield row, objective.model_copy(update={"slope": slope})


def _refusal(slope: Any, precision: Precision, time_scale: float) -> str | None:  # noqa: ANN401, any slope
    """Why training would not take this slope; None where it would."""
    try:
        slope.check(precision, time_scale)
    except UserError as error:
        return str(error)
    return None


def with_times(
    attempts: Sequence[tuple[StepRow, Step | None]], seconds: RoundTimes, batch: int, seconds_at_peak: float | None
) -> Iterator[StepRow]:
    """Yield the rows with their times in forward passes of the plain step, and their bytes over those of `central`.

    `attempts` are the rows with their steps, `seconds` (steps, rounds) the times of all steps that are not None. The
    plain step of each precision has one. `seconds_at_peak`: what a forward pass of the batch would take at the
    GPU's peak.
    """
    central_bytes = {row.precision: row.bytes for row, _ in attempts if row.slope == "central"}
    timed_attempts = [number for number, (_, step) in enumerate(attempts) if step]
    seconds_of_attempt = dict(zip(timed_attempts, seconds.unbind(), strict=True))  # (rounds,), by the attempt's number
    unit_seconds: dict[Precision, Tensor] = {}  # of a forward pass, (rounds,)
    for number, (row, _) in enumerate(attempts):
        if row.slope == PLAIN:
            units = round(row.units_counted or _PLAIN_UNITS)  # 4 with checkpointing
            unit_seconds[row.precision] = seconds_of_attempt[number] / units

    for number, (row, _) in enumerate(attempts):
        central = central_bytes.get(row.precision)
        if row.bytes and central:
            row = replace(row, bytes_over_central=row.bytes / central)
        if number in seconds_of_attempt:
            step_seconds = seconds_of_attempt[number]
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
    """The plain flow-matching loss on every head of another objective's net: three forward units."""

    of: Any  # the other objective

    @property
    def kind(self) -> str:
        """The plain step's name."""
        return PLAIN

    @property
    def needs(self) -> Needs:
        """The net of the other objective."""
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
        """The times that the other objective draws."""
        return self.of.times

    @property
    def drop(self) -> float:
        """The share of labels that the other objective drops."""
        return self.of.drop

    def __iter__(self) -> Iterator[tuple[str, object]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The fields of the other objective, so that batches are drawn as for it."""
        return iter(self.of)

    def loss(self, net: Net, ref: Frozen, b: Noised) -> Terms:
        """The loss of every head against the velocity v_t; knobs are zero."""
        heads = net(b.x_t, b.c, **_net_inputs(self.of, b))[: len(self.of.needs.heads)]
        loss = torch.zeros_like(b.t)
        for head in heads:
            loss = loss + mean_square(head - b.v_t)
        return Terms(loss)

    def read(self, net: Net) -> Reads:
        """How the other objective reads its net."""
        return self.of.read(net)


class _UncheckedSlope(CentralSlope):
    """The central difference without its checks: what training refuses is measured here all the same."""

    def check(self, precision: str, time_scale: float = 1.0) -> None:
        """Accept all."""


def _net_inputs(objective: Objective, b: Noised) -> dict[str, Time]:
    """The inputs (n,) that a net of this objective takes by name: the times of the rows, and knobs at zero."""
    times = {"t": b.t, "r": b.r}
    return {name: times.get(name, torch.zeros_like(b.t)) for name in objective.needs.names}


def slope_error(net: nn.Module, ref: Frozen, objective: Objective, b: Noised) -> float | None:
    """The relative error of du/dt along v_t, on the rows of a batch; None for an objective without a slope."""
    if objective.needs.slope is None:
        return None
    point = examination.ExamplePoint(x_t=b.x_t, direction=b.v_t, c=b.c, inputs=_net_inputs(objective, b))
    errors = examination.slope_errors(objective, net, ref, point)
    head = "u" if "u" in errors else objective.needs.heads[-1]
    return errors[head].item()
