"""`dumo bench sample`: samples per second.

`measure` is the entrance. In this order it

1. lists a case for each precision and number of passes, each with the solver that can make them (`solver`);
2. builds the run's net with random weights (`dumo.lab.random_net`), and opens a decoder if the data are latents;
3. times batches of samples of all cases in turn (`dumo.runtime.stopwatch`), and the decoder;
4. returns the report.

Samples are timed from noise that the CPU draws to samples in its memory. Latents must be decoded too, which at one pass
may take longer than the net, so decoding is timed by itself.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dumo.config.spec import Run
from dumo.data import Data, Latents
from dumo.flow import generate
from dumo.flow.precision import Precision
from dumo.flow.reading import reading
from dumo.flow.solver import Euler, Solver, check
from dumo.lab import random_net
from dumo.plan import machine
from dumo.run import trial_net
from dumo.runtime.device import choose_device, software_versions
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.random import stream
from dumo.runtime.stopwatch import Stopwatch, Task, quartiles
from dumo.types import Reads, UserError

_MAX_RESTART_PASSES = 4  # up to which restarts help: more of them add error (docs/reproduce.md)


class _SampleCase(NamedTuple):
    """One way to sample that is timed."""

    precision: Precision
    nfe: int
    solver: Solver


def measure(
    run: Run,
    *,
    nfes: Sequence[int] = (1, 2, 50),
    precisions: Sequence[str] = ("fp32",),
    shape: Sequence[int] | None = None,
    batch: int = 256,
    rounds: int = 9,
    device: str = "auto",
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Time batches of samples by the run's net with random weights; return the report.

    `nfes` are numbers of passes, `shape` that of a sample (None: the data's). Raises UserError for a precision or a
    number of passes that the device or the solver does not have.
    """
    torch_device = choose_device(device)
    shape = tuple(shape or run.data.shape)
    cases: list[_SampleCase] = []
    for precision in random_net.checked_precisions(precisions, torch_device):
        for nfe in nfes:
            cases.append(_SampleCase(precision, nfe, solver(run.sample.solver, run.reads, nfe)))
    module = random_net.build(
        trial_net.with_random_texts_if_missing(run.net),
        run.objective.needs,
        shape,
        run.data.classes,
        torch_device,
        rows=batch,
    )
    reads = reading(run.objective, module, run.sample.knobs)
    c = generate.labels_in_turn(batch, run.data.classes)

    def make_samples(case: _SampleCase) -> generate.Samples:
        batches = generate.sample_batches(
            module,
            reads,
            run.path,
            case.solver,
            c,
            nfe=case.nfe,
            seed=0,
            shape=shape,
            batch=batch,
            device=torch_device,
            precision=case.precision,
        )
        return generate.join_batches(batches)

    tasks: list[Task] = []
    for case in cases:
        tasks.append(partial(make_samples, case))
    decode, why_not_decoded = _decoder(run.data, shape, batch, torch_device)
    if decode:
        tasks.append(decode)
    seconds = Stopwatch.for_bench(torch_device).time_rounds(tasks, rounds, bar=bar, title="sampling")
    decode_seconds = seconds[-1] if decode else None
    rows: list[dict[str, Any]] = []
    for case, net_seconds in zip(cases, seconds, strict=False):
        decoded_per_second = None
        if decode_seconds is not None:
            decoded_per_second = _rate(batch / (net_seconds + decode_seconds))["images_per_second"]
        rows.append(
            {
                "nfe": case.nfe,
                "solver": case.solver.kind,
                "precision": case.precision,
                **_rate(batch / net_seconds),
                "decoded_per_second": decoded_per_second,
            }
        )
    return {
        "net": run.net.model_dump(),
        "shape": shape,
        "batch": batch,
        "parameters": sum(p.numel() for p in module.parameters()),
        "rounds": rounds,
        "machine": machine.hardware(torch_device).text,
        "threads": torch.get_num_threads(),
        "versions": software_versions(),
        "rows": rows,
        "decoder": why_not_decoded,
    }


def _decoder(data: Data, shape: tuple[int, ...], batch: int, device: torch.device) -> tuple[Task | None, str | None]:
    """A function that decodes a batch of noise, and why there is none because the codec cannot be opened.

    One of the two is None; both are where the data are no latents.
    """
    if not isinstance(data, Latents):
        return None, None
    try:
        codec = data.codec.open(device)
    except UserError as error:
        return None, f"not decoded: {error}"
    x = torch.randn(batch, *shape, generator=stream("bench", "latents"))
    return lambda: codec.decode(x).cpu(), None


def solver(run_solver: Solver, reads: Reads, nfe: int) -> Solver:
    """The run's solver if it can make `nfe` passes, else Euler's; Euler's also for many passes of a restarting solver.

    Raises UserError where Euler's cannot make them either.
    """
    chosen = run_solver
    is_divisible = nfe % run_solver.passes == 0
    restarts_too_often = run_solver.uses == "endpoint" and nfe > _MAX_RESTART_PASSES
    if not is_divisible or restarts_too_often:
        chosen = Euler()
    check(chosen, reads, nfe)
    return chosen


def _rate(images_per_second: Tensor) -> dict[str, float]:
    """The median and the quartiles of the rates of several rounds."""
    low, median, high = quartiles(images_per_second)
    return {"images_per_second": median, "low": low, "high": high}
