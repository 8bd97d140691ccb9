"""A run judged by its protocol: samples for every number of passes, scored against the data, with their report card.

What is written lies in the run's folder. evaluation.json is the run as its own spec has it judged, at whatever numbers
of passes: it collects their rows. Judged in another way, or of other weights, it is another file, named after what
differs; of an earlier step it is kept under that step.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.config.tree import Evaluation, Sampling
from dumo.evaluation.likelihood import LikelihoodEvaluator
from dumo.evaluation.protocol import Evaluator
from dumo.flow.generate import Batch, counting, evaluating, passing
from dumo.flow.likelihood import axes, log_likelihood
from dumo.flow.reading import reading
from dumo.flow.solver import Solver, check
from dumo.io import digest
from dumo.io.file import check_writable, locked, sweep
from dumo.io.read import finite, write_json
from dumo.report.card import FILE, Row, card, contrast_solver, read_report, settings, state
from dumo.report.name import Fields, changes, flat, own
from dumo.report.sample import solver_of
from dumo.run.judge import conditions, evaluator_of
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder
from dumo.runtime import dist, threads
from dumo.runtime.progress import Bar, no_bar, teller
from dumo.types import UserError

PLACES = ("protocol.reference", "protocol.model")  # of files; which ones, the card says
ROWS = {"results": "nfe", "contrast": "contrast"}  # parts of a report, and where its card has their passes


def evaluate(
    opened: RunFolder,
    *,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: str | None = None,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Judge a run by its protocol, and write the report, which says in `file` where it is.

    The file keeps rows of other passes that were measured in the same way; what is returned has none of them.
    `results` has one row per number of passes. `contrast` has Euler steps of the velocity, at as many passes and at
    those that the run adds to them, where its own solver is another: what the other head, or the higher order, is
    for; of likelihoods, Heun's steps at the passes of the protocol. Several ranks share the work, and the first writes.
    Raises UserError as the solvers and the protocol do, OSError where the report could not be written, before any work,
    and Stopped where that is asked.
    """
    check_writable(opened.folder)
    sweep(opened.folder)
    opened = with_options(opened, nfe=nfe, seed=seed, solver=solver)
    with threads.fewer_when_busy(opened.device, teller(bar)):
        path, report = measured(opened, bar)
    if dist.is_main():
        write(path, report)
    return report


def measured(opened: RunFolder, bar: Bar) -> tuple[Path, dict[str, Any]]:
    """The report of a run as it is to be judged, and where it belongs. Raises as `evaluate`."""
    run, sampler, protocol = opened.run, opened.sampler, opened.run.evaluate.protocol
    passes, seed = settings(sampler, run.evaluate), run.evaluate.seed
    evaluator, c = evaluator_of(sampler, run.evaluate, bar), conditions(run.data, run.evaluate)
    path = opened.folder / name_of(opened, but=[f"evaluate.{field}" for field in ROWS.values()])
    chosen, other = run.sample.solver, contrast_solver(protocol)
    report: dict[str, Any] = {
        "run": str(opened.folder),
        "file": str(path),
        "step": opened.step,
        "weights": opened.weights,
        "protocol": protocol.name,
        "samples": len(c),
        "seed": seed,
        "solver": run.sample.solver.model_dump(),
        "results": [row(sampler, evaluator, chosen, n, c, seed, bar) for n in passes["nfe"]],
        "contrast": [row(sampler, evaluator, other, n, c, seed, bar) for n in passes["contrast"]],
        "baselines": evaluator.baselines(),
        "card": card(opened, evaluator.facts, len(c)),
        "versions": dist.versions(),
    }
    report["state"] = state(report["results"], report["baselines"])
    return path, report


def with_options(
    opened: RunFolder, *, nfe: Sequence[int] | None = None, seed: int | None = None, solver: str | None = None
) -> RunFolder:
    """The run as it is to be judged. Raises UserError for passes or a solver out of reach."""
    run, chosen = opened.run, solver_of(opened.run.sample, solver)
    nfe, seed = tuple(nfe or run.evaluate.nfe), run.evaluate.seed if seed is None else seed
    check(chosen, run.reads, *nfe)
    sampling = run.sample.model_copy(update={"solver": chosen})
    evaluation = run.evaluate.model_copy(update={"nfe": nfe, "seed": seed})
    return replace(opened, run=run.model_copy(update={"sample": sampling, "evaluate": evaluation}))


def row(
    sampler: Sampler, evaluator: Evaluator, solver: Solver, nfe: int, c: Tensor, seed: int, bar: Bar = no_bar
) -> Row:
    """The scores of samples, or likelihoods, by a solver at one number of passes, as the net counted them."""
    passes = set[int]()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        parts = (
            likelihoods(sampler, evaluator, solver, nfe)
            if isinstance(evaluator, LikelihoodEvaluator)
            else sampler.batches(c, nfe=nfe, seed=seed, solver=solver)
        )
        for part in parts:
            done += len(part.index) * dist.world()
            tick(min(done, len(c)), "")
            passes.add(part.nfe)
            yield part.index, part.x

    doing = "likelihoods" if isinstance(evaluator, LikelihoodEvaluator) else "sampling"
    with bar(f"{doing}, {solver.kind} at {nfe}", len(c)) as tick:
        scores = evaluator.score(batches())
    return {"nfe": passes.pop(), "solver": solver.kind, **scores}


