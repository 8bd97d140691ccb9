"""The step that training makes, by the same loop, on random numbers; and one sample.

What would stop a run stops it here: a slope that is not the derivative on this device, memory, a compiler. Passes and
gradients take so long per row, the update so long per step, however many rows there are: from the two comes the time
of the whole run at its own batch.
"""

import resource
import sys
from dataclasses import dataclass

import torch

from dumo.flow import generate
from dumo.flow.reading import reading
from dumo.run.config.spec import Run
from dumo.run.plan import cost, doctor, machine
from dumo.runtime import dist
from dumo.runtime.random import random_batch
from dumo.training import loop
from dumo.training.state import State, begin
from dumo.training.step import Record, Task
from dumo.types import Cond, Sample, UserError

HOUR = 3600.0
WARM = 2  # steps before the one that is timed: ours; they choose kernels, compile, allocate
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


def rehearse(spec: Run, rows: int, device: str = "auto") -> Rehearsal:
    """Examine the slope, then make a step of so many rows, and a sample.

    Raises UserError where training would refuse to begin or memory is too small, Diverged where the step is not finite.
    """
    here, spec = dist.device(device), doctor.readable(spec)
    if here.type == "cuda":
        torch.cuda.reset_peak_memory_stats(here)
    exam = doctor.examine(spec, here)
    exam.require()
    slow = here.type == "cpu" and sum(p.numel() for p in spec.outline().parameters()) > SLOW
    try:
        state, record, passes, update = make_step(spec, rows, here, warm=0 if slow else WARM)
    except torch.OutOfMemoryError as error:
        way = "take fewer rows (in training: a smaller train.micro_batch), or net.checkpoint=true"
        raise UserError(f"{rows} rows at a time do not fit on {machine.hardware(here).text}: {way}") from error
    nfe, taken = make_sample(spec, state, here)
    step = spec.train.batch / rows * passes + update
    return Rehearsal(
        machine=machine.hardware(here).text,
        threads=torch.get_num_threads(),
        rows=rows,
        whole=cost.exact_rows(spec.objective),
        examination=str(exam),
        loss=record.loss,
        grad_norm=record.grad_norm,
        pass_seconds=passes,
        update_seconds=update,
        peak_bytes=peak(here),
        sample_nfe=nfe,
        sample_seconds=taken,
        step_seconds=step,
        images_per_second=spec.train.batch / step,
        hours=spec.train.steps * step / HOUR,
    )


def make_step(spec: Run, rows: int, here: torch.device, *, warm: int = 0) -> tuple[State, Record, float, float]:
    """One step by the training loop, after some to warm up: the state, its record, seconds of its passes and update."""
    spec.require_room(here, spec.train.copies, rows)
    train = spec.train.model_copy(update={"batch": rows, "micro_batch": None, "steps": warm + 1, "max_skips": 1})
    x, c = (part.to(here) for part in random_batch("dry", rows, spec.data.shape, spec.data.classes))
    state, records, times = begin(spec.build(here), train), list[Record](), [0.0]
    task = Task(spec.objective, spec.path, spec.data.classes)

    def batches(step: int) -> tuple[Sample, Cond]:
        times.append(machine.now(here))
        return x, c

    def done(state: State, record: Record) -> None:
        times.append(machine.now(here))
        records.append(record)

    state.optimizer.register_step_pre_hook(lambda *_: times.append(machine.now(here)))
    loop.train(state, task, batches, train, [loop.Every(1, done)])
    began, passed, ended = times[-3:]
    return state, records[-1], passed - began, ended - passed


def make_sample(spec: Run, state: State, here: torch.device) -> tuple[int, float]:
    """One sample of the weights that are shown, in as few passes as the run's solver can: how many, and seconds."""
    net, solver, began = state.shown, spec.sample.solver, machine.now(here)
    made = generate.generate(
        *(net, reading(spec.objective, net, spec.sample.knobs), spec.path, solver, torch.zeros(1, dtype=torch.long)),
        nfe=solver.passes,
        seed=spec.sample.seed,
        shape=spec.data.shape,
        device=here,
        precision=spec.precision,
    )
    return made.nfe, machine.now(here) - began


def peak(here: torch.device) -> int:
    """The most bytes so far."""
    if here.type == "cuda":
        return torch.cuda.max_memory_allocated(here)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident  # kilobytes on Linux
