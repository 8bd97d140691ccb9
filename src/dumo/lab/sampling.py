"""`dumo bench sample`: samples per second by number of passes, from noise that the CPU draws to numbers in its memory.

Latents must be decoded too, which at one pass may take longer than the net: that is measured by itself.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dumo.data import Latents
from dumo.flow import generate
from dumo.flow.precision import Precision
from dumo.flow.reading import reading
from dumo.flow.solver import Euler, Solver, check
from dumo.lab import bench
from dumo.run.config.spec import Run
from dumo.run.plan import machine
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar
from dumo.runtime.random import stream
from dumo.types import UserError

JUMPS = 4  # passes up to which a restart makes sense: later ones add error (docs/reproduce.md)


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
    """Time batches of samples by the run's net, its weights random. Raises UserError for passes out of reach."""
    here, shape = dist.device(device), tuple(shape or run.data.shape)
    todo: list[tuple[Precision, int, Solver]] = [
        (precision, nfe, solver(run, nfe)) for precision in bench.precisions_of(precisions, here) for nfe in nfes
    ]
    module, c = bench.build(run, shape, here, batch), generate.labels(batch, run.data.classes)
    reads = reading(run.objective, module, run.sample.knobs)

    make = partial(generate.generate, module, reads, run.path, c=c, seed=0, shape=shape, batch=batch, device=here)
    works = [partial(make, solver=solver, nfe=nfe, precision=precision) for precision, nfe, solver in todo]
    decoder, missing = decoding(run, shape, batch, here)
    seconds = bench.interleave("sampling", [*works, *([decoder] if decoder else [])], rounds, here, bar)
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
    run: Run, shape: tuple[int, ...], batch: int, device: torch.device
) -> tuple[Callable[[], object] | None, str | None]:
    """Decode a batch of noise by the run's codec, in float32; None without a codec, or why its weights are missing."""
    if not isinstance(run.data, Latents):
        return None, None
    try:
        codec = run.data.codec.open(device)
    except UserError as error:
        return None, f"not decoded: {error}"
    x = torch.randn(batch, *shape, generator=stream("bench", "latents"))
    return lambda: codec.decode(x).cpu(), None


def solver(run: Run, nfe: int) -> Solver:
    """The run's own, or Euler steps where that one makes no sense. Raises UserError where neither does."""
    own = run.sample.solver
    chosen = Euler() if nfe % own.passes or (own.uses == "endpoint" and nfe > JUMPS) else own
    check(chosen, run.reads, nfe)
    return chosen


def rate(images_per_second: torch.Tensor) -> dict[str, float]:
    """Median and quartiles."""
    low, mid, high = bench.quartiles(images_per_second)
    return {"images_per_second": mid, "low": low, "high": high}