def standing(opened: RunFolder) -> dict[str, Any] | None:
    """What evaluating the run again would only repeat; None where it has not been evaluated so."""
    try:
        found = read_report(opened.folder / FILE)
    except UserError:
        return None
    wanted: dict[str, Any] = {
        "step": opened.step,
        "weights": opened.weights,
        "protocol": opened.run.evaluate.protocol.name,
        **settings(opened.sampler, opened.run.evaluate),
    }
    passes = {field: wanted.pop(field) for field in ROWS.values()}
    rows = {part: by_passes(found, part) for part in ROWS}
    if any(found["card"].get(field) != value for field, value in wanted.items()):
        return None
    if any(n not in rows[part] for part, field in ROWS.items() for n in passes[field]):
        return None
    return with_rows(found, rows, passes)


def name_of(opened: RunFolder, stem: str = "evaluation", *, but: Collection[str] = ()) -> str:
    """The name of a report: that of the run's own spec has the stem's, other things are said in it, `but` these."""
    before, after = (fields(run.sample, run.evaluate, but) for run in (own(opened.folder), opened.run))
    return "-".join([stem, *changes(opened, before, after)]) + ".json"


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report with the rows of other passes that stand there, if all else on their cards is the same.

    If not, what stands there is put aside, under its step and, of this step, a part of its card's hash. Images that
    others made have neither steps nor passes.
    """
    with locked(path.with_name(f".{path.name}.lock")):  # others may judge the same run at other passes
        try:
            before = read_report(path, images=True)
        except UserError:  # there is nothing to keep
            write_json(path, report)
            return
        if _measure(before) == _measure(report):
            write_json(path, report if "images" in report else merged(before, report))
            return
        step, mark = before.get("step"), digest.of_bytes(_measure(before).encode())[:6]
        marks = [f"-step{step}"] * (step is not None) + [f"-{mark}"] * (step == report.get("step"))
        path.replace(path.with_name(f"{path.stem}{''.join(marks)}.json"))
        write_json(path, report)


def merged(before: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The report with what rows the earlier one has of other passes, in order of passes."""
    both = {part: {**by_passes(before, part), **by_passes(report, part)} for part in ROWS}
    return with_rows(report, both, {field: sorted(both[part]) for part, field in ROWS.items()})


def with_rows(report: dict[str, Any], rows: dict[str, dict[int, Row]], passes: dict[str, list[int]]) -> dict[str, Any]:
    """The report with the rows of these passes in place of its own."""
    parts = {part: [rows[part][n] for n in passes[field]] for part, field in ROWS.items()}
    word = state(parts["results"], report["baselines"])
    return {**report, **parts, "state": word, "card": {**report["card"], **passes}}


def by_passes(report: dict[str, Any], part: str) -> dict[int, Row]:
    """The rows of a part by their passes, as the card has them; guidance makes the net count more."""
    passes = report["card"].get(ROWS[part], [])
    return dict(zip(passes, report[part], strict=True)) if len(passes) == len(report[part]) else {}


def _measure(report: dict[str, Any]) -> str:
    """All that is on a card but which rows there are and where the weights lie: their hash is there."""
    card = {field: value for field, value in report["card"].items() if field not in (*ROWS.values(), "weights")}
    return json.dumps(finite(card), sort_keys=True)


def fields(sampling: Sampling, evaluation: Evaluation, but: Collection[str] = ()) -> Fields:
    """What of a spec decides an evaluation."""
    sample, evaluate = sampling.model_dump(mode="json"), evaluation.model_dump(mode="json")
    parts = {"protocol": evaluate.pop("protocol"), "solver": sample["solver"]}
    parts |= {name: sample[name] for name in ("guide", "knobs")} | {"evaluate": evaluate}
    parts |= {"sample": {"precision": sample["precision"]}}
    return {field: value for field, value in flat(parts).items() if field not in (*PLACES, *but)}


def likelihoods(sampler: Sampler, evaluator: LikelihoodEvaluator, solver: Solver, nfe: int) -> Iterator[Batch]:
    """log p(x | c) in nats of this rank's share of the data, instead of samples; passes in fp32.

    Raises UserError as the solver does.
    """
    net, device = sampler.net, sampler.device
    reads = reading(sampler.objective, net, sampler.spec.knobs)
    for numbers in torch.arange(dist.rank(), len(evaluator.x), dist.world()).split(sampler.rows):
        x, c = (one[numbers].to(device) for one in (evaluator.x, evaluator.c))
        along = [e.to(x) for e in evaluator.directions(numbers.tolist())] or axes(x)
        with evaluating(net), counting(net) as passed, passing(net, "fp32", device):
            found = log_likelihood(reads, sampler.path, solver, x, c, nfe, along)
        yield Batch(numbers, found.cpu(), sum(passed) // len(numbers))
