"""Several runs in one table, if they were judged alike.

Two numbers may stand in one table if what measured them is the same (`MEASURED`); what made the samples, the weights,
the solver and its settings, may differ, for that is what is compared. A codec counts to the measure: who decodes in
another way shows other pixels for the same latent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dumo.evaluation.distance import Estimate, level
from dumo.evaluation.protocol import CLASS_MMD, rising
from dumo.report.card import FILE, Card, Row, first_of, read_report, seen
from dumo.runtime import typed
from dumo.types import UserError

MEASURED = (
    "protocol",
    "samples",
    "features",
    "features_sha256",
    "reference",
    "reference_sha256",
    "resize",
    "rounding",
    "codec",
    "seed",
)
OF_RUNS = ("codec", "seed")  # of how samples are made and decoded; of images that others made nobody knows


def differing(cards: Sequence[Card]) -> dict[str, list[Any]]:
    """What measured otherwise: the fields that are not the same on all cards, each with its value on every card."""
    measured = [_measured(one) for one in cards]
    fields = dict.fromkeys(field for one in measured for field in one)
    found = {field: [one.get(field) for one in measured] for field in fields}
    runs = [i for i, one in enumerate(cards) if "images" not in one]
    some = {field: [found[field][i] for i in runs] if field in OF_RUNS else values for field, values in found.items()}
    return {field: found[field] for field, values in some.items() if any(value != values[0] for value in values)}


def alike(cards: Mapping[str, Card]) -> None:
    """Refuse cards, by name, that were measured otherwise. Raises UserError with the fields side by side."""
    if differs := differing(list(cards.values())):
        lines = [f"{field}: {_side_by_side(cards, values)}" for field, values in differs.items()]
        raise UserError(
            "\n  ".join(["these were not measured alike, so no table holds them both:", *lines])
            + "\nJudge them alike, or print the table with what differs: --anyway"
        )


def compare(sources: Sequence[str], *, anyway: bool = False) -> dict[str, Any]:
    """The evaluations of runs' folders, or files of them, as `rows` of one table; and of each what is `perfect`.

    Images that others made go by their place, and have neither steps nor passes.
    `best` marks the least distance of each number of passes and those level with it: by `class_mmd` where all have it.
    A setting of the solver that differs, such as m, has a column, and scores that a run was trained on stand under
    `trained_on`, where there are any: they are no judges of it. Raises UserError where an evaluation is missing, or
    they were measured otherwise, with what differs; `anyway` has the table all the same, what differs in columns of
    their own, and in `differs` the whole of it.
    """
    reports = {source: read_report(_file(source), images=True) for source in sources}
    cards = {source: report["card"] for source, report in reports.items()}
    if not anyway:
        alike(cards)
    differs = differing(list(cards.values()))
    solvers = [one["solver"] for one in cards.values() if "solver" in one]
    settings = {name for solver in solvers for name in solver if name != "kind"}
    varied = [name for name in sorted(settings) if len({str(solver.get(name)) for solver in solvers}) > 1]
    rows, trained = list[Row](), any("trained_on" in one for one in cards.values())
    for i, (source, report) in enumerate(reports.items()):
        head = {
            "run": report.get("images", source),
            "step": report.get("step"),
            **{field: shortened(found[i]) for field, found in differs.items()},
        }
        own = {name: report["card"].get("solver", {}).get(name) for name in varied}
        on = {"trained_on": ", ".join(seen(report["results"][0], report["card"])) or None} if trained else {}
        rows += [head | own | scores | on for scores in report["results"]]
        rows += [head | dict.fromkeys(varied) | scores | on for scores in report.get("contrast", [])]
    by_class = all(CLASS_MMD in report["results"][0] for report in reports.values())
    rows = with_best(rows, CLASS_MMD if by_class else first_of(reports[sources[0]]["results"][0]))
    columns = dict.fromkeys(key for row in rows for key in row)
    return {
        "rows": [{key: row.get(key) for key in columns} for row in rows],
        "differs": {field: dict(zip(cards, found, strict=True)) for field, found in differs.items()},
        "perfect": {source: found for source, report in reports.items() if (found := perfect(report))},
    }


def with_best(rows: Sequence[Row], lead: str) -> list[Row]:
    """The rows, with `best`: the least of its number of passes, or level with it (`level`), where errors are known."""
    known = [row for row in rows if row.get(lead) is not None and row.get(f"{lead}_sd") is not None]
    best: set[int] = set()
    for nfe in {row.get("nfe") for row in known}:
        same = [row for row in known if row.get("nfe") == nfe]
        ties = level([Estimate(row[lead], row[f"{lead}_sd"]) for row in same])
        best |= {id(row) for row, tie in zip(same, ties, strict=True) if tie}
    return [row | ({"best": id(row) in best} if known and not rising(lead) else {}) for row in rows]


def perfect(report: Row) -> Row:
    """What a perfect sampler would have of a report's scores, by name, with spreads; {} where that is not known."""
    found: Row = report["baselines"].get("perfect", {})
    lead = first_of(report["results"][0])
    names: dict[str, str] = {"mean": lead, "sd": f"{lead}_sd"}
    return {names.get(key, key): value for key, value in found.items() if value is not None}


def shortened(value: object) -> str:
    """A value of a card in a table: hashes cut short."""
    return " ".join(word[:8] if len(word) == 64 else word for word in str(value).split())


def _side_by_side(cards: Mapping[str, Card], values: Sequence[Any]) -> str:
    """'0 in a, b; 1 in c'."""
    names: dict[str, list[str]] = {}
    for name, value in zip(cards, values, strict=True):
        names.setdefault(str(value), []).append(name)
    return "; ".join(f"{value} in {', '.join(which)}" for value, which in names.items())


def _measured(one: Card) -> Card:
    """What of a card is measure. Where the reference has no hash, the data are in its place."""
    found = {field: one[field] for field in MEASURED if field in one}
    if codec := found.get("codec"):
        found["codec"] = f"{codec['kind']} {codec['sha256']}"
    return found if "reference_sha256" in found else found | {"data": one.get("data")}


def _file(source: str) -> Path:
    """The evaluation that a run's folder holds, or the file itself. Raises UserError for neither."""
    path, wrong = Path(source), ""
    if not path.exists():
        wrong = f"there is no run's folder or evaluation {source}: give folders such as runs/digits"
    elif path.is_dir() and not (path / FILE).exists() and (others := sorted(map(str, path.glob("evaluation-*.json")))):
        way = f"name {' or '.join(others)}, or run dumo evaluate {typed(source)}"
        wrong = f"{source} was not judged as its own spec says: {way}"
    if wrong:
        raise UserError(wrong)
    return path / FILE if path.is_dir() else path
