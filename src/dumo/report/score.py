"""The scores of an evaluation: which one leads, how a value and its error are written, and what is better or worse.

In the order of this file:

1. A row's scores: `score_names`, the one that leads first; `summary_names` and `select_scores` leave some out.
2. Better and worse: `state` and `verdict` compare the best row with baselines, `mark_best` rows with one another.
3. As text: `number`, `spread`, `text`; `terminal_text` for the command line.
4. For a page: `judgement` reads a run's evaluation.json; `benchmarks`, `others` and `doubts` set it out. The template
   of the page, report.html.j2, calls this file by the name `score`, so its functions are public where it does.

`dumo.evaluation.metric` says what the name of a score means, such as which way is better. `dumo.report.card` checks
files of evaluations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import floor, inf, log10
from pathlib import Path
from typing import Any, Literal

from dumo.config.word import BASELINES, MERITS, STATES, Word, merits, word
from dumo.data import Data
from dumo.evaluation import MetricProtocol
from dumo.evaluation.distance import Estimate, level
from dumo.evaluation.metric import CLASS_MMD, METRICS, Scores, headline, metric, rising, trained_on
from dumo.io.read import read_json
from dumo.report.card import FILE, Card, Row, validate_report
from dumo.runtime import typed

ERROR = "_sd"  # the ending of a name whose value is the error of a score: mmd_sd
NO_SCORES = ("nfe", "solver")  # what a row has besides scores
NUM_SPLITS = "splits"  # what a baseline calls the number of distances that it is the mean of
# where a run stands, all ours
UNTRAINED_SHARE = 1 / 2  # of the distance of noise, from which a run counts as untrained
FAR_SHARE = 1 / 20  # of the distance of noise, beyond which samples are far from the data
FAR_TIMES = 20  # times a perfect sampler's distance, beyond which they are far, where noise was not measured
MAX_UNTRAINED_PRECISION = 0.02  # of an untrained run, where noise was not measured
# times the distance of real images to their nearest, beyond which samples are not like them: on digits it is 4.1 after
# 20 steps, 1.9 after 500, 1.2 after 5,000
FAR_FROM_NEAREST = 1.5
SHIPPED = {"digits": "zoo", "toy": "fig3", "cifar10-features": "latents"}  # by protocol: the packaged results of it
BENCHMARKS = ("clip",)  # evaluations other than the run's own that a page shows
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Judgement = dict[str, Any]  # an evaluation, with what a page says of it
State = Literal["untrained", "far", "near", "like the data"]


# The scores of a row


def is_error(name: str) -> bool:
    """Whether this is the error of a score, rather than a score."""
    return name.endswith(ERROR)


def error(row: Mapping[str, Any], name: str) -> float | None:
    """The error of a score in a row; None where it is not known."""
    return row.get(name + ERROR)


def first_of(row: Mapping[str, Any]) -> str:
    """The name of a row's first score, whose value a baseline calls `mean`."""
    return next(name for name in row if name not in NO_SCORES)


def score_names(row: Mapping[str, Any], card: Card | None = None) -> list[str]:
    """The names of the scores in a row, without errors; the one that leads, for a run of this card, comes first."""
    names: list[str] = []
    for name, value in row.items():
        is_number = value is None or isinstance(value, int | float)
        if is_number and name != "nfe" and not is_error(name):
            names.append(name)
    lead = headline(names, card)
    return [lead, *(name for name in names if name != lead)]


def trained_on_names(row: Mapping[str, Any], card: Card) -> list[str]:
    """The names of the scores in a row that measure what the run of this card was trained on."""
    names = [name for name, value in row.items() if isinstance(value, float) and not is_error(name)]
    return [name for name in names if trained_on(name, card)]


def summary_names(columns: Sequence[str]) -> list[str]:
    """The names among `columns`, of which the first leads, that a summary shows. It also shows unknown scores."""
    names: list[str] = []
    for i, name in enumerate(columns):
        if i == 0 or metric(name).in_summary or name not in METRICS:
            names.append(name)
    return names


