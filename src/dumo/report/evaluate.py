"""A run judged by its protocol: samples for every number of passes, scored against the data, with their report card.

`evaluate` is the entrance:

1. `with_judging_options` takes the run as it is to be judged.
2. `_judge` opens the run's evaluator, makes a row of scores for each number of passes (`score_passes`), and adds the
   card.
3. `write_report` writes the report, with the rows of other passes that the file has.

`current_report` reads it back, where it is of the same weights and settings, and lacks no passes.

Others also call `score_passes` (`dumo.lab`), `with_judging_options` (`dumo.report.benchmark`), `complete_report` and
`write_report` (`dumo.report.images`), and `report_path`, which says where the report of a run is (`dumo.compare`).

What is written lies in the run's folder, or for a run that comes with dumo in a folder of its name. evaluation.json is
the run as its own spec has it judged, at whatever numbers of passes: it collects their rows. Judged in another way, or
of other weights, it is another file, named after what differs; of an earlier step it is kept under that step.
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.config.place import EVALUATION_FILE
from dumo.config.spec import Evaluation, Sampling
from dumo.evaluation.likelihood import LikelihoodEvaluator
from dumo.evaluation.own import OwnMetric, OwnMetricsEvaluator
from dumo.evaluation.protocol import Evaluator, Scores
from dumo.evaluation.stored import FILE as STORED_FILE
from dumo.flow.generate import Batch, counting_passes, eval_mode, in_precision
from dumo.flow.guide import CFG
from dumo.flow.likelihood import axes, log_likelihood
from dumo.flow.solver import Solver, check
from dumo.io import digest
from dumo.io.file import check_writable, sweep
from dumo.io.guard import locked
from dumo.io.read import null_nonfinite, write_json
from dumo.report import score
from dumo.report.card import (
    Card,
    Row,
    contrast_solver,
    is_card_of,
    judging_settings,
    make_card,
    protocol_settings,
    read_report,
)
from dumo.report.name import Fields, changed_parts, flatten
from dumo.report.sample import chosen_solver
from dumo.run.judge import evaluator_of, sample_conditions
from dumo.run.sampler import Sampler
from dumo.run.weights import RunFolder, require_trained_images
from dumo.runtime import dist, threads
from dumo.runtime.device import software_versions
from dumo.runtime.progress import Bar, ignore_line, line_printer, no_bar
from dumo.types import UserError

PATH_FIELDS = ("protocol.reference", "protocol.model")  # no part of a file's name: the card has their files' hashes
PASSES_FIELDS = {"results": "nfe", "contrast": "contrast"}  # by a part of the report: the card's field with its passes


def evaluate(
    opened: RunFolder,
    *,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: Solver | str | None = None,
    metrics: Mapping[str, OwnMetric] | None = None,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Judge a run by its protocol, and write the report, which says in `file` where it is.

    The file keeps rows of other passes that were measured in the same way; what is returned has none of them.
    `results` has one row per number of passes. Where the run's solver is not Euler's, `contrast` has rows by Euler's
    steps of the velocity, at these passes and those that the run adds: they show what the other head, or the higher
    order, is for. Of likelihoods, `contrast` has Heun's steps at the passes of the protocol. `metrics` are scores of
    the user's own, by name: they are in the rows that are returned, not in the file, which does not know their code.
    Several ranks share the work, and the first writes.

    Raises UserError as the solvers and the protocol do, OSError where the report could not be written, before any work,
    and Stopped where that is asked.
    """
    check_writable(opened.output_folder)
    sweep(opened.output_folder)
    opened = with_judging_options(opened, nfe=nfe, seed=seed, solver=solver)
    with threads.fewer_when_busy(opened.device, line_printer(bar)):
        path, report = _judge(opened, bar, metrics or {})
    if dist.is_main():
        write_report(path, _without_scores(report, metrics or {}), line_printer(bar))
    return report


