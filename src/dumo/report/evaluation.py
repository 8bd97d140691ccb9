"""Evaluate a run with its protocol: sample at every NFE, score the samples, and write a report with its card.

`evaluate` is called by `dumo evaluate` and `TrainedRun.evaluate`. With the settings of run.yaml, the report is
evaluation.json in the run's folder (for bundled runs, in a folder with the run's name). With other settings or weights,
the file is named after the differences (`report_path`). A report replaces an earlier one of the same name.
`current_report` reads a report if it has the same weights and settings. `score_passes` generates and scores the samples
at one NFE.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dumo.config.spec import Evaluation, Run, Sampling
from dumo.evaluation.bits_per_dim import LikelihoodEvaluator
from dumo.evaluation.protocol import Evaluator
from dumo.evaluation.stored import FILE as STORED_FILE
from dumo.evaluation.user_metrics import UserMetric, UserMetricsEvaluator
from dumo.flow.guide import CFG
from dumo.flow.likelihood import axes, log_likelihood
from dumo.flow.sampling import Batch, counting_passes, eval_mode, in_precision
from dumo.flow.solver import Solver, check
from dumo.io.read import write_json
from dumo.report.evaluation_card import (
    Row,
    contrast_solver,
    judging_settings,
    make_card,
    protocol_settings,
    read_report,
    sample_settings,
)
from dumo.report.name import Fields, changed_parts, flatten
from dumo.run.judge import evaluator_of, sample_conditions
from dumo.run.trained import TrainedRun, choose_solver
from dumo.run.weights import require_trained_images
from dumo.runtime import dist
from dumo.runtime.device import software_versions
from dumo.runtime.progress import Bar, no_bar
from dumo.types import UserError

# Paths are not part of a report's file name; the card has the hashes of their files.
PATH_FIELDS = ("protocol.reference", "protocol.model")


def evaluate(
    trained: TrainedRun,
    *,
    nfe: Sequence[int] | None = None,
    seed: int | None = None,
    solver: Solver | str | None = None,
    metrics: Mapping[str, UserMetric] | None = None,
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Evaluate a run with its protocol, write the report, and return it. `file` is its path.

    `results` has one row per NFE. If the run's solver is not Euler, `contrast` has rows for Euler steps of the velocity
    at the same and at additional NFE of the config, to show the gain of the other head or of the higher order. For
    likelihoods, `contrast` has Heun steps at the passes of the protocol.

    `metrics` are user-defined scores, by name. They are in the returned rows but not in the file, because its card does
    not identify their code. Several ranks share the work, and the first writes.

    Raises UserError as the solvers and the protocol do, and OSError, before any work, if the folder is not writable.
    """
    run = evaluation_settings(trained.spec, nfe=nfe, seed=seed, solver=solver)
    protocol = run.evaluate.protocol
    if protocol.reads_data:
        require_trained_images(trained)
    # Open the reference and the evaluator.
    evaluator = evaluator_of(run, run.evaluate, trained.device, bar, _stored_reference(trained))
    if metrics:
        dist.require_one_process("a custom metric")
        if isinstance(evaluator, LikelihoodEvaluator):
            raise UserError(f"protocol {protocol.kind} does not generate samples, so custom metrics cannot be computed")
        evaluator = UserMetricsEvaluator(evaluator, metrics)

    # Sample and score.
    c = sample_conditions(run.data, run.evaluate)
    settings = judging_settings(run)

    def score_all(solver: Solver, passes: Sequence[int]) -> list[Row]:
        return [score_passes(trained, evaluator, solver, n, c, run.evaluate.seed, bar) for n in passes]

    results = score_all(run.sample.solver, settings["nfe"])
    contrast = score_all(contrast_solver(protocol), settings["contrast"])
    baselines = evaluator.baselines()

    # Write the report.
    path = report_path(trained, run)
    report: dict[str, Any] = {
        "run": str(trained.folder),
        "file": str(path),
        "step": trained.step,
        "weights": trained.weights,
        "protocol": protocol.name,
        "samples": len(c),
        "seed": run.evaluate.seed,
        "solver": run.sample.solver.model_dump(),
        "results": results,
        "contrast": contrast,
        "baselines": baselines,
        "card": make_card(trained, run, evaluator.facts, len(c)),
        "versions": software_versions(),
    }
    if dist.is_main():
        own = metrics or {}
        without_own = {
            part: [{name: row[name] for name in row if name not in own} for row in report[part]]
            for part in ("results", "contrast")
        }
        write_json(path, report | without_own)
    return report


def evaluation_settings(
    run: Run, *, nfe: Sequence[int] | None, seed: int | None, solver: Solver | str | None = None
) -> Run:
    """Return the run with the given settings; None keeps the run's setting.

    Raises UserError for an NFE or a solver that its objective does not support.
    """
    chosen_solver = choose_solver(run.sample, solver)
    passes = tuple(nfe or run.evaluate.nfe)
    if seed is None:
        seed = run.evaluate.seed
    check(chosen_solver, run.readings, *passes)
    sampling = run.sample.model_copy(update={"solver": chosen_solver})
    evaluation = run.evaluate.model_copy(update={"nfe": passes, "seed": seed})
    return run.model_copy(update={"sample": sampling, "evaluate": evaluation})


