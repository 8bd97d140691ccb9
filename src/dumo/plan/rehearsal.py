"""The step that training makes, by the same loop, on random numbers; and one sample.

What would stop a run stops it here: a slope that is not the derivative on this device, memory, a compiler. Passes and
gradients take so long per row, the update so long per step, however many rows there are: from the two comes the time
of the whole run at its own batch.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.data import Data
from dumo.flow.guide import CFG
from dumo.plan import machine
from dumo.run import cost, examination
from dumo.run.net import flow_in_training, outline, require_room
from dumo.run.sampler import Sampler
from dumo.run.weights import build, sampler
from dumo.runtime import dist
from dumo.runtime.device import peak_bytes
from dumo.runtime.random import random_batch
from dumo.runtime.stopwatch import WARM_UP, Clock, Stopwatch, wall_clock
from dumo.training import loop
from dumo.training.state import State, begin
from dumo.training.step import Record
from dumo.types import Cond, Sample, UserError

HOUR = 3600.0
SLOW = 1e8  # parameters of a net whose first step on a CPU is the one that is timed, it takes so long: ours


@dataclass(frozen=True)
class Rehearsal:
    """What was measured, and what follows for the run at its own batch, on this device alone."""

    machine: str
    threads: int
    rows: int
    whole: int  # fewest rows of which every share that the objective treats apart is whole: of others the time is off
    examination: str  # how exact the slope is here
    loss: float
    grad_norm: float
    pass_seconds: float  # of these rows: passes, targets, gradients
    update_seconds: float  # optimizer and averages
    peak_bytes: int  # of a GPU's allocator, else resident in this process since it began
    sample_nfe: int
    sample_seconds: float  # of one sample, not decoded
    step_seconds: float
    images_per_second: float
    hours: float


@dataclass(frozen=True)
class TimedStep:
    """Steps that were made, and what one takes."""

    state: State  # after the last
    record: Record  # of the last
    rows: int
    pass_seconds: float  # of these rows: the median of the steps that count
    update_seconds: float  # of a step, however many rows it has: their median

    def of_batch(self, batch: int) -> float:
        """Seconds of a step of another number of rows, as many at a time as these."""
        return batch / self.rows * self.pass_seconds + self.update_seconds


def rehearse(spec: Run, rows: int, device: str = "auto", *, clock: Clock = wall_clock) -> Rehearsal:
    """Examine the slope, then make a step of `rows` rows, and a sample.

    Raises UserError where training would refuse to begin or memory is too small, Diverged where the step is not finite.
    """
    torch_device = dist.device(device)
    spec = spec.model_copy(update={"net": examination.readable(spec.net)})
    if torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(torch_device)
    exam = examination.examine(spec, torch_device)
    exam.require()
    is_slow = torch_device.type == "cpu" and sum(p.numel() for p in outline(spec).parameters()) > SLOW
    require_room(spec, torch_device, spec.train.copies, rows)
    warm_up = 0 if is_slow else WARM_UP
    try:
        batch = random_rows(spec.data, rows, torch_device)
        net = build(spec, torch_device)
        step = make_step(spec, net, batch, warm_up=warm_up, clock=clock)
    except torch.OutOfMemoryError as error:
        place = machine.hardware(torch_device).text
        fix = "take fewer rows (in training: a smaller train.micro_batch), or net.checkpoint=true"
        raise UserError(f"{rows} rows at a time do not fit on {place}: {fix}") from error
    sample_nfe, sample_seconds = _make_sample(sampler(spec, step.state.shown), clock)
    step_seconds = step.of_batch(spec.train.batch)
    return Rehearsal(
        machine=machine.hardware(torch_device).text,
        threads=torch.get_num_threads(),
        rows=rows,
        whole=cost.exact_rows(spec.objective),
        examination=str(exam),
        loss=step.record.loss,
        grad_norm=step.record.grad_norm,
        pass_seconds=step.pass_seconds,
        update_seconds=step.update_seconds,
        peak_bytes=peak_bytes(torch_device),
        sample_nfe=sample_nfe,
        sample_seconds=sample_seconds,
        step_seconds=step_seconds,
        images_per_second=spec.train.batch / step_seconds,
        hours=spec.train.steps * step_seconds / HOUR,
    )


def random_rows(data: Data, rows: int, device: torch.device) -> tuple[Sample, Cond]:
    """Rows of random numbers, like the data."""
    x, c = random_batch("dry", rows, data.shape, data.classes)
    return x.to(device), c.to(device)


def make_step(
    run: Run,
    net: nn.Module,
    batch: tuple[Sample, Cond],
    *,
    warm_up: int = 0,
    rounds: int = 1,
    clock: Clock = wall_clock,
) -> TimedStep:
    """Make steps of this batch by the training loop: some to warm up, then `rounds` that are timed."""
    x, _ = batch
    rows = len(x)
    watch = Stopwatch(x.device, clock)
    steps = warm_up + rounds
    train = run.train.model_copy(update={"batch": rows, "micro_batch": None, "steps": steps, "max_skips": 1})
    run = run.model_copy(update={"train": train})
    state = begin(net, train)
    records: list[Record] = []
    # three times a step: as it begins, before the update, at the end
    began: list[float] = []
    passed: list[float] = []
    ended: list[float] = []

    def batches(step: int) -> tuple[Sample, Cond]:
        began.append(watch.now())
        return batch

    def before_update(*_: object) -> None:
        passed.append(watch.now())

    def after_step(state: State, record: Record) -> None:
        ended.append(watch.now())
        records.append(record)

    state.optimizer.register_step_pre_hook(before_update)
    loop.train(state, flow_in_training(run, state), batches, train, [loop.Every(1, after_step)])
    times = torch.tensor([began, passed, ended], dtype=torch.float64)[:, warm_up:]
    pass_seconds, update_seconds = times.diff(dim=0).median(1).values.tolist()
    return TimedStep(state, records[-1], rows, pass_seconds, update_seconds)


def _make_sample(sampler: Sampler, clock: Clock = wall_clock) -> tuple[int, float]:
    """One sample, not decoded and not guided, in the fewest passes of the solver: how many, and seconds."""
    spec = sampler.spec
    watch = Stopwatch(sampler.device, clock)
    began = watch.now()
    (sample,) = sampler.flow.batches(
        sampler.guided(CFG()),
        spec.solver,
        torch.zeros(1, dtype=torch.long),
        nfe=spec.solver.passes,
        seed=spec.seed,
        shape=sampler.data.shape,
    )
    return sample.nfe, watch.now() - began