def select_scores(row: Mapping[str, Any], columns: Sequence[str]) -> Row:
    """A row, or a baseline, with only the scores `columns` and their errors, in the order of `columns`."""
    selected = {name: row[name] for name in NO_SCORES if name in row}
    for column in columns:
        for name in (column, column + ERROR):
            if name in row:
                selected[name] = row[name]
    return selected


# Better and worse


def state(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, Scores]) -> State | None:
    """Where a run stands by its best row; rows and baselines as an evaluation has them.

    `like the data`: the first score, lower being better, is at most two deviations above a perfect sampler's, and so is
    each that `tells_apart` (`dumo.evaluation.metric`), such as `class_mmd`.
    `untrained`: by the first score at least half as far off as noise; where `noise` is not among the baselines,
    `FAR_TIMES` as far as a perfect sampler, and with a precision of at most `MAX_UNTRAINED_PRECISION`. `far`: by the
    first score or by `class_mmd` over a twentieth of noise, or `FAR_TIMES` as far as a perfect sampler. None: no
    baseline tells, or more is better.
    """
    real = baselines.get("perfect") or baselines.get("null")
    noise = baselines.get("noise")
    scores = _best_scores(rows)
    if not real or not scores or rising(next(iter(scores))):
        return None
    score = _first(scores)
    if _is_as_perfect(score, real) and not _worse_scores(scores, real):
        return "like the data"
    if noise:
        if score >= UNTRAINED_SHARE * noise["mean"]:
            return "untrained"
        return "far" if _is_far(score, noise) or _lacks_classes(scores, noise) else "near"
    if score <= FAR_TIMES * (abs(real["mean"]) + 2 * real["sd"]):
        return "near"
    return "untrained" if scores.get("precision", 1.0) <= MAX_UNTRAINED_PRECISION else "far"


def _best_scores(rows: Sequence[Mapping[str, Any]]) -> Scores:
    """The scores of the row with the least `class_mmd`, or, where a row has none, the least first score.

    {} where no row has scores.
    """
    rows_of_scores: list[Scores] = []
    for row in rows:
        scores = {name: value for name, value in row.items() if isinstance(value, float)}
        if scores:
            rows_of_scores.append(scores)
    if not rows_of_scores:
        return {}
    if all(CLASS_MMD in scores for scores in rows_of_scores):
        return min(rows_of_scores, key=lambda scores: scores[CLASS_MMD])
    return min(rows_of_scores, key=_first)


def _first(scores: Scores) -> float:
    """The value of the first score."""
    return next(iter(scores.values()))


def _is_as_perfect(score: float, real: Scores) -> bool:
    """Whether the first score is at most two deviations above a perfect sampler's."""
    return score <= real["mean"] + 2 * real["sd"]


def _is_far(score: float, noise: Scores) -> bool:
    """Whether by the first score samples are over a twentieth as far off as noise."""
    return score > FAR_SHARE * noise["mean"]


def _lacks_classes(scores: Scores, noise: Scores) -> bool:
    """Whether by `class_mmd` samples are over a twentieth as far off as noise in place of each class."""
    return CLASS_MMD in scores and CLASS_MMD in noise and scores[CLASS_MMD] > FAR_SHARE * noise[CLASS_MMD]


def _worse_scores(scores: Scores, real: Scores) -> list[str]:
    """The scores that are over two deviations worse than those of a perfect sampler, where these are known."""
    worse: list[str] = []
    for name, known in METRICS.items():
        deviation = error(real, name)
        if not known.tells_apart or name not in scores or deviation is None:
            continue
        excess = scores[name] - real[name]
        if known.better == "higher":
            excess = -excess
        elif known.better == "equal":
            excess = abs(excess)
        if excess > 2 * deviation:
            worse.append(name)
    return worse


