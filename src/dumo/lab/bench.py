"""Times of pieces of work on one machine, and the net that they run; `dumo bench sample`: samples per second.

All pieces are run in turn, round by round, so that a slow minute slows them alike, and a ratio is taken within a round.
With one thread on a CPU, CPU time is taken, which leaves out what other programs take.

Samples are timed from noise that the CPU draws to numbers in its memory. Latents must be decoded too, which at one pass
may take longer than the net: that is measured by itself.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dumo.config.error import require_known
from dumo.config.spec import Run
from dumo.data import Data, Latents
from dumo.flow import generate
from dumo.flow.precision import Precision
from dumo.flow.reading import reading
from dumo.flow.solver import Euler, Solver, check
from dumo.nets import Net
from dumo.plan import machine
from dumo.run import examination
from dumo.runtime import dist
from dumo.runtime.device import now
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.random import stream
from dumo.types import Needs, Reads, UserError

Times = Float[Tensor, "works rounds"]  # seconds

JUMPS = 4  # passes up to which a restart makes sense: later ones add error (docs/reproduce.md)
WARM = 2  # rounds before the first that counts: ours; they compile, choose kernels and fill caches


def interleave(title: str, works: Sequence[Callable[[], object]], rounds: int, device: torch.device, bar: Bar) -> Times:
    """Seconds of each piece of work in each round."""
    now, taken = clock(device), torch.zeros(len(works), rounds, dtype=torch.float64)
    with bar(title, WARM + rounds) as tick:
        for i in range(-WARM, rounds):
            for j, work in enumerate(works):
                start = now()
                work()
                if i >= 0:
                    taken[j, i] = now() - start
            tick(WARM + i + 1, "")
    return taken


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, when all work so far is done."""
    alone = device.type != "cuda" and torch.get_num_threads() == 1
    return time.process_time if alone else partial(now, device)


def quartiles(ratios: Float[Tensor, " rounds"]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ratios.dtype)).tolist()
    return low, middle, high


def precisions_of(names: Sequence[str], device: torch.device) -> tuple[Precision, ...]:
    """The precisions by name. Raises UserError for an unknown one, or one that this device does not have."""
    for name in names:
        require_known("precision", name, get_args(Precision))
        if name == "tf32" and device.type != "cuda":
            raise UserError("precision 'tf32' needs a GPU: use fp32 or bf16")
    return cast(tuple[Precision, ...], tuple(names))


def outline(net: Net, needs: Needs, shape: tuple[int, ...], classes: int) -> nn.Module:
    """A net for samples of any shape, without numbers. Raises UserError where it does not fit the shape."""
    if min(shape) < 1:
        raise UserError(f"a sample of shape {shape} has nothing in it: every side is at least 1")
    with torch.device("meta"):
        return net.build(needs, shape, classes)


def build(
    net: Net, needs: Needs, shape: tuple[int, ...], classes: int, device: torch.device, rows: int = 1
) -> nn.Module:
    """The net as it starts, its zeros filled; always the same.

    Raises UserError where it does not fit the shape, or the device lacks the memory for it and this number of rows.
    """
    size = sum(value.nbytes for value in outline(net, needs, shape, classes).state_dict().values())
    size += rows * prod(shape) * torch.float32.itemsize
    dist.require_memory(size, "the net and its input take", "take a smaller one, fewer rows or a smaller shape", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream("bench", "weights").initial_seed())
        return fill(net.build(needs, shape, classes)).to(device)


def fill(net: nn.Module) -> nn.Module:
    """Draw the parameters that are all zero: a net that starts at zero has no derivative to be wrong about."""
    g = stream("bench", "fill")
    for p in net.parameters():
        if not p.any():
            size = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1  # a layer's weights keep the size of its input
            p.data = torch.randn(p.shape, generator=g).to(p) * size
    return net


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
    """Times of batches of samples by the run's net, its weights random. Raises UserError for passes out of reach."""
    here, shape = dist.device(device), tuple(shape or run.data.shape)
    todo: list[tuple[Precision, int, Solver]] = [
        (precision, nfe, solver(run.sample.solver, run.reads, nfe))
        for precision in precisions_of(precisions, here)
        for nfe in nfes
    ]
    module = build(examination.readable(run.net), run.objective.needs, shape, run.data.classes, here, batch)
    c = generate.labels(batch, run.data.classes)
    reads = reading(run.objective, module, run.sample.knobs)

    make = partial(generate.generate, module, reads, run.path, c=c, seed=0, shape=shape, batch=batch, device=here)
    works: list[Callable[[], object]] = [
        partial(make, solver=solver, nfe=nfe, precision=precision) for precision, nfe, solver in todo
    ]
    decoder, missing = decoding(run.data, shape, batch, here)
    seconds = interleave("sampling", works + ([decoder] if decoder else []), rounds, here, bar)
    extra = seconds[-1] if decoder else None
    return {
        "net": run.net.model_dump(),
        "shape": shape,
        "batch": batch,
        "parameters": sum(p.numel() for p in module.parameters()),
        "rounds": rounds,
        "machine": machine.hardware(here).text,
        "threads": torch.get_num_threads(),
        "versions": dist.versions(),
        "rows": [
            {
                "nfe": nfe,
                "solver": solver.kind,
                "precision": precision,
                **rate(batch / taken),
                "decoded_per_second": None if extra is None else rate(batch / (taken + extra))["images_per_second"],
            }
            for (precision, nfe, solver), taken in zip(todo, seconds, strict=False)
        ],
        "decoder": missing,
    }


def decoding(
    data: Data, shape: tuple[int, ...], batch: int, device: torch.device
) -> tuple[Callable[[], object] | None, str | None]:
    """A decoder of a batch of noise, in float32; None without a codec, or why its weights are missing."""
    if not isinstance(data, Latents):
        return None, None
    try:
        codec = data.codec.open(device)
    except UserError as error:
        return None, f"not decoded: {error}"
    x = torch.randn(batch, *shape, generator=stream("bench", "latents"))
    return lambda: codec.decode(x).cpu(), None


def solver(own: Solver, reads: Reads, nfe: int) -> Solver:
    """The run's own, or Euler steps where that one makes no sense. Raises UserError where neither does."""
    chosen = Euler() if nfe % own.passes or (own.uses == "endpoint" and nfe > JUMPS) else own
    check(chosen, reads, nfe)
    return chosen


def rate(images_per_second: torch.Tensor) -> dict[str, float]:
    """Median and quartiles."""
    low, mid, high = quartiles(images_per_second)
    return {"images_per_second": mid, "low": low, "high": high}
