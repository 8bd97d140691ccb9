"""A run judged by its protocol: samples for every number of passes, scored against the data, with their report card.

What is written lies in the run's folder. evaluation.json is the run as its own spec has it judged. Asked in another
way, or of other weights, it is another file, named after what differs; of an earlier step it is kept under that step.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dumo import dist
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.evaluation.card import card, settings
from dumo.io import digest
from dumo.io.json import read_json, write_json
from dumo.progress import Bar, Tick, no_bar
from dumo.protocols.evaluator import Evaluator
from dumo.run.folder import RunFolder, shown
from dumo.run.sample import real_data, sample_batches, solver_named
from dumo.sampling.solver import Euler, Solver, check
from dumo.types import UserError

FILE = "evaluation.json"
PLACES = ("protocol.reference", "protocol.weights")  # where files lie; which ones they are the card says
Row = dict[str, Any]


def evaluate(
    opened: RunFolder,
    *,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Judge a run by its protocol, and write the report, which says in `file` where it is.

    `results` has one row per number of passes. `contrast` has Euler steps of the velocity, at as many passes and at
    those that the run wants beside them, where its own solver is another: what the other head, or the higher order, is
    for. Several ranks share the work, and the first writes. Raises UserError as the solvers and the protocol do.
    """
    opened = asked(opened, nfe=nfe, seed=seed, solver=solver)
    run = opened.run
    evaluator = evaluator_of(opened, bar)
    c = run.evaluate.protocol.labels(run.data.classes)
    path = opened.folder / name_of(opened)
    report = {
        "run": str(opened.folder),
        "file": str(path),
        "step": opened.step,
        "weights": opened.weights,
        "protocol": run.evaluate.protocol.name,
        "samples": len(c),
        "seed": run.evaluate.seed,
        "solver": run.sample.solver.model_dump(),
        "results": [row(opened, evaluator, run.sample.solver, n, c, bar) for n in run.evaluate.nfe],
        "contrast": [row(opened, evaluator, Euler(), n, c, bar) for n in contrast(run)],
        "baselines": evaluator.baselines(),
        "card": card(opened, evaluator, len(c)),
        "versions": dist.versions(),
    }
    if dist.is_main():
        keep(path, opened.step)
        write_json(path, report)
    return report


def asked(
    opened: RunFolder, *, nfe: Sequence[int] | None = None, seed: int | None = None, solver: str | None = None
) -> RunFolder:
    """The same, its spec changed to what is asked. Raises UserError for passes or a solver out of reach."""
    run, chosen = opened.run, solver_named(opened.run, solver)
    nfe, seed = tuple(nfe or run.evaluate.nfe), run.evaluate.seed if seed is None else seed
    check(chosen, run.reads, *nfe)
    sampling = run.sample.model_copy(update={"solver": chosen})
    evaluation = run.evaluate.model_copy(update={"nfe": nfe, "seed": seed})
    return replace(opened, run=run.model_copy(update={"sample": sampling, "evaluate": evaluation}))


def evaluator_of(opened: RunFolder, bar: Bar) -> Evaluator:
    """The evaluator of the run's protocol. Raises UserError as the protocol does."""
    run, ticks = opened.run, list[Tick]()
    with ExitStack() as stack:

        def tick(done: int, total: int) -> None:
            if not ticks:
                ticks.append(stack.enter_context(bar("looking at the data", total)))
            ticks[0](done, "")

        return run.evaluate.protocol.evaluator(
            lambda: real_data(run),
            classes=run.data.classes,
            seed=run.evaluate.seed,
            device=opened.device,
            tick=tick,
        )


def contrast(run: Run) -> list[int]:
    """Passes of Euler's that stand beside the results."""
    if not run.evaluate.contrast or not run.reads.velocity or run.sample.solver.kind == "euler":
        return []
    return sorted({*run.evaluate.contrast, *run.evaluate.nfe})


def row(opened: RunFolder, evaluator: Evaluator, solver: Solver, nfe: int, c: Tensor, bar: Bar) -> Row:
    """The scores of samples by a solver at one number of passes, the passes as the net counted them."""
    passes = set[int]()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        for part in sample_batches(opened, nfe=nfe, c=c, seed=opened.run.evaluate.seed, solver=solver):
            done += len(part.index) * dist.world()
            tick(min(done, len(c)), "")
            passes.add(part.nfe)
            yield part.index, part.x

    with bar(f"sampling, {solver.kind} at {nfe}", len(c)) as tick:
        scores = evaluator.score(batches())
    return {"nfe": passes.pop(), "solver": solver.kind, **scores}


def read_report(path: Path) -> dict[str, Any]:
    """A report with its card. Raises UserError where there is none."""
    again = f"run dumo evaluate {path.parent} first"
    try:
        found = read_json(path, again)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: {again}") from error
    if not isinstance(found, dict) or "card" not in found:
        raise UserError(f"{path} has no report card: {again}")
    return found


def standing(opened: RunFolder) -> dict[str, Any] | None:
    """What evaluating the run again would only repeat; None where it has not been evaluated so."""
    try:
        found = read_report(opened.folder / FILE)
    except UserError:
        return None
    run, told = opened.run, found["card"]
    wanted = {
        "step": opened.step,
        "weights": opened.weights,
        "protocol": run.evaluate.protocol.name,
        **settings(run),
    }
    return found if all(told.get(key) == value for key, value in wanted.items()) else None


def name_of(opened: RunFolder, stem: str = "evaluation") -> str:
    """The name of a report: what the run's own spec asks has the stem's, other things are said in it."""
    own, run = load(str(opened.folder)), opened.run
    before, after = _told(own), _told(run)
    parts = [_word(field, value) for field, value in after.items() if before.get(field) != value]
    if opened.file.resolve() != shown(opened.folder, own).resolve():
        parts.append(f"{opened.file.stem}-{digest.of_file(opened.file)[:6]}")
    return "-".join([stem, *parts]) + ".json"


def keep(path: Path, step: int) -> None:
    """Put aside what stands there of another step."""
    try:
        before = int(read_report(path)["step"])
    except (UserError, KeyError, TypeError, ValueError):
        return
    if before != step:
        path.replace(path.with_name(f"{path.stem}-step{before}.json"))


def _told(run: Run) -> dict[str, Any]:
    """What of a spec decides an evaluation, one level deep: `evaluate.nfe`, `evaluate.protocol.samples` ..."""
    spec = run.model_dump(mode="json")
    parts = {"protocol": spec["evaluate"].pop("protocol"), "solver": spec["sample"]["solver"]}
    parts |= {name: spec["sample"][name] for name in ("guide", "knobs")} | {"evaluate": spec["evaluate"]}
    told = {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()}
    return {field: value for field, value in told.items() if field not in PLACES}


def _word(field: str, value: object) -> str:
    """A field and its value as part of a file's name: seed3, heun, nfe1-2."""
    name = "" if field.endswith(".kind") else field.split(".")[-1]
    return name + re.sub(r"[^\w.]+", "-", str(value)).strip("-")[:40]