def verdict(judged: Mapping[str, Any]) -> str | None:
    """One sentence on where a run, or images, stand, by the `state` of an evaluation; None where it has none."""
    judged_state = judged.get("state")
    scores = _best_scores(judged["results"])
    baselines = judged["baselines"]
    real = baselines.get("perfect") or baselines.get("null")
    noise = baselines.get("noise")
    if judged_state is None or not scores or not real:
        return None
    lead = first_of(scores)
    if judged_state == "like the data":
        return "Like the data: no score is over two deviations worse than a perfect sampler's."
    if judged_state == "untrained" and noise:
        return f"{STATES[judged_state]}: {lead} is {number(scores[lead])}, of noise {number(noise['mean'])}."
    if judged_state == "far" and noise and not _is_far(scores[lead], noise) and _lacks_classes(scores, noise):
        return (
            f"{STATES[judged_state]}: images do not show the classes that they were asked for. {CLASS_MMD} is "
            f"{number(scores[CLASS_MMD])}, of a perfect sampler {text(real, CLASS_MMD)}."
        )
    worse = _worse_scores(scores, real)
    if not _is_as_perfect(scores[lead], real):
        worse = [lead, *worse]
    begin = STATES.get(str(judged_state), "Near the data, but not like them")
    return f"{begin}: worse than a perfect sampler by {', '.join(worse)}."


def mark_best(rows: Sequence[Row], lead: str) -> list[Row]:
    """The rows, each with `best`: whether its score `lead` is the least at its number of passes, or level with that.

    Rows that lack the score or its error are not best. Where all rows do, or more is better, no row gets `best`.
    """
    comparable = [row for row in rows if row.get(lead) is not None and error(row, lead) is not None]
    if not comparable or rising(lead):
        return list(rows)
    best: set[int] = set()  # by id
    for nfe in {row.get("nfe") for row in comparable}:
        same = [row for row in comparable if row.get("nfe") == nfe]
        ties = level([Estimate(row[lead], row[lead + ERROR]) for row in same])
        best |= {id(row) for row, tie in zip(same, ties, strict=True) if tie}
    return [row | {"best": id(row) in best} for row in rows]


# Baselines