def _stored_reference(trained: TrainedRun) -> Path | None:
    """Return the features of the reference that ship with the run; None if there are none, or for another reference."""
    file = trained.run_folder.path / STORED_FILE
    is_own_reference = trained.spec.evaluate.split == trained.spec_as_saved.evaluate.split
    return file if is_own_reference and file.is_file() else None


def score_passes(
    trained: TrainedRun, evaluator: Evaluator, solver: Solver, nfe: int, c: Tensor, seed: int, bar: Bar = no_bar
) -> Row:
    """Make samples of the conditions c (n,), or likelihoods of the data, by `nfe` passes of a solver, and score them.

    Returns the number of passes that the network made, which with guidance is above `nfe`; the solver; and the scores.
    """
    if isinstance(evaluator, LikelihoodEvaluator):
        work = "likelihoods"
        batches = likelihoods(trained, evaluator, solver, nfe)
    else:
        work = "sampling"
        batches = trained.make_batches(c, nfe=nfe, seed=seed, solver=solver)
    total = len(c)
    passes_of_batches: list[int] = []
    with bar(f"{work}, {solver.kind} at {nfe}", total) as tick:

        def indexed_samples() -> Iterator[tuple[Tensor, Tensor]]:
            """The indices and samples of each batch of this rank. The other ranks are about as far."""
            done = 0
            for batch in batches:
                done += len(batch.index) * dist.world()
                tick(min(done, total), "")
                passes_of_batches.append(batch.nfe)
                yield batch.index, batch.x

        scores = evaluator.score(indexed_samples())
    return {"nfe": passes_of_batches[0], "solver": solver.kind, **scores}


def likelihoods(trained: TrainedRun, evaluator: LikelihoodEvaluator, solver: Solver, nfe: int) -> Iterator[Batch]:
    """log p(x | c) in nats of this rank's share of the data, instead of samples; passes in fp32.

    Raises UserError as the solver does.
    """
    net = trained.net
    device = trained.device
    readings = trained.flow.readings(guide=CFG())
    rows_of_rank = torch.arange(dist.rank(), len(evaluator.x), dist.world())
    for rows in rows_of_rank.split(trained.rows_per_pass):
        x = evaluator.x[rows].to(device)
        c = evaluator.c[rows].to(device)
        directions = [e.to(x) for e in evaluator.directions(rows.tolist())] or axes(x)
        with eval_mode(net), counting_passes(net) as rows_per_pass, in_precision(net, "fp32", device):
            log_p = log_likelihood(readings, trained.spec.path, solver, x, c, nfe, directions)
        yield Batch(rows, log_p.cpu(), sum(rows_per_pass) // len(rows))


def current_report(trained: TrainedRun) -> dict[str, Any] | None:
    """Return the report of a run, if it is of these weights and settings; None otherwise.

    Whether the data, the features and the versions are those of the report is not checked.
    """
    path = trained.find_output(report_path(trained, trained.spec).name)
    if not path.is_file():
        return None
    report = read_report(path)
    expected = {
        "protocol": trained.spec.evaluate.protocol.name,
        "protocol_settings": protocol_settings(trained.spec),
        **sample_settings(trained, trained.spec),
        **judging_settings(trained.spec),
    }
    is_current = all(report["card"].get(field) == value for field, value in expected.items())
    return report if is_current else None


def report_path(trained: TrainedRun, run: Run) -> Path:
    """Return the path of the report of an evaluation with the settings of `run`.

    This is evaluation.json, or a name with the settings that differ from run.yaml.
    """
    run_as_saved = trained.spec_as_saved
    saved_fields = _named_fields(run_as_saved.sample, run_as_saved.evaluate)
    opened_fields = _named_fields(run.sample, run.evaluate)
    parts = ["evaluation", *changed_parts(trained, saved_fields, opened_fields)]
    return trained.folder / f"{'-'.join(parts)}.json"


def _named_fields(sampling: Sampling, evaluation: Evaluation) -> Fields:
    """Return the fields that decide an evaluation, and that the name of its file shows if they are changed."""
    sampling_tree = sampling.model_dump(mode="json")
    evaluation_tree = evaluation.model_dump(mode="json")
    protocol = evaluation_tree.pop("protocol")
    fields = flatten(
        {
            "protocol": protocol,
            "solver": sampling_tree["solver"],
            "guide": sampling_tree["guide"],
            "knobs": sampling_tree["knobs"],
            "evaluate": evaluation_tree,
            "sample": {"precision": sampling_tree["precision"]},
        }
    )
    return {field: value for field, value in fields.items() if field not in PATH_FIELDS}
