"""`dumo bench sample`: samples per second; and the net that benches run.

`sample` is the entrance. It builds the run's net with random weights, times batches of samples by each precision and
number of passes (`dumo.runtime.stopwatch`), and a decoder if the data are latents, and returns the report.

Samples are timed from noise that the CPU draws to samples in its memory. Latents must be decoded too, which at one pass
may take longer than the net, so decoding is timed by itself.

`dumo.lab.step` also uses `precisions_of`, `outline` and `build`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from dumo.config.spec import Run
from dumo.config.suggestion import require_known
from dumo.data import Data, Latents
from dumo.flow import generate
from dumo.flow.precision import Precision
from dumo.flow.reading import reading
from dumo.flow.solver import Euler, Solver, check
from dumo.nets import Net
from dumo.plan import machine
from dumo.run import examination, memory
from dumo.runtime.device import choose_device, require_memory, software_versions
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.random import stream
from dumo.runtime.stopwatch import Stopwatch, Task, quartiles
from dumo.types import Needs, Reads, UserError

MAX_JUMP_PASSES = 4  # passes up to which a restart makes sense: more of them add error (docs/reproduce.md)


def precisions_of(names: Sequence[str], device: torch.device) -> tuple[Precision, ...]:
    """The precisions of these names. Raises UserError for an unknown one, or one that this device does not have."""
    for name in names:
        require_known("precision", name, get_args(Precision))
        if name == "tf32" and device.type != "cuda":
            raise UserError("precision 'tf32' needs a GPU: use fp32 or bf16")
    return cast(tuple[Precision, ...], tuple(names))


def outline(net: Net, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The net for samples of this shape, on the meta device. Raises UserError where it does not fit the shape."""
    if min(shape) < 1:
        raise UserError(f"a sample of shape {shape} has nothing in it: every side is at least 1")
    with torch.device("meta"):
        return net.build(needs, shape, classes)


def build(
    net: Net, needs: Needs, shape: tuple[int, ...], classes: int, device: torch.device, rows: int = 1
) -> nn.Module:
    """The net with weights as training starts, and parameters that are all zero drawn (`fill`); the same every time.

    Raises UserError where it does not fit the shape, or the device lacks memory for the net and `rows` samples.
    """
    size = memory.least_bytes(outline(net, needs, shape, classes)) + memory.row_bytes(rows, shape)
    require_memory(size, "the net and its input take", "take a smaller one, fewer rows or a smaller shape", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("bench", "weights").initial_seed())
        return fill(net.build(needs, shape, classes)).to(device)


def fill(net: nn.Module) -> nn.Module:
    """Draw the parameters that are all zero, in place: a net that starts at zero has no derivative to measure."""
    g = stream("bench", "fill")
    for p in net.parameters():
        if not p.any():
            size = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1  # a layer's weights keep the size of its input
            p.data = torch.randn(p.shape, generator=g).to(p) * size
    return net


class _SampleCase(NamedTuple):
    """One way to sample that is timed."""

    precision: Precision
    nfe: int
    solver: Solver


def sample(
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
    for precision in precisions_of(precisions, torch_device):
        for nfe in nfes:
            cases.append(_SampleCase(precision, nfe, solver(run.sample.solver, run.reads, nfe)))
    module = build(
        examination.with_random_texts_if_missing(run.net),
        run.objective.needs,
        shape,
        run.data.classes,
        torch_device,
        batch,
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
    decode, missing = _decoder(run.data, shape, batch, torch_device)
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
        "decoder": missing,
    }


def _decoder(data: Data, shape: tuple[int, ...], batch: int, device: torch.device) -> tuple[Task | None, str | None]:
    """A function that decodes a batch of noise, and None; or None, and why the codec cannot be opened.

    Both are None where the data are no latents.
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
    """The run's solver, or Euler's where that cannot make `nfe` passes, or makes no sense at this number of jumps.

    Raises UserError where Euler's cannot make them either.
    """
    chosen = run_solver
    if nfe % run_solver.passes or (run_solver.uses == "endpoint" and nfe > MAX_JUMP_PASSES):
        chosen = Euler()
    check(chosen, reads, nfe)
    return chosen


def _rate(images_per_second: Tensor) -> dict[str, float]:
    """The median and the quartiles of the rates of several rounds."""
    low, median, high = quartiles(images_per_second)
    return {"images_per_second": median, "low": low, "high": high}
