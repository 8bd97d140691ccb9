"""Compare and format the scores of an evaluation.

A row is a dictionary with `nfe`, `solver`, the scores by name, and the standard deviation of each as NAME_sd. `verdict`
compares the best row with the baselines, and `mark_best` compares rows with each other. `dumo.evaluation.metric`
defines the scores by name, for example whether higher is better. The template report.html.j2 uses this module as
`score`.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import floor, log10
from typing import Any

from dumo.evaluation.estimate import Estimate, ties_with_least
from dumo.evaluation.metric import CLASS_MMD, METRICS, headline_score, higher_is_better, is_trained_on, metric
from dumo.evaluation.protocol import Scores
from dumo.report.evaluation_card import Card, Row

# mmd_sd is the standard deviation of mmd.
ERROR_SUFFIX = "_sd"
# The fields of a row that are not scores.
ROW_LABELS = ("nfe", "solver")
# The field of a baseline with the number of distances that are averaged.
NUM_SPLITS = "splits"
# The fields of a card that describe the reference and how samples are compared with it.
NOTED_FIELDS = ("reference", CLASS_MMD, "copies", "kid")

# Distances above which samples count as untrained or as far from the data (our choice).
UNTRAINED_SHARE_OF_NOISE = 1 / 2
FAR_SHARE_OF_NOISE = 1 / 20
# The same without a noise baseline: a multiple of a perfect sampler's distance, and a precision.
FAR_TIMES_PERFECT = 20
MAX_UNTRAINED_PRECISION = 0.02

# Names of baselines in a report, and their names in the terminal.
TERMINAL_BASELINES = {
    "perfect": "a perfect sampler",
    "null": "a perfect sampler",
    "noise": "noise",
    "captions": "real images with their captions",
    "others": "real images with other captions",
}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# The scores of a row


def is_error(name: str) -> bool:
    """Return whether `name` is the name of an error, such as mmd_sd, instead of a score."""
    return name.endswith(ERROR_SUFFIX)


def error(row: Mapping[str, Any], name: str) -> float | None:
    """Return the error of a score in a row, or None if it is unknown."""
    return row.get(name + ERROR_SUFFIX)


def first_score(row: Mapping[str, Any]) -> str:
    """Return the name of a row's first score. A baseline stores this score as `mean` and its error as `sd`."""
    return next(name for name in row if name not in ROW_LABELS)


def score_names(row: Mapping[str, Any], card: Card | None = None) -> list[str]:
    """Return the names of the scores in a row, without errors, with the main score first.

    A score that the run of this card was trained on cannot be the main score.
    """
    names: list[str] = []
    for name, value in row.items():
        is_number = value is None or isinstance(value, int | float)
        if is_number and name != "nfe" and not is_error(name):
            names.append(name)
    lead = headline_score(names, card)
    return [lead, *(name for name in names if name != lead)]


def trained_on_names(row: Mapping[str, Any], card: Card) -> list[str]:
    """Return the names of the scores in a row that the run of this card was trained on."""
    names = [name for name, value in row.items() if isinstance(value, float) and not is_error(name)]
    return [name for name in names if is_trained_on(name, card)]


def summary_names(columns: Sequence[str]) -> list[str]:
    """Return the columns of a summary: the first, which is the main score, summary metrics and custom metrics."""
    names: list[str] = []
    for i, name in enumerate(columns):
        if i == 0 or metric(name).in_summary or name not in METRICS:
            names.append(name)
    return names


def select_scores(row: Mapping[str, Any], columns: Sequence[str]) -> Row:
    """Return a row or a baseline with only the scores `columns` and their errors, in the order of `columns`."""
    selected = {name: row[name] for name in ROW_LABELS if name in row}
    for column in columns:
        for name in (column, column + ERROR_SUFFIX):
            if name in row:
                selected[name] = row[name]
    return selected


# Better and worse


def perfect_sampler(baselines: Mapping[str, Any]) -> Scores | None:
    """Return a perfect sampler's scores from the baselines of an evaluation, or None if they are missing."""
    return baselines.get("perfect") or baselines.get("null")


