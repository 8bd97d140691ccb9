"""What was measured of a run, set out: its scores, the baselines, other objectives, and what a reader must know.

One number leads: of digits the one that a PNG holds (`dumo.evaluation.protocol.headline`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import floor, log10
from pathlib import Path
from typing import Any

from dumo.config.word import BASELINES, MERITS, STATES, Word, merits, word
from dumo.data import Data
from dumo.evaluation import MetricProtocol
from dumo.evaluation.protocol import CLASS_MMD, headline
from dumo.io.read import read_json
from dumo.report.card import apart, best_scores, checked, first_of, is_as_perfect, is_far, lacks_classes, seen
from dumo.runtime import typed

FAR_OFF = 1.5  # times the distance of real images to their nearest, beyond which samples are not like them; ours:
# on digits 4.1 after 20 steps, 1.9 after 500, 1.2 after 5,000
SHIPPED = {"digits": "zoo", "toy": "fig3", "cifar10-features": "latents"}  # protocol: packaged results that are of it
SUMMARY = (CLASS_MMD, "recall", "copies", "nearest")  # next to the score that leads. Precision praises noise, too
DISTANCES = ("fd", "fd_grey", "fid", "kid", "mmd")  # from data of which there may be too few
BENCHMARKS = ("clip",)  # evaluations other than the run's own that a page shows

Table = dict[str, Any]


def judgement(folder: Path, step: int, weights: str) -> Table | None:
    """What `dumo evaluate` wrote in a run's folder, or None.

    `fresh`: of these weights; `columns`: its figures, the one that leads first, and `summary`, some of them; `verdict`:
    a sentence; `left_out`: which classes do not count, if any. Raises UserError if it is damaged.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    way_out = f"run dumo evaluate {typed(folder)} again"
    found = checked(read_json(path, way_out), path, way_out)
    about = found.get("card") or {}
    columns = figures(found["results"][0], about)
    fresh = (found["step"], found["weights"]) == (step, weights)
    biased = seen(found["results"][0], about)
    words = {
        key: replace(of, better=f"{of.better}; trained on") if key in biased else of
        for key, of in merits(columns).items()
    }
    baseline = first(found, columns[0])
    return {
        **found,
        "columns": columns,
        "summary": summary(columns),
        "verdict": verdict(found),
        "left_out": about.get(CLASS_MMD),
        "fresh": fresh,
        "words": words,
        "biased": biased,
        "baseline": baseline,
    }


def benchmarks(folder: Path, step: int, weights: str) -> list[Table]:
    """What CLIP said of these weights, each with its `words` and `rows`.

    Raises UserError where a file is damaged.
    """
    found: list[Table] = []
    for path in sorted(folder.glob("evaluation-*.json")):
        if path.name.split("-")[1] in BENCHMARKS:
            way_out = f"remove it, or run dumo evaluate {typed(folder)} again"
            one = checked(read_json(path, way_out), path, way_out)
            if (one["step"], one["weights"]) == (step, weights):
                one["columns"] = figures(one["results"][0])
                found.append({**one, "words": merits(one["columns"]), "rows": rows(one, one["columns"])})
    return found


def figures(row: Mapping[str, Any], card: Mapping[str, Any] | None = None) -> list[str]:
    """The scores in a row: its numbers, spreads left out; first the one that leads, for a run of this card."""
    found = [
        key
        for key, value in row.items()
        if key != "nfe" and not key.endswith("_sd") and (value is None or isinstance(value, int | float))
    ]
    lead = headline(found, card)
    return [lead, *(key for key in found if key != lead)]


def summary(columns: Sequence[str]) -> list[str]:
    """Of the scores of a row, the one that leads being the first, those that a summary shows.

    What has no words here stays.
    """
    return [key for i, key in enumerate(columns) if i == 0 or key in SUMMARY or key not in MERITS]


