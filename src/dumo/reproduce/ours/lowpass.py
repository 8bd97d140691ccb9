"""What makes a net that reads 1000 t fit to be tuned: a low-pass of its time embedder (`dumo.nets.lowpass`), on digits.

Two small SD3s learn digits by flow matching: one that reads 1000 t, as published models do, and one that from its start
reads waves of up to 10 rad. DuMo tunes both, the first one as it is, or behind a low-pass, whose columns are held at
zero, or free to grow again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.nets.pretrained import Pretrained
from dumo.progress import Bar
from dumo.reproduce import arm
from dumo.reproduce.ours.pretrained import begun_at, net, save
from dumo.reproduce.plan import Cell, Finished, Plan, finish_all, trained_as

MODEL, NATIVE = "sd3-digits", 10.0  # rad
LIMITS = (10.0, 30.0, 100.0)  # rad
STEPS = {"smoke": 10, "laptop": 2000}  # of a base, and of each that begins from it


def cells(scale: str) -> Iterator[Cell]:
    """Two bases, and what begins from them, with several seeds."""
    small = [one for one in arm.SMALL if not one.startswith("net.")] if scale == "smoke" else []
    sets = [*small, f"train.steps={STEPS[scale]}", "evaluate.nfe=[1,2]"]
    for name, limit in (("given", None), ("native", NATIVE)):
        drawn = net(source=MODEL, weights="drawn", lowpass=limit)
        spec = load("digits-flow-matching", [*sets, "evaluate.nfe=[1,50]", drawn])
        yield Cell(name, spec, {"low-pass": f"flow matching, {waves(limit)}"})
    arms: dict[str, dict[str, Any]] = {f"{waves(NATIVE)} from its start": {"source": "native", "lowpass": NATIVE}}
    arms |= {f"{waves(limit)}, held": {"source": "given", "lowpass": limit} for limit in LIMITS}
    arms |= {f"{waves(limit)}, free": {"source": f"free-{limit:g}", "lowpass": None} for limit in LIMITS}
    arms |= {"none: as given": {"source": "given", "lowpass": None}}
    for title, fields in arms.items():
        spec = load("digits", [*sets, net(**fields | {"source": MODEL})])
        for seed in range(1 if scale == "smoke" else 3):
            cell = begun_at(trained_as(spec, seed=seed), Path(fields["source"]))
            yield Cell(f"{title.replace(' ', '-').replace(':', '').replace(',', '')}-{seed}", cell, {"low-pass": title})


def waves(limit: float | None) -> str:
    """Of a column."""
    return "1000 t" if limit is None else f"{limit:g} rad"


def finish(cells: Sequence[Cell], folder: Path, *, jobs: int, device: str, bar: Bar) -> list[Finished]:
    """The bases first, which diffusers saves; then what begins from them. Raises UserError as `finish_all`."""
    bases, rest = cells[:2], cells[2:]
    begun, beside = finish_all(bases, folder, jobs=jobs, device=device, bar=bar), folder.parent
    for one in begun:
        save(one.opened.net, beside / one.cell.name)
    for limit in LIMITS:  # cut and refitted once, then as any other model
        free = Pretrained(source=str(beside / "given"), lowpass=limit)
        spec = begun[0].opened.run
        cut = free.build(spec.objective.needs, spec.data.shape, spec.data.classes)
        cut.refit()
        save(cut, beside / f"free-{limit:g}")
    moved = [replace(cell, spec=beside_of(cell, beside)) for cell in rest]
    return [*begun, *finish_all(moved, folder, jobs=jobs, device=device, bar=bar)]


def beside_of(cell: Cell, beside: Path) -> Run:
    """The run of a cell, its source among the folders that were saved."""
    return begun_at(cell.spec, beside / cell.spec.net.source)  # pyright: ignore[reportAttributeAccessIssue]


PLAN = Plan(
    "A net that reads 1000 t, tuned behind a low-pass of its time embedder",
    cells,
    lambda done: list(arm.averaged(done)),
    finish=finish,
    unpublished="it is ours, and tried on digits",
)