def verdict(rows: Sequence[Mapping[str, Any]], baselines: Mapping[str, Scores]) -> str | None:
    """Return a sentence that compares the best row with the baselines of an evaluation.

    Samples are indistinguishable from a perfect sampler's if neither the first score nor any score that `can_reject`
    (`dumo.evaluation.metric`), such as `class_mmd`, is more than two standard deviations worse. Otherwise they are
    close to or far from the data, depending on the distance of noise, or on a multiple of a perfect sampler's distance
    if noise was not measured.

    Return None without a perfect sampler's score, or if higher values of the first score are better.
    """
    perfect = perfect_sampler(baselines)
    noise = baselines.get("noise")
    scores = _best_scores(rows)
    if not perfect or not scores or higher_is_better(first_score(scores)):
        return None
    lead = first_score(scores)
    limit = perfect["mean"] + 2 * perfect["sd"]
    rejecting = [name for name, kind in METRICS.items() if kind.can_reject and name in scores]
    rejecting = [name for name in rejecting if error(perfect, name) is not None]
    worse = [name for name in rejecting if _excess(scores, perfect, name) > 2 * perfect[name + ERROR_SUFFIX]]
    if scores[lead] > limit:
        worse = [lead, *worse]
    if not worse:
        names = ", ".join(dict.fromkeys([lead, *rejecting]))
        return f"Indistinguishable from a perfect sampler: at most two standard deviations worse in {names}."

    reason = f"worse than a perfect sampler in {', '.join(worse)}"
    if noise:
        is_far = scores[lead] > FAR_SHARE_OF_NOISE * noise["mean"]
        if scores[lead] >= UNTRAINED_SHARE_OF_NOISE * noise["mean"]:
            return f"Looks untrained: {lead} is {number(scores[lead])}, and {number(noise['mean'])} for noise."
        if CLASS_MMD in noise and scores.get(CLASS_MMD, 0.0) > FAR_SHARE_OF_NOISE * noise[CLASS_MMD] and not is_far:
            is_far = True
            reason = (
                f"the samples do not show the requested classes. {CLASS_MMD} is {number(scores[CLASS_MMD])}, and "
                f"{score_text(perfect, CLASS_MMD)} for a perfect sampler"
            )
    else:
        is_far = scores[lead] > FAR_TIMES_PERFECT * (abs(perfect["mean"]) + 2 * perfect["sd"])
        if is_far and scores.get("precision", 1.0) <= MAX_UNTRAINED_PRECISION:
            return f"Looks untrained: {reason}."
    return f"{'Far from the data' if is_far else 'Close to the data, but distinguishable'}: {reason}."


def _best_scores(rows: Sequence[Mapping[str, Any]]) -> Scores:
    """Return the scores and errors of the row with the lowest `class_mmd`, or first score if a row has no `class_mmd`.

    Return {} if no row has scores.
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
    return min(rows_of_scores, key=lambda scores: scores[first_score(scores)])


def _excess(scores: Scores, perfect: Scores, name: str) -> float:
    """Return by how much a score is worse than a perfect sampler's."""
    excess = scores[name] - perfect[name]
    better = metric(name).better
    if better == "higher":
        return -excess
    return abs(excess) if better == "equal" else excess


def mark_best(rows: Sequence[Row], lead: str) -> list[Row]:
    """Add `best` to each row: whether its score `lead` is the lowest at its NFE, or not significantly worse.

    Rows without an NFE, such as existing images, are compared with all rows. Rows without the score or its error are
    not best. No row gets the field if no row has both, if higher scores are better, or if its `sd` is a spread
    rather than a standard error.
    """
    if higher_is_better(lead) or metric(lead).sd_is_spread:
        return list(rows)
    comparable = [i for i, row in enumerate(rows) if row.get(lead) is not None and error(row, lead) is not None]
    if not comparable:
        return list(rows)
    is_best = [False] * len(rows)
    for nfe in {rows[i].get("nfe") for i in comparable}:
        rivals = comparable
        if nfe is not None:
            rivals = [i for i in comparable if rows[i].get("nfe") == nfe]
        ties = ties_with_least([Estimate(rows[i][lead], rows[i][lead + ERROR_SUFFIX]) for i in rivals])
        for i, is_tied in zip(rivals, ties, strict=True):
            if rows[i].get("nfe") == nfe:  # rows with another NFE are marked among their own
                is_best[i] = is_tied
    return [row | {"best": best} for row, best in zip(rows, is_best, strict=True)]