def shortened(found: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """A row, or a baseline, with these scores alone and their spreads, in their order."""
    scores = [end for key in columns for end in (key, f"{key}_sd") if end in found]
    heads = [key for key in ("nfe", "solver") if key in found]
    return {key: found[key] for key in (*heads, *scores)}


def by_name(judged: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The baselines, with the first score by its name in place of `mean` and `sd`."""
    lead = first_of(judged["results"][0])
    names: dict[str, str] = {"mean": lead, "sd": f"{lead}_sd"}
    baselines: Mapping[str, Mapping[str, float]] = judged["baselines"]
    named: dict[str, dict[str, float]] = {}
    for baseline, scores in baselines.items():
        named[baseline] = {names.get(key, key): value for key, value in scores.items()}
    return named


def verdict(judged: Mapping[str, Any]) -> str | None:
    """One sentence on where a run, or images, stand, by the `state` of an evaluation; None where it has none."""
    state = judged.get("state")
    scores = best_scores(judged["results"])
    baselines = judged["baselines"]
    real = baselines.get("perfect") or baselines.get("null")
    noise = baselines.get("noise")
    if state is None or not scores or not real:
        return None
    lead = first_of(scores)
    if state == "like the data":
        return "Like the data: no score is over two deviations worse than a perfect sampler's."
    if state == "untrained" and noise:
        return f"{STATES[state]}: {lead} is {number(scores[lead])}, of noise {number(noise['mean'])}."
    if state == "far" and noise and not is_far(scores[lead], noise) and lacks_classes(scores, noise):
        perfect = spread(real.get(CLASS_MMD), real.get(f"{CLASS_MMD}_sd"))
        return (
            f"{STATES[state]}: images do not show the classes that they were asked for. {CLASS_MMD} is "
            f"{number(scores[CLASS_MMD])}, of a perfect sampler {perfect}."
        )
    worse = apart(scores, real)
    if not is_as_perfect(scores[lead], real):
        worse = [lead, *worse]
    begin = STATES.get(str(state), "Near the data, but not like them")
    return f"{begin}: worse than a perfect sampler by {', '.join(worse)}."


def first(judged: Table, lead: str) -> Table | None:
    """The first baseline: its name, and `mean` and `sd` of the score that leads; None where there is none."""
    for name, value in judged["baselines"].items():
        of = {"mean": value[lead], "sd": value[f"{lead}_sd"]} if lead in value else {}
        return {"title": word(BASELINES, name).title, **value, **of}
    return None


def too_few(judged: Mapping[str, Any]) -> bool:
    """Whether there were too few images to say what a perfect sampler would have."""
    row = judged["results"][0]
    return not judged["baselines"] and first_of(row) in DISTANCES


def cells(judged: Table, name: str, columns: Sequence[str]) -> list[str]:
    """A baseline as a row of a table of these scores, blank where it does not say."""
    found = judged["baselines"][name]
    known = {key: (found[key], found.get(f"{key}_sd")) for key in found if key in columns}
    known[first_of(judged["results"][0])] = found["mean"], found["sd"]
    return [spread(*known[key]) if key in known else "" for key in columns]


def shipped(protocol: MetricProtocol, data: Data) -> str | None:
    """The name of the packaged results that are of such data, if there are any."""
    return SHIPPED.get(protocol.kind) if protocol.kind != "toy" or data.kind == "moons" else None


def others(results: Table, judged: Table | None, step: int, cost: float) -> Table:
    """Packaged results as a row per objective, and the run's own if judged alike, the best in fewest passes first.

    Each row has a `name`, `steps`, `cost` of a step, and `lead` and `error` by number of passes. `times`: how often the
    cost of another's training, all of them equal, went into the run's. `unseen`: against how many images that they were
    not trained on the others are judged, if this run is not.
    """
    table, cell = results["table"], (results.get("cells") or [{}])[0]
    score = next(key for key in MERITS if key in table[0])
    rows: dict[str, Table] = {}
    for row in table:
        ratio, name = row.get("velocity_ratio"), str(next(iter(row.values())))
        name += f", velocity ratio {ratio:g}" if ratio is not None else ""
        one = rows.setdefault(name, _row(name, row["steps"], row.get("F_per_step")))
        one["lead"][row.get("nfe", 1)] = row[score]
        one["error"][row.get("nfe", 1)] = row.get("error")
    alike = bool(
        judged
        and judged["fresh"]
        and judged["protocol"] == cell.get("protocol")
        and score in judged["results"][0]
        and score not in judged["biased"]
    )
    passes = sorted({n for row in rows.values() for n in row["lead"]})
    if judged and alike:
        own = _row("this run", step, cost, own=True)
        for row in (row for row in judged["results"] if row["nfe"] in passes):
            own["lead"] |= {row["nfe"]: row[score]} if row.get(score) is not None else {}
            own["error"][row["nfe"]] = row.get(f"{score}_sd")
        rows["this run"] = own
    found = sorted(rows.values(), key=lambda row: [row["lead"].get(n, float("inf")) for n in passes])
    return {
        "title": results["title"],
        "origin": results.get("origin", {}),
        "word": word(MERITS, score),
        "passes": passes,
        "rows": found,
        "alike": alike,
        "times": step * cost / (table[0]["steps"] * each) if (each := table[0].get("F_per_step")) else None,
        "unseen": held if (held := _held(cell)) != _held(judged or {}) else 0,
    }


def _held(judged: Mapping[str, Any]) -> int:
    return (judged.get("card") or {}).get("data", {}).get("held", 0)


def _row(name: str, steps: int, cost: float | None, *, own: bool = False) -> Table:
    return {"name": name, "steps": steps, "cost": cost, "own": own, "lead": {}, "error": {}}


def doubts(steps: int, step: int, judged: Table | None, near: Table | None) -> list[tuple[str, str]]:
    """What a reader must know first: a few words, and why. Nothing of a run that has made `steps` and is like its data.

    What an evaluation of these weights says of itself (`state`) goes before what the nearest images say.
    """
    found: list[tuple[str, str]] = []
    state = judged.get("state") if judged and judged["fresh"] else None
    distances = [row["mean"] for row in near["rows"]] if near else []
    if step == 0:
        found.append(("Untrained", "these are the weights that training starts from."))
    elif state in STATES:
        found.append((STATES[state], "so its evaluation says."))
    elif len(distances) == 2 and distances[0] > FAR_OFF * distances[1]:
        said = f"samples are {number(distances[0] / distances[1])} times as far from the nearest training image"
        found.append((STATES["far"], f"{said} as real images are."))
    if step < steps:
        found.append((f"Stopped at step {step:,} of {steps:,}", "its training is not done."))
    return found


def baselines(judged: Table, columns: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """A row per baseline: its name, what it is, its cells."""
    words = {name: word(BASELINES, name) for name in judged["baselines"]}
    return [(words[name].title, words[name].meaning, cells(judged, name, columns)) for name in words]


def words_of(judged: Table, columns: Iterable[str]) -> list[Word]:
    """The words for these scores."""
    return [judged["words"][key] for key in columns]


def rows(judged: Table, columns: Sequence[str]) -> Sequence[Sequence[tuple[str, int, list[str]]]]:
    """The results and the contrast, each with its solver, passes and cells."""
    return [
        [(row["solver"], row["nfe"], [spread(row.get(k), row.get(f"{k}_sd")) for k in columns]) for row in of]
        for of in (judged["results"], judged["contrast"])
        if of
    ]


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
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10**power:.2f}".replace("-", "−") + f" · 10{raised}"


def large(value: float | int) -> str:
    """Three significant digits and k, M, G or T for a power of a thousand."""
    power = min(4, floor(log10(value) / 3)) if value >= 1000 else 0
    return f"{number(value / 1000**power)}\u00a0{'kMGT'[power - 1]}" if power else number(value)


def spread(value: float | None, sd: float | None) -> str:
    """A number with its spread, to two digits of the spread."""
    if value is None or not sd or sd < 0:
        return number(value)
    digits = max(0, 1 - floor(log10(sd)))
    return f"{value:.{digits}f} ± {sd:.{digits}f}".replace("-", "−")
