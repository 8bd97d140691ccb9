"""One setting after another, judged in the same way: which m, which solver, which average of the weights?"""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from dumo.config.change import override
from dumo.config.load import parse
from dumo.config.spec import Run
from dumo.config.tree import Sampling
from dumo.evaluation.protocol import Evaluator, headline, rising, trained_on
from dumo.flow.solver import check
from dumo.io.file import check_writable
from dumo.io.read import brief, write_json
from dumo.report.card import Row, card
from dumo.report.evaluate import name_of, row
from dumo.run.judge import conditions, evaluator_of
from dumo.run.weights import RunFolder, open_run
from dumo.runtime import dist, threads
from dumo.runtime.progress import Bar, no_bar, teller
from dumo.training.checkpoint import part
from dumo.types import UserError

EMA = "ema"
MOST = 1000  # values of a range: more is a slip of the pen
PARTS = ("sample.solver.", "sample.guide.", "sample.knobs.", "evaluate.")  # on which no training depends
HOW = "write it as sample.m=0.2:0.8:0.1 (from, to, step), sample.m=0.3,0.5 or ema"


def sweep(opened: RunFolder, text: str, *, bar: Bar = no_bar) -> dict[str, Any]:
    """Judge a run at every value of a field, or with every average of its weights, and write a report.

    `text` is FIELD=FROM:TO:STEP, both ends included, FIELD=VALUE,VALUE ... or ema. `rows` has one per value and number
    of passes, each with its card; `best` is where the first score is best for that number of passes. Raises
    UserError, before any work, for what cannot be read or a value out of range, OSError where nothing can be written.
    """
    check_writable(opened.folder)
    if text == EMA:
        names = [*(f"ema-{ema.key}" for ema in opened.run.train.ema), "net"]
        points = {name: with_weights(opened, part(opened.checkpoint.path, name)) for name in names}
    else:
        tree = opened.run.model_dump(mode="json")
        points = {value: replace(opened, run=parse(Run, changed)) for value, changed in settings(tree, text)}
        for point in points.values():
            check(point.run.sample.solver, point.run.reads, *point.run.evaluate.nfe)
    evaluators: dict[tuple[object, int], Evaluator] = {}
    rows: list[Row] = []
    with threads.fewer_when_busy(opened.device, teller(bar)):
        for value, point in points.items():
            run, sampler, seed = point.run, point.sampler, point.run.evaluate.seed
            key = (run.evaluate.protocol, seed)
            evaluator = evaluators[key] = evaluators.get(key) or evaluator_of(sampler, run.evaluate, bar)
            c = conditions(run.data, run.evaluate)
            about = card(point, evaluator.facts, len(c))
            for n in run.evaluate.nfe:
                scores = row(sampler, evaluator, run.sample.solver, n, c, seed, bar)
                rows.append({"value": value, **scores, "card": about})
    mark(rows)
    named = re.sub(r"[^\w.]+", "-", text)
    path = opened.folder / name_of(opened, f"sweep-{named}")
    report = {"run": str(opened.folder), "file": str(path), "sweep": text, "values": list(points), "rows": rows}
    if dist.is_main():
        write_json(path, report)
    return report


def mark(rows: list[Row]) -> None:
    """Set `best` on the rows whose score that counts is the best of their number of passes.

    On none where all are equal, or where the run was trained on what it is by.
    """
    for one in rows:
        scores = [_first(other)[1] for other in rows if other["nfe"] == one["nfe"]]
        name, score = _first(one)
        judges = not trained_on(name, one.get("card", {}))
        one["best"] = judges and score == (max if rising(name) else min)(scores) and min(scores) < max(scores)


def values(text: str) -> tuple[str, list[str]]:
    """The field and its values, as text. Raises UserError."""
    field, _, right = (part.strip() for part in text.partition("="))
    if not (field and right):
        raise UserError(f"--sweep {text}: {HOW}")
    if ":" not in right:
        return field, [value.strip() for value in right.split(",")]
    try:
        first, last, step = (Decimal(part) for part in right.split(":"))
        if not (first.is_finite() and last.is_finite() and step.is_finite()) or step <= 0 or last < first:
            wrong = f"'{brief(right)}' has nothing in it: go up, from FROM to TO, by a STEP above 0"
        elif (count := (last - first) / step + 1) < MOST + 1:
            return field, [f"{(first + i * step).normalize():f}" for i in range(int(count))]
        else:
            wrong = f"these are more than {MOST:,} values: take a larger step"
    except (ArithmeticError, ValueError):
        wrong = f"'{brief(right)}' is no range; {HOW}"
    raise UserError(f"--sweep {brief(text)}: {wrong}")


def full(field: str) -> str:
    """The whole name of a field: `sample.m` is `sample.solver.m`. Raises UserError for one that judges nothing."""
    top, _, rest = field.partition(".")
    if top == "sample" and rest.split(".")[0] not in Sampling.model_fields:
        field = f"sample.solver.{rest}"
    if not field.startswith(PARTS):
        raise UserError(
            f"--sweep {field}: no evaluation depends on it, or only a training; sweep a field of sample.solver,"
            " sample.guide, sample.knobs or evaluate, or ema"
        )
    return field


def settings(tree: dict[str, Any], text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every value of a sweep, and a run's tree of plain values with it."""
    name, listed = values(text)
    field = full(name)
    for value in listed:
        changed = deepcopy(tree)
        override(changed, [f"{field}={value}"])
        changed["sample"]["nfe"] = changed["evaluate"]["nfe"]  # samples to look at are not judged
        yield value, changed


def with_weights(opened: RunFolder, file: Path) -> RunFolder:
    """The run with other weights of its folder."""
    point = open_run(opened.folder, weights=str(file), device=str(opened.device))
    return replace(point, run=opened.run, weights=str(file.relative_to(opened.folder)))


def _first(row: Row) -> tuple[str, float]:
    """The score that counts, by name."""
    name = headline([key for key in row if key not in ("value", "nfe", "solver", "card", "best")], row.get("card"))
    return name, row[name]
