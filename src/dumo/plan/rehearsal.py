"""The step that training makes, by the same loop, on random numbers; and one sample.

`rehearse` is the entrance. It examines the slope, checks the memory, makes steps (`make_step`) on random numbers
(`random_rows`), and makes a sample. The tools time steps by `make_step` on `random_rows`.

What would stop a run stops it here: a slope that is not the derivative on this device, memory, a compiler. The time of
passes and gradients grows with the rows, that of the update does not: from the two comes the time of the whole run at
its own batch (`TimedStep.of_batch`).
"""

from dataclasses import dataclass

import torch
from torch import nn

from dumo.config.spec import Run
from dumo.data import Data
from dumo.flow.guide import CFG
from dumo.plan import machine
from dumo.run import cost, examination, trial_net
from dumo.run.net import flow_in_training, outline, require_room_to_train
from dumo.run.sampler import Sampler, sampler_of
from dumo.run.weights import draw_on_device
from dumo.runtime.device import choose_device, peak_bytes
from dumo.runtime.random import random_batch
from dumo.runtime.stopwatch import WARM_UP, Clock, Stopwatch, wall_clock
from dumo.runtime.text import SECONDS_PER_HOUR
from dumo.training import loop
from dumo.training.deadline import SECONDS_PER_MINUTE
from dumo.training.spec import Train
from dumo.training.state import State, begin
from dumo.training.step import Record
from dumo.types import Cond, Sample, UserError

MAX_PARAMETERS_TO_WARM_UP = 1e8  # of a net on a CPU: steps of a larger one take long, so it makes one alone. Ours


@dataclass(frozen=True)
class Rehearsal:
    """What was measured, and what follows for the run at its own batch, on this device alone."""

    machine: str
    threads: int
    rows: int  # of the step that was made
    whole: int  # rows of which the shares that the objective treats apart are whole; else the time is off a little
    examination: str  # how exact the slope is here
    # the step that was made
    loss: float
    grad_norm: float
    pass_seconds: float  # passes, targets, gradients
    update_seconds: float  # optimizer and averages
    peak_bytes: int  # of a GPU's allocator, else resident in this process since it began
    # a sample
    sample_nfe: int  # its passes
    sample_seconds: float  # without decoding
    # the run at its own batch
    step_seconds: float
    images_per_second: float
    hours: float  # of the whole training


@dataclass(frozen=True)
class TimedStep:
    """The seconds of a step, as measured on several."""

    state: State  # after the last step
    record: Record  # of the last step
    rows: int  # of a step
    pass_seconds: float  # of the passes of these rows: the median of the steps that count
    update_seconds: float  # of the update, which does not depend on the rows: the median, too

    def of_batch(self, batch: int) -> float:
        """The seconds of a step of `batch` rows, in passes of as many rows as were timed."""
        return batch / self.rows * self.pass_seconds + self.update_seconds


def rehearse(spec: Run, rows: int, device: str = "auto", *, clock: Clock = wall_clock) -> Rehearsal:
    """Examine the slope, make a step of `rows` rows and a sample, and measure them.

    Raises UserError where training would refuse to begin or memory is too small, Diverged where the step is not finite.
    """
    torch_device = choose_device(device)
    spec = spec.model_copy(update={"net": trial_net.with_random_texts_if_missing(spec.net)})
    if torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(torch_device)
    net_outline = outline(spec)
    require_room_to_train(spec, torch_device, net_outline, rows=rows)
    exam = examination.examine(spec, torch_device)
    exam.require()
    num_parameters = sum(p.numel() for p in net_outline.parameters())
    is_slow = torch_device.type == "cpu" and num_parameters > MAX_PARAMETERS_TO_WARM_UP
    warm_up = 0 if is_slow else WARM_UP
    try:
        batch = random_rows(spec.data, rows, torch_device)
        net = draw_on_device(spec, torch_device)
        step = make_step(spec, net, batch, warm_up=warm_up, clock=clock)
    except torch.OutOfMemoryError as error:
        place = machine.hardware(torch_device).text
        fix = "take fewer rows (in training: a smaller train.micro_batch), or net.checkpoint=true"
        raise UserError(f"{rows} rows at a time do not fit on {place}: {fix}") from error
    sample_nfe, sample_seconds = _make_sample(sampler_of(spec, step.state.sampled_net), clock)

    # what follows for the run
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
        hours=_training_seconds(spec.train, step_seconds) / SECONDS_PER_HOUR,
    )


def _training_seconds(train: Train, step_seconds: float) -> float:
    """Seconds of a whole training: those that it has, if it ends by the clock, else those of its steps."""
    if train.minutes is not None:
        return SECONDS_PER_MINUTE * train.minutes
    return train.steps * step_seconds


def random_rows(data: Data, rows: int, device: torch.device) -> tuple[Sample, Cond]:
    """Random numbers x (rows, *shape) and conditions c (rows,) in place of the data."""
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
    """Make steps of one batch (x, c) by the training loop: `warm_up`, and then `rounds` that are timed."""
    x, _ = batch
    rows = len(x)
    watch = Stopwatch(x.device, clock)
    steps = warm_up + rounds
    train = run.train.model_copy(update={"batch": rows, "micro_batch": None, "steps": steps, "max_skips": 1})
    run = run.model_copy(update={"train": train})
    state = begin(net, train)
    records: list[Record] = []
    # the times of each step: its start, the start of its update, its end
    starts: list[float] = []
    update_starts: list[float] = []
    ends: list[float] = []

    def batches(step: int) -> tuple[Sample, Cond]:
        starts.append(watch.now())
        return batch

    def before_update(*_: object) -> None:
        update_starts.append(watch.now())

    def after_step(state: State, record: Record) -> None:
        ends.append(watch.now())
        records.append(record)

    state.optimizer.register_step_pre_hook(before_update)
    loop.train(state, flow_in_training(run, state), batches, train, [loop.Every(1, after_step)])
    times = torch.tensor([starts, update_starts, ends], dtype=torch.float64)[:, warm_up:]
    pass_seconds, update_seconds = times.diff(dim=0).median(1).values.tolist()
    return TimedStep(state, records[-1], rows, pass_seconds, update_seconds)


def _make_sample(sampler: Sampler, clock: Clock) -> tuple[int, float]:
    """Make one sample, without guidance and decoding, in the fewest passes of the solver.

    Returns the number of passes, and the seconds.
    """
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