def _without_scores(report: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The report without the scores of these names in its rows."""
    rows_by_part: dict[str, list[Row]] = {}
    for part in PASSES_FIELDS:
        rows_by_part[part] = [{name: row[name] for name in row if name not in names} for row in report[part]]
    return {**report, **rows_by_part}


def _judge(opened: RunFolder, bar: Bar, metrics: Mapping[str, OwnMetric]) -> tuple[Path, dict[str, Any]]:
    """The report of a run as it is to be judged, and where it belongs. Raises as `evaluate`."""
    run = opened.run
    sampler = opened.sampler
    protocol = run.evaluate.protocol
    seed = run.evaluate.seed
    settings = judging_settings(sampler, run.evaluate)
    if protocol.reads_data:
        require_trained_images(opened)
    evaluator = evaluator_of(sampler, run.evaluate, bar, _stored_reference(opened))
    if metrics:
        dist.require_one_process("a metric of your own")
        if isinstance(evaluator, LikelihoodEvaluator):
            raise UserError(f"protocol {protocol.kind} makes no samples, so it takes no metrics of your own")
        evaluator = OwnMetricsEvaluator(evaluator, metrics)
    c = sample_conditions(run.data, run.evaluate)
    path = report_path(opened)
    solver = run.sample.solver
    other_solver = contrast_solver(protocol)
    head: dict[str, Any] = {
        "run": str(opened.output_folder),
        "file": str(path),
        "step": opened.step,
        "weights": opened.weights,
        "protocol": protocol.name,
        "samples": len(c),
        "seed": seed,
        "solver": solver.model_dump(),
    }
    report = complete_report(
        head,
        results=[score_passes(sampler, evaluator, solver, n, c, seed, bar) for n in settings["nfe"]],
        contrast=[score_passes(sampler, evaluator, other_solver, n, c, seed, bar) for n in settings["contrast"]],
        baselines=evaluator.baselines(),
        card=make_card(opened, evaluator.facts, len(c)) | {"protocol_settings": protocol_settings(run)},
    )
    return path, report


def _stored_reference(opened: RunFolder) -> Path | None:
    """The features of the reference that came with the run; None: there are none, or another reference is asked for."""
    file = opened.folder / STORED_FILE
    is_own_reference = opened.run.evaluate.split == opened.run_as_saved.evaluate.split
    return file if is_own_reference and file.is_file() else None


def complete_report(
    head: Row, *, results: list[Row], contrast: list[Row], baselines: dict[str, Scores], card: Card
) -> dict[str, Any]:
    """A report: `head` says what was judged, and where the report belongs; the scores say where it stands (`state`)."""
    return {
        **head,
        "results": results,
        "contrast": contrast,
        "baselines": baselines,
        "card": card,
        "versions": software_versions(),
        "state": score.state(results, baselines),
    }


def with_judging_options(
    opened: RunFolder, *, nfe: Sequence[int] | None, seed: int | None, solver: Solver | str | None = None
) -> RunFolder:
    """The run as it is to be judged; None leaves what the run has.

    Raises UserError for passes or a solver out of reach.
    """
    run = opened.run
    solver_spec = chosen_solver(run.sample, solver)
    passes = tuple(nfe or run.evaluate.nfe)
    if seed is None:
        seed = run.evaluate.seed
    check(solver_spec, run.reads, *passes)
    sampling = run.sample.model_copy(update={"solver": solver_spec})
    evaluation = run.evaluate.model_copy(update={"nfe": passes, "seed": seed})
    return replace(opened, run=run.model_copy(update={"sample": sampling, "evaluate": evaluation}))


def score_passes(
    sampler: Sampler, evaluator: Evaluator, solver: Solver, nfe: int, c: Tensor, seed: int, bar: Bar = no_bar
) -> Row:
    """Make samples of the conditions c (n,), or likelihoods of the data, by `nfe` passes of a solver, and score them.

    Returns the number of passes that the net has counted, which with guidance is above `nfe`; the solver; the scores.
    """
    if isinstance(evaluator, LikelihoodEvaluator):
        work = "likelihoods"
        batches = likelihoods(sampler, evaluator, solver, nfe)
    else:
        work = "sampling"
        batches = sampler.batches(c, nfe=nfe, seed=seed, solver=solver)
    total = len(c)  # samples of all ranks
    passes_of_batches: list[int] = []  # the same of each
    with bar(f"{work}, {solver.kind} at {nfe}", total) as tick:

        def indexed_samples() -> Iterator[tuple[Tensor, Tensor]]:
            """The indices and samples of each batch of this rank, which moves the bar."""
            done = 0
            for batch in batches:
                done += len(batch.index) * dist.world()
                tick(min(done, total), "")
                passes_of_batches.append(batch.nfe)
                yield batch.index, batch.x

        scores = evaluator.score(indexed_samples())
    return {"nfe": passes_of_batches[0], "solver": solver.kind, **scores}


def current_report(opened: RunFolder) -> dict[str, Any] | None:
    """The report in the run's folder, if it is of these weights and settings, and has all passes; else None.

    Whether the data, the features and the versions are the same as then is not looked at.
    """
    try:
        report = read_report(opened.find_output(EVALUATION_FILE))
    except UserError:
        return None
    if not is_card_of(report["card"], opened):
        return None
    wanted_card: dict[str, Any] = {
        "protocol": opened.run.evaluate.protocol.name,
        "protocol_settings": protocol_settings(opened.run),
        **judging_settings(opened.sampler, opened.run.evaluate),
    }
    wanted_passes = {field: wanted_card.pop(field) for field in PASSES_FIELDS.values()}
    rows = {part: _rows_by_passes(report, part) for part in PASSES_FIELDS}
    for field, value in wanted_card.items():
        if report["card"].get(field) != value:
            return None
    for part, field in PASSES_FIELDS.items():
        if any(n not in rows[part] for n in wanted_passes[field]):
            return None
    return _with_rows(report, rows, wanted_passes)


def report_path(opened: RunFolder) -> Path:
    """Where the report of a run belongs: evaluation.json, or, where options differ from its spec, a name with these."""
    run_as_saved = opened.run_as_saved
    saved_fields = _judging_fields(run_as_saved.sample, run_as_saved.evaluate)
    opened_fields = _judging_fields(opened.run.sample, opened.run.evaluate)
    parts = ["evaluation", *changed_parts(opened, saved_fields, opened_fields)]
    return opened.output_folder / f"{'-'.join(parts)}.json"


def write_report(path: Path, report: dict[str, Any], log_line: Callable[[str], None] = ignore_line) -> None:
    """Write a report with the rows of other passes that the file has, if all else on their cards is the same.

    If not, the earlier report is put aside, under its step and, of this step, a part of its card's hash, and `log_line`
    is called with where it is. A file that has that name already stays, unless it is the same. Images that others made
    have neither steps nor passes.
    """
    with locked(path.with_name(f".{path.name}.lock")):  # others may judge the same run at other passes
        try:
            earlier = read_report(path, images=True)
        except UserError:  # there is nothing to keep
            write_json(path, report)
            return
        if _card_text(earlier) == _card_text(report):
            if "images" not in report:
                report = _merge_rows(earlier, report)
            write_json(path, report)
            return
        earlier_stem = path.stem
        earlier_step = earlier.get("step")
        if earlier_step is not None:
            earlier_stem += f"-step{earlier_step}"
        if earlier_step == report.get("step"):
            earlier_stem += f"-{digest.of_bytes(_card_text(earlier).encode())[:6]}"
        earlier_path = _path_aside(path, earlier_stem)
        path.replace(earlier_path)
        write_json(path, report)
    log_line(f"{path} was there, of other weights or measured otherwise: it is now {earlier_path}")


def _path_aside(path: Path, stem: str) -> Path:
    """Where a file goes to be kept under another name: `stem`.json, or the first of `stem`-2.json, ... that is free.

    A file with the same content counts as free.
    """
    content = path.read_bytes()
    for number in itertools.count(1):
        suffix = "" if number == 1 else f"-{number}"
        aside = path.with_name(f"{stem}{suffix}.json")
        if not aside.exists() or (aside.is_file() and aside.read_bytes() == content):
            return aside
    raise AssertionError("some name is free")


def _merge_rows(earlier: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The report with the rows that the earlier one has of other passes, in order of passes."""
    rows: dict[str, dict[int, Row]] = {}
    passes: dict[str, list[int]] = {}
    for part, field in PASSES_FIELDS.items():
        rows[part] = {**_rows_by_passes(earlier, part), **_rows_by_passes(report, part)}
        passes[field] = sorted(rows[part])
    return _with_rows(report, rows, passes)


def _with_rows(report: dict[str, Any], rows: dict[str, dict[int, Row]], passes: dict[str, list[int]]) -> dict[str, Any]:
    """The report with the rows of these passes in place of its own."""
    parts: dict[str, list[Row]] = {}
    for part, field in PASSES_FIELDS.items():
        parts[part] = [rows[part][n] for n in passes[field]]
    state = score.state(parts["results"], report["baselines"])
    return {**report, **parts, "state": state, "card": {**report["card"], **passes}}


def _rows_by_passes(report: dict[str, Any], part: str) -> dict[int, Row]:
    """The rows of a part, by their passes on the card: with guidance, those in a row are more.

    {} where the card has not as many numbers of passes as there are rows.
    """
    passes = report["card"].get(PASSES_FIELDS[part], [])
    if len(passes) != len(report[part]):
        return {}
    return dict(zip(passes, report[part], strict=True))


def _card_text(report: dict[str, Any]) -> str:
    """The card as text, without its passes, the weights' path, whose hash it has, and settings that its facts tell."""
    left_out = (*PASSES_FIELDS.values(), "weights", "protocol_settings")
    compared_card = {field: value for field, value in report["card"].items() if field not in left_out}
    return json.dumps(null_nonfinite(compared_card), sort_keys=True)


def _judging_fields(sampling: Sampling, evaluation: Evaluation) -> Fields:
    """The fields that decide an evaluation, without its passes, since a report collects rows of all passes."""
    sampling_tree = sampling.model_dump(mode="json")
    evaluation_tree = evaluation.model_dump(mode="json")
    protocol = evaluation_tree.pop("protocol")
    parts = {
        "protocol": protocol,
        "solver": sampling_tree["solver"],
        "guide": sampling_tree["guide"],
        "knobs": sampling_tree["knobs"],
        "evaluate": evaluation_tree,
        "sample": {"precision": sampling_tree["precision"]},
    }
    left_out = [*PATH_FIELDS, *(f"evaluate.{field}" for field in PASSES_FIELDS.values())]
    return {field: value for field, value in flatten(parts).items() if field not in left_out}


def likelihoods(sampler: Sampler, evaluator: LikelihoodEvaluator, solver: Solver, nfe: int) -> Iterator[Batch]:
    """log p(x | c) in nats of this rank's share of the data, instead of samples; passes in fp32.

    Raises UserError as the solver does.
    """
    net = sampler.net
    device = sampler.device
    reads = sampler.guided(CFG())
    rows_of_rank = torch.arange(dist.rank(), len(evaluator.x), dist.world())
    for rows in rows_of_rank.split(sampler.rows):
        x = evaluator.x[rows].to(device)
        c = evaluator.c[rows].to(device)
        directions = [e.to(x) for e in evaluator.directions(rows.tolist())] or axes(x)
        with eval_mode(net), counting_passes(net) as rows_per_pass, in_precision(net, "fp32", device):
            log_p = log_likelihood(reads, sampler.flow.path, solver, x, c, nfe, directions)
        yield Batch(rows, log_p.cpu(), sum(rows_per_pass) // len(rows))
