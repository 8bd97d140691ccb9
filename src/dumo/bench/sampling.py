"""Samples per second by number of passes: from noise, which the CPU draws, to numbers in its memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dumo import dist, machine
from dumo.bench import clock, net
from dumo.bench.clock import Precision, autocast, products
from dumo.config.spec import Run
from dumo.run import Watch, unwatched
from dumo.sample import generate
from dumo.sample.solver import Euler, Solver, check

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
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Time batches of samples by the run's net, its weights random. Raises UserError for passes out of reach."""
    here, shape = dist.device(device), tuple(shape or run.data.shape)
    todo: list[tuple[Precision, int, Solver]] = [
        (precision, nfe, solver(run, nfe)) for precision in clock.known(precisions, here) for nfe in nfes
    ]
    module, c = net.build(run, shape, here), generate.labels(batch, run.data.classes)
    reads = run.objective.read(module)

    def work(precision: Precision, nfe: int, solver: Solver) -> Callable[[], object]:
        def make() -> None:
            with products(precision), autocast(here, precision):
                generate.generate(
                    module, reads, run.path, solver, c, nfe=nfe, seed=0, shape=shape, batch=batch, device=here
                )

        return make

    seconds = clock.interleave("sampling", [work(*one) for one in todo], rounds, here, watch)
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
            {"nfe": nfe, "solver": solver.kind, "precision": precision, **rate(batch / taken)}
            for (precision, nfe, solver), taken in zip(todo, seconds, strict=True)
        ],
    }


def solver(run: Run, nfe: int) -> Solver:
    """The run's own, or Euler steps where that one makes no sense. Raises UserError where there is none."""
    own = run.sample.solver
    chosen = Euler() if nfe % own.passes or (own.uses == "endpoint" and nfe > JUMPS) else own
    check(chosen, run.reads, nfe)
    return chosen


def rate(images_per_second: torch.Tensor) -> dict[str, float]:
    """Median and quartiles."""
    low, mid, high = clock.spread(images_per_second)
    return {"images_per_second": mid, "low": low, "high": high}