# Baselines


def baselines_by_name(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the baselines of an evaluation, with `mean` and `sd` renamed to the first score and its error."""
    lead = first_score(evaluation["results"][0])
    new_names: dict[str, str] = {"mean": lead, "sd": lead + ERROR_SUFFIX}
    baselines: Mapping[str, Mapping[str, float]] = evaluation["baselines"]
    renamed: dict[str, dict[str, float]] = {}
    for baseline, scores in baselines.items():
        renamed[baseline] = {new_names.get(name, name): value for name, value in scores.items()}
    return renamed


def has_too_few_images(evaluation: Mapping[str, Any]) -> bool:
    """Return whether there were too few images to compute a perfect sampler's scores."""
    lead = first_score(evaluation["results"][0])
    return not evaluation["baselines"] and metric(lead).needs_many_images


# As text


def number(value: object) -> str:
    """Return a number to three significant digits, with an exponent only if it is very small or large.

    None and NaN become a dash. Other values are converted with `str`.
    """
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


def abbreviate(value: float | int) -> str:
    """Return a number to three significant digits, with the suffix k, M, G or T."""
    if value < 1000:
        return number(value)
    power = min(4, floor(log10(value) / 3))
    return f"{number(value / 1000**power)}\u00a0{'kMGT'[power - 1]}"


def spread(value: float | None, deviation: float | None) -> str:
    """Return a number with its deviation, both to two significant digits of the deviation: 1.30 ± 0.12."""
    if value is None or not deviation or deviation < 0:
        return number(value)
    digits = max(0, 1 - floor(log10(deviation)))
    return f"{value:.{digits}f} ± {deviation:.{digits}f}".replace("-", "−")


def score_text(row: Mapping[str, Any], name: str) -> str:
    """Return the score `name` of a row, or of a baseline, with its error."""
    return spread(row.get(name), error(row, name))


def card_notes(card: Card) -> dict[str, str]:
    """Return the fields of the card that describe how the scores were measured."""
    # The labels of a run's samples are determined by its protocol.
    fields = [*NOTED_FIELDS, "labels"] if "images" in card else NOTED_FIELDS
    return {field: card[field] for field in fields if field in card}


def terminal_lines(evaluation: Mapping[str, Any], columns: Sequence[str] | None) -> Iterator[str]:
    """Yield the lines below the table of an evaluation: baselines, biased scores, notes and the verdict.

    `columns` selects the scores of the baselines; None means all.
    """
    first_row = evaluation["results"][0]
    card = evaluation.get("card") or {}
    for name, scores in baselines_by_name(evaluation).items():
        shown_scores = scores if columns is None else select_scores(scores, columns)
        if shown_scores:
            yield f"{TERMINAL_BASELINES.get(name, name)}: {terminal_text(shown_scores)}"
    if has_too_few_images(evaluation):
        yield f"{TERMINAL_BASELINES['perfect']}: unknown, because there are too few images"
    biased_names = trained_on_names(first_row, card)
    if biased_names:
        yield f"biased, because the run was trained on the features of these scores: {', '.join(biased_names)}"
    for field, text in card_notes(card).items():
        yield f"{field}: {text}"
    sentence = verdict(evaluation["results"], evaluation["baselines"])
    if sentence:
        yield sentence


def terminal_text(baseline: Mapping[str, float]) -> str:
    """Return the scores of a baseline with their errors in one line (`baselines_by_name`)."""
    texts: list[str] = []
    for name, value in baseline.items():
        if name == NUM_SPLITS or is_error(name):
            continue
        value_text = f"{name} {value:.3g}"
        deviation = error(baseline, name)
        if deviation is not None:
            value_text += f" ± {deviation:.2g}"
        texts.append(value_text)
    return ", ".join(texts)