def baselines_by_name(judged: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The baselines, with the first score by its name in place of `mean` and `sd`."""
    lead = first_of(judged["results"][0])
    names: dict[str, str] = {"mean": lead, "sd": lead + ERROR}
    baselines: Mapping[str, Mapping[str, float]] = judged["baselines"]
    named: dict[str, dict[str, float]] = {}
    for baseline, scores in baselines.items():
        named[baseline] = {names.get(name, name): value for name, value in scores.items()}
    return named


def has_too_few_images(judged: Mapping[str, Any]) -> bool:
    """Whether there were too few images to say what a perfect sampler would have."""
    lead = first_of(judged["results"][0])
    return not judged["baselines"] and metric(lead).needs_many_images


# As text


def number(value: object) -> str:
    """Three significant digits, no exponent unless it is needed, a dash for nothing; other things as they are."""
    if value is None or value != value:
        return "–"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or not value or 100 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace("-", "−")
    power = floor(log10(abs(value)))
    if -4 < power < 6:
        return f"{value:.{max(0, 2 - power)}f}".replace("-", "−")
    return f"{value / 10**power:.2f}".replace("-", "−") + f" · 10{str(power).translate(SUPERSCRIPTS)}"


def large(value: float | int) -> str:
    """Three significant digits and k, M, G or T for a power of a thousand."""
    if value < 1000:
        return number(value)
    power = min(4, floor(log10(value) / 3))
    return f"{number(value / 1000**power)}\u00a0{'kMGT'[power - 1]}"


def spread(value: float | None, deviation: float | None) -> str:
    """A number with its deviation, to two digits of the deviation."""
    if value is None or not deviation or deviation < 0:
        return number(value)
    digits = max(0, 1 - floor(log10(deviation)))
    return f"{value:.{digits}f} ± {deviation:.{digits}f}".replace("-", "−")


def text(row: Mapping[str, Any], name: str) -> str:
    """A score of a row, or of a baseline, with its error."""
    return spread(row.get(name), error(row, name))


def terminal_text(baseline: Mapping[str, float]) -> str:
    """A baseline of `baselines_by_name` in a line for the terminal: each score with its error."""
    texts: list[str] = []
    for name, value in baseline.items():
        if name == NUM_SPLITS or is_error(name):
            continue
        score_text = f"{name} {value:.3g}"
        deviation = error(baseline, name)
        if deviation is not None:
            score_text += f" ± {deviation:.2g}"
        texts.append(score_text)
    return ", ".join(texts)


# For a page


def judgement(folder: Path, step: int, weights: str) -> Judgement | None:
    """The evaluation that `dumo evaluate` wrote into a run's folder, with what a page says of it; None without one.

    `fresh`: whether it is of this step and these weights; `columns`: its scores, the one that leads first; `summary`:
    some of them; `verdict`: a sentence; `left_out`: which classes do not count, if any; `biased`: the scores that the
    run was trained on; `baseline`: the first one. Raises UserError if the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    fix = f"run dumo evaluate {typed(folder)} again"
    evaluation = validate_report(read_json(path, fix), path, fix)
    card = evaluation.get("card") or {}
    first_row = evaluation["results"][0]
    columns = score_names(first_row, card)
    biased_columns = trained_on_names(first_row, card)
    words = merits(columns)
    for name in biased_columns:
        words[name] = replace(words[name], better=f"{words[name].better}; trained on")
    return {
        **evaluation,
        "columns": columns,
        "summary": summary_names(columns),
        "verdict": verdict(evaluation),
        "left_out": card.get(CLASS_MMD),
        "fresh": _is_of(evaluation, step, weights),
        "words": words,
        "biased": biased_columns,
        "baseline": _first_baseline(evaluation, columns[0]),
    }


def _is_of(evaluation: Mapping[str, Any], step: int, weights: str) -> bool:
    """Whether an evaluation is of this step and this file of weights."""
    return (evaluation["step"], evaluation["weights"]) == (step, weights)


def benchmarks(folder: Path, step: int, weights: str) -> list[Judgement]:
    """What the evaluators of benchmarks, and CLIP, said of these weights, each with its `words` and `rows`.

    Raises UserError where a file is damaged.
    """
    judgements: list[Judgement] = []
    for path in sorted(folder.glob("evaluation-*.json")):
        if path.name.split("-")[1] not in BENCHMARKS:
            continue
        fix = f"remove it, or run dumo evaluate {typed(folder)} again"
        evaluation = validate_report(read_json(path, fix), path, fix)
        if _is_of(evaluation, step, weights):
            columns = score_names(evaluation["results"][0])
            texts = rows(evaluation, columns)
            judgements.append({**evaluation, "columns": columns, "words": merits(columns), "rows": texts})
    return judgements


def rows(judged: Judgement, columns: Sequence[str]) -> list[list[tuple[str, int, list[str]]]]:
    """The rows of the results, then those of the contrast, each row as its solver, its passes and its cells."""
    groups: list[list[tuple[str, int, list[str]]]] = []
    for part in (judged["results"], judged["contrast"]):
        if part:
            groups.append([(row["solver"], row["nfe"], [text(row, name) for name in columns]) for row in part])
    return groups


def _first_baseline(judged: Judgement, lead: str) -> Judgement | None:
    """The first baseline: its title, and `mean` and `sd` of the score that leads; None where there is none."""
    for name, scores in judged["baselines"].items():
        baseline = {"title": word(BASELINES, name).title, **scores}
        if lead in scores:
            baseline["mean"] = scores[lead]
            baseline["sd"] = scores[lead + ERROR]
        return baseline
    return None


def baselines(judged: Judgement, columns: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """A row for each baseline: its title, its meaning, its cells."""
    words = {name: word(BASELINES, name) for name in judged["baselines"]}
    return [(words[name].title, words[name].meaning, baseline_cells(judged, name, columns)) for name in words]


def baseline_cells(judged: Judgement, name: str, columns: Sequence[str]) -> list[str]:
    """The cells of a baseline in a table of the scores `columns`, "" where it lacks a score."""
    scores = judged["baselines"][name]
    lead = first_of(judged["results"][0])
    texts: list[str] = []
    for column in columns:
        if column == lead:
            texts.append(spread(scores["mean"], scores["sd"]))
        elif column in scores:
            texts.append(text(scores, column))
        else:
            texts.append("")
    return texts


def words_of(judged: Judgement, columns: Iterable[str]) -> list[Word]:
    """The titles and meanings of these scores."""
    return [judged["words"][name] for name in columns]


def shipped_results(protocol: MetricProtocol, data: Data) -> str | None:
    """The name of the packaged results that are of such data, if there are any."""
    if protocol.kind == "toy" and data.kind != "moons":
        return None
    return SHIPPED.get(protocol.kind)


def others(results: Row, judged: Judgement | None, step: int, cost: float) -> Row:
    """Packaged results as a row per objective, and the run's own if judged alike, the best in fewest passes first.

    Each row has a `name`, `steps`, `cost` of a step, and `lead` and `error` by number of passes. `times`: how often the
    cost of another's training, all of them equal, went into the run's. `unseen`: against how many images that they were
    not trained on the others are judged, if this run is not.
    """
    table = results["table"]
    first_cell = (results.get("cells") or [{}])[0]
    lead = next(name for name in MERITS if name in table[0])
    by_objective: dict[str, Row] = {}
    for row in table:
        name = str(next(iter(row.values())))
        ratio = row.get("velocity_ratio")
        if ratio is not None:
            name += f", velocity ratio {ratio:g}"
        shown = by_objective.setdefault(name, _row_of_others(name, row["steps"], row.get("F_per_step")))
        nfe = row.get("nfe", 1)
        shown["lead"][nfe] = row[lead]
        shown["error"][nfe] = row.get("error")
    passes = sorted({nfe for row in by_objective.values() for nfe in row["lead"]})

    is_alike = judged is not None and _is_judged_as(judged, first_cell, lead)
    if judged and is_alike:
        own = _row_of_others("this run", step, cost, own=True)
        for row in judged["results"]:
            nfe = row["nfe"]
            if nfe in passes:
                own["error"][nfe] = error(row, lead)
                if row.get(lead) is not None:
                    own["lead"][nfe] = row[lead]
        by_objective["this run"] = own

    cost_of_a_step = table[0].get("F_per_step")
    times = step * cost / (table[0]["steps"] * cost_of_a_step) if cost_of_a_step else None
    unseen = _held_out(first_cell)
    if unseen == _held_out(judged or {}):
        unseen = 0
    return {
        "title": results["title"],
        "origin": results.get("origin", {}),
        "word": word(MERITS, lead),
        "passes": passes,
        "rows": sorted(by_objective.values(), key=lambda row: [row["lead"].get(nfe, inf) for nfe in passes]),
        "alike": is_alike,
        "times": times,
        "unseen": unseen,
    }


def _is_judged_as(judged: Judgement, cell: Row, lead: str) -> bool:
    """Whether these weights were judged as the cell of packaged results was, by a score that may judge them."""
    return (
        judged["fresh"]
        and judged["protocol"] == cell.get("protocol")
        and lead in judged["results"][0]
        and lead not in judged["biased"]
    )


def _held_out(judged: Mapping[str, Any]) -> int:
    """How many images of the data were held out of training; 0 where the card does not say."""
    return (judged.get("card") or {}).get("data", {}).get("held", 0)


def _row_of_others(name: str, steps: int, cost: float | None, *, own: bool = False) -> Row:
    """A row of `others`, without its scores. `own`: it is the run's own."""
    return {"name": name, "steps": steps, "cost": cost, "own": own, "lead": {}, "error": {}}


def doubts(steps: int, step: int, judged: Judgement | None, near: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a reader must know first: a few words, and why. Nothing of a run that has made `steps` and is like its data.

    What an evaluation of these weights says of itself (`state`) goes before what the nearest images say.
    """
    warnings: list[tuple[str, str]] = []
    judged_state = judged.get("state") if judged and judged["fresh"] else None
    distances = [row["mean"] for row in near["rows"]] if near else []  # of samples, and of real images, to the nearest
    if step == 0:
        warnings.append(("Untrained", "these are the weights that training starts from."))
    elif judged_state in STATES:
        warnings.append((STATES[judged_state], "so its evaluation says."))
    elif len(distances) == 2 and distances[0] > FAR_FROM_NEAREST * distances[1]:
        times = number(distances[0] / distances[1])
        why = f"samples are {times} times as far from the nearest training image as real images are."
        warnings.append((STATES["far"], why))
    if step < steps:
        warnings.append((f"Stopped at step {step:,} of {steps:,}", "its training is not done."))
    return warnings
