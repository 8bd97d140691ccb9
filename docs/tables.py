"""Write the tables of measured numbers into the pages, from the files that hold what was measured.

    python docs/tables.py

A table stands between `<!-- table: zoo -->` and `<!-- end -->`. A test holds the pages to what this writes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dumo.config.load import load
from dumo.lab.plan import read_plan
from dumo.lab.ranking import ArmScore, best_arms, failed_seeds
from dumo.lab.table import from_cells, main_score

DOCS = Path(__file__).parent
MODELS = DOCS.parent / "src/dumo/trained"
TRAINED = ("mmd", "class_mmd")  # the scores that lead
SHIPPED = DOCS.parent / "src/dumo/recipes/results"  # which reports show, too
MEASURED = (SHIPPED, DOCS / "results", DOCS.parent / "tools", MODELS)
PLACE = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->)(?:(?!<!--).)*(?P<end><!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def grouped(results: Row, *keys: str) -> list[list[Row]]:
    """The rows that agree in these keys, one for each number of passes, in their order, with all spreads."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for stored, row in zip(results["table"], from_cells(results), strict=True):
        for score in ("fd", "fd_grey", "mmd", "class_mmd"):
            assert abs((stored.get(score) or 0) - (row.get(score) or 0)) < 1e-9, stored
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [*found.values()]


def at_budget(results: Row, budget: float) -> list[list[Row]]:
    """The rows of each arm at a budget."""
    return [own for own in grouped(results, "arm", "budget") if own[0]["budget"] == budget]


def by_arm(results: Row) -> list[list[Row]]:
    """The rows of each arm, by its first column; the nearest in its fewest passes first."""
    found = grouped(results, next(iter(results["table"][0])))
    score = main_score(found[0][0])
    return sorted(found, key=lambda own: (own[0]["nfe"], own[0][score]))


def spread(rows: list[Row], *keys: str, digits: int = 2) -> list[str]:
    """Mean and standard deviation over the seeds, if there are several, of each key in each row: they do not break."""
    found: list[str] = []
    for key in keys:
        for row in rows:
            sd = row[f"{key}_sd"]
            found.append(f"{row[key]:.{digits}f}" + ("" if sd is None else f"&nbsp;±&nbsp;{sd:.{digits}f}"))
    return found


def judged(arms: list[list[Row]], passes: tuple[int, ...]) -> list[list[str]]:
    """Of each arm the main score by number of passes, with its error; bold the best (`dumo.lab.ranking`).

    Of results from before errors were known the spread over seeds, and nothing bold.
    """
    score = main_score(arms[0][0])
    digits = 1 if score == "fd" else 2
    columns: list[list[str]] = []
    for nfe in passes:
        rows = [next((row for row in own if row["nfe"] == nfe), None) for own in arms]
        if "error" in arms[0][0]:
            columns.append(ranked(rows, score, digits))
        else:
            columns.append([spread([row], score, digits=digits)[0] if row else "" for row in rows])
    return [list(cells) for cells in zip(*columns, strict=True)]


def ranked(rows: list[Row | None], score: str, digits: int) -> list[str]:
    """A column: the score of each arm at one number of passes, bold the best; empty where it was not measured."""
    measured = {arm: row for arm, row in enumerate(rows) if row is not None}
    cells = [""] * len(rows)
    if not measured:
        return cells
    best = best_arms([ArmScore(by_seed(row, score), row["error"]) for row in measured.values()])
    for (arm, row), is_best in zip(measured.items(), best, strict=True):
        number = f"{row[score]:.{digits}f}&nbsp;±&nbsp;{row['error']:.{digits}f}".replace("-", "−")
        cells[arm] = f"**{number}**" if is_best else number
    return cells


def by_seed(row: Row, score: str) -> dict[str, float]:
    """A score of each seed of a row; without those that lack it."""
    return {seed: cell[score] for seed, cell in row["by_seed"].items() if cell.get(score) is not None}


def failures(arms: list[list[Row]]) -> list[str]:
    """How many seeds of each arm failed at one NFE, as "1 of 3"; empty where none did, or one NFE was not measured."""
    counts: list[str] = []
    for own in arms:
        row = own[0]
        score = main_score(row)
        failed = list[str]()
        if row["nfe"] == 1:
            accuracies = by_seed(row, "accuracy") if row["protocol"].startswith("cifar10") else {}
            failed = failed_seeds(by_seed(row, score), accuracies)
        counts.append(f"{len(failed)} of {row['seeds']}" if failed else "")
    return counts


def score_title(row: Row) -> str:
    """What a column of a row's main score is called."""
    return {"class_mmd": "kernel distance by class · 10³", "mmd": "kernel distance · 10³"}.get(main_score(row), "FD")


def with_failures(table: list[list[str]], counts: list[str]) -> Iterator[str]:
    """The lines of a table, its head first, with a last column of failed seeds where there are any."""
    head, *rows = table
    if any(counts):
        head = [*head, "failed seeds"]
        rows = [[*cells, count] for cells, count in zip(rows, counts, strict=True)]
    yield line(head)
    yield "|" + "---|" * len(head)
    yield from map(line, rows)


def line(cells: list[str]) -> str:
    """A row of a table."""
    return f"|{'|'.join(cells)}|"


def arms(results: Row) -> Iterator[str]:
    """Every arm: what a step costs, its main score at 1, 2 and 4 NFE, and its recall at one."""
    every, first = by_arm(results), next(iter(results["table"][0].values()))
    arms = read_plan(results["name"]).arms
    kinds = {arm.labels["objective"]: load(arm.recipe).objective.kind for arm in arms if "objective" in arm.labels}
    title = score_title(every[0][0])
    table = [["", "F", f"{title}, 1 NFE", "2", "4", "recall"]]
    for own, cells in zip(every, judged(every, (1, 2, 4)), strict=True):
        one, name = own[0], next(iter(own[0].values()))
        shown = f"[{name}](objectives/details.md#{kinds[name]})" if name in kinds else name
        costs = [f"**{shown}**" if name == first else shown, f"{one['F_per_step']:.2f}"]
        table.append([*costs, *cells, f"{one['recall']:.2f}" if one["nfe"] == 1 else ""])
    yield from with_failures(table, failures(every))


def tested(results: Row) -> Iterator[str]:
    """Every arm at its best rate, on test images: what a step costs, its main score at 1, 2 and 4 NFE."""
    every = grouped(results, "objective", "judged on")
    every = sorted((own for own in every if own[0]["judged on"] == "test images"), key=lambda own: own[0]["mmd"])
    table = [["", "rate", "F", "kernel distance · 10³, 1 NFE", "2", "4"]]
    for own, cells in zip(every, judged(every, (1, 2, 4)), strict=True):
        table.append([own[0]["objective"], f"{own[0]['rate']}", f"{own[0]['F_per_step']:.2f}", *cells])
    yield from with_failures(table, failures(every))


def front(results: Row) -> Iterator[str]:
    """Five of the arms at a budget of 1, the nearest in one pass first; and what a perfect sampler would have."""
    table = [["", "1 NFE", "2", "4", "50"]]
    names = {"dumo-best": "DuMo-Any, ours (`dumo-best`)", "the paper's recipe": "DuMo, the paper's recipe"}
    every = [own for own in at_budget(results, 1) if own[0]["arm"][0] != "+"]
    every.sort(key=lambda own: own[0][main_score(own[0])])
    counts = failures(every)
    for own, cells in zip(every, judged(every, (1, 2, 4, 50)), strict=True):
        arm = str(own[0]["arm"])
        table.append([names.get(arm, arm), *cells])
    is_by_class = main_score(every[0][0]) == "class_mmd"
    sds = [cell["baselines"]["perfect"]["class_mmd_sd" if is_by_class else "sd"] for cell in results["cells"]]
    mean_square = sum(sd**2 for sd in sds) / len(sds)
    error = (mean_square / every[0][0]["seeds"]) ** 0.5  # of a mean over folds
    table.append(["*a perfect sampler*", *[f"0.00&nbsp;±&nbsp;{error:.2f}"] * 4])
    counts.append("")
    yield from with_failures(table, counts)


def best(results: Row) -> Iterator[str]:
    """Arms at the largest budget, by number of passes; the best bold."""
    largest = max(row["budget"] for row in results["table"])
    every = at_budget(results, largest)
    title = score_title(every[0][0])
    table = [["", f"{title}, 1 NFE", "2", "4", "50", "recall"]]
    for own, scores in zip(every, judged(every, (1, 2, 4, 50)), strict=True):
        table.append([own[0]["arm"], *scores, f"{own[0]['recall']:.2f}"])
    yield from with_failures(table, failures(every))


def scaling(results: Row) -> Iterator[str]:
    """Every arm at 1, 2, 4 and 50 NFE: the main score by budget, and the power of the budget by which it changes."""
    budgets = sorted({row["budget"] for row in results["table"]})
    table = [["", "NFE", *(f"budget {n}" for n in budgets), "power"]]
    found: dict[tuple[str, int], dict[float, str]] = {}  # by budget; at 0 the slope
    for budget in budgets:
        every = at_budget(results, budget)
        for own, cells in zip(every, judged(every, (1, 2, 4, 50)), strict=True):
            for row, cell in zip(own, cells, strict=True):
                slope = f"{row['slope']:.2f}&nbsp;±&nbsp;{row['slope_error']:.2f}".replace("-", "−")
                found.setdefault((row["arm"], row["nfe"]), {0: slope})[budget] = cell
    failed = failures_by_budget(results, budgets)
    counts: list[str] = []
    for (arm, n), cells in found.items():
        table.append([arm if n == 1 else "", f"{n}", *(cells.get(b, "") for b in (*budgets, 0))])
        counts.append(failed[arm] if n == 1 else "")
    yield from with_failures(table, counts)


def failures_by_budget(results: Row, budgets: list[float]) -> dict[str, str]:
    """Of each arm its failed seeds at each budget, as "1 of 3 at 10"."""
    found: dict[str, list[str]] = {}
    for budget in budgets:
        every = at_budget(results, budget)
        for own, count in zip(every, failures(every), strict=True):
            of_arm = found.setdefault(own[0]["arm"], [])
            if count:
                of_arm.append(f"{count} at {budget:g}")
    return {arm: ", ".join(counts) for arm, counts in found.items()}


def by_budget(results: Row) -> Iterator[str]:
    """Every arm that ends with DuMo, by budget and number of passes; the best bold."""
    budgets, passes = sorted({row["budget"] for row in results["table"]}), (1, 2, 4)
    head = ["", *(f"budget {budget}, {n} NFE" if n == 1 else f"{n}" for budget in budgets for n in passes)]
    found: dict[str, list[str]] = {}
    for budget in budgets:
        every = [own for own in at_budget(results, budget) if "DuMo" in own[0]["arm"]]
        for own, cells in zip(every, judged(every, passes), strict=True):
            found.setdefault(own[0]["arm"], []).extend(cells)
    failed = failures_by_budget(results, budgets)
    rows = [[arm, *cells] for arm, cells in found.items()]
    yield from with_failures([head, *rows], [failed[arm] for arm in found])


def words(results: Row) -> Iterator[str]:
    """By words and by classes: distances, and those within a class by captions that were trained on and held out."""
    every = grouped(results, "data", "condition")
    table = [["", "by", "steps", "MFLOP per NFE", "FD, 1 NFE", "2", "recall", "class FD", "held out"]]
    for own in every:
        row, key = own[0], "fd" if own[0].get("fd_grey") is None else "fd_grey"
        cells = [row["data"], row["condition"], f"{row['steps']:,}", f"{row['MFLOP_per_pass']:.1f}"]
        apart = [f"{row[k]:.2f}" if row[k] else "" for k in ("recall", "class_fd", "class_fd_held")]
        table.append([*cells, *spread(own, key), *apart])
    yield from with_failures(table, failures(every))


def fair(results: Row) -> Iterator[str]:
    """Two heads and one, under the same timestep distributions: the main score at one and two NFE; the best bold."""
    heads = [f"{n}, {k}" for k in ("1 NFE", "2") for n in ("two heads", "one head")]
    yield line(["timesteps", "jumps", "on", "far, %", *heads])
    yield "|" + "---|" * 8
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    every = grouped(results, "law", "jumps", "rows", "heads", "metric")
    for own, cells in zip(every, judged(every, (1, 2)), strict=True):
        row = own[0]
        on = row["rows"] + (", MeanFlow's metric" if row["metric"] != "l2" else "")
        far = f"{100 * row['far']:.1f}" if row["far"] > 1e-4 else f"{100 * row['far']:.4f}"
        found.setdefault((row["law"], row["jumps"], on, far), {})[row["heads"]] = cells
    for arm, cells in found.items():
        yield line([*arm, *(cells.get(n, ["", ""])[k] for k in (0, 1) for n in ("two", "one"))])


def shares(results: Row) -> Iterator[str]:
    """Each objective's distance at one NFE by its share on the velocity, with the standard error."""
    is_moons = results["name"] == "fig3"
    share = "velocity_ratio" if is_moons else "share_on_velocity"
    found: dict[str, dict[float | None, str]] = {}
    for row in results["table"]:
        if is_moons:
            mean, error = 1000 * row["mmd2"], 1000 * row["mmd2_sd"] / row["seeds"] ** 0.5
        else:
            mean, error = row["class_mmd"], row["error"]
        found.setdefault(row["objective"], {})[row[share]] = f"{mean:.1f}&nbsp;±&nbsp;{error:.1f}"
    columns = sorted({column for cells in found.values() for column in cells if column is not None})
    if any(None in cells for cells in found.values()):
        columns.append(None)
    title = "MMD² · 10³" if is_moons else "kernel distance by class · 10³"
    yield line([title, *("none" if column is None else f"{column:g}" for column in columns)])
    yield "|" + "---|" * (1 + len(columns))
    for objective, cells in found.items():
        yield line([objective, *(cells.get(column, "") for column in columns)])


def kills(results: Row) -> Iterator[str]:
    """What came of the kills, by place and ranks."""
    yield line(["killed while", "one process: kills/starts", "two ranks"])
    yield "|" + "---|" * 3
    found: dict[str, list[str]] = {}
    for row in results["rows"]:
        end = f", {len(row['differs'])} numbers differ" if row["differs"] else ""
        found.setdefault(row["place"], []).append(f"{row['hits']}/{row['starts']}{end}")
    yield from (line([place, *cells]) for place, cells in found.items())


def memory(results: Row) -> Iterator[str]:
    """Host memory by mode and ranks: measured, and counted."""
    phases = ["start", "first step", "save", "step", "resume", "export"]
    yield line(["trained", "ranks", *phases])
    yield "|" + "---|" * (2 + len(phases))
    for mode, found in results.items():
        for ranks, row in found["ranks"].items():
            cells = [f"{row[name]['measured'] / 1e9:.2f}/{row[name]['dry'] / 1e9:.2f}" for name in phases]
            yield line([mode, ranks, *cells])


def trained(_: Row) -> Iterator[str]:
    """The models that come with dumo, each with a perfect sampler: the scores of `TRAINED`, by number of passes."""
    yield line(["model", "NFE", *(f"`{name}`" for name in TRAINED), "`recall`", "`accuracy`"])
    yield "|" + "---|" * (4 + len(TRAINED))
    for file in sorted(MODELS.glob("*/evaluation.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        for row in report["results"]:
            cells = [*spread([row], *TRAINED), f"{row['recall']:.2f}", f"{row['accuracy']:.3f}"]
            yield line([f"`{report['run']}`", str(row["nfe"]), *cells])
        perfect = report["baselines"]["perfect"]
        lead = spread([{"mmd": perfect["mean"], "mmd_sd": perfect["sd"]} | perfect], *TRAINED)
        yield line(["*a perfect sampler*", "", *lead, "", spread([perfect], "accuracy", digits=3)[0]])


TABLES = {
    "trained": ("evaluation", trained),
    "zoo": ("zoo", arms),
    "front": ("best", front),
    "best": ("best", best),
    "scaling": ("scaling", scaling),
    "flow-first": ("flow-first", by_budget),
    "words": ("words", words),
    "fair": ("fair", fair),
    "fig3": ("fig3", shares),
    "fig4a": ("fig4a", shares),
    "stages": ("stages", arms),
    "stages-latents": ("stages-latents", arms),
    "two-times": ("two-times", tested),
    "kills": ("kill", kills),
    "memory": ("memory", memory),
}  # by name: the file, and what is made of it


def origin_text(origin: Row) -> str:
    """How results were made: the command, the time it took, the machine, the commit and the day."""
    hours = f"{origin['training_hours']:.1f} hours of training on {origin['machine']}"
    return f"*`{origin['command']}`: {hours}; commit {origin['commit']}, {origin['date']}.*"


def written(page: str) -> str:
    """A page with its tables as the files have them."""

    def write(place: re.Match[str]) -> str:
        file, table = TABLES[place["name"]]
        found = sorted(place for folder in MEASURED for place in folder.glob(f"**/{file}.json"))
        results = json.loads(found[0].read_text(encoding="utf-8"))
        parts = [place["begin"], "\n".join(table(results))]
        if results.get("origin", {}).get("commit"):
            parts.append(origin_text(results["origin"]))
        return "\n\n".join([*parts, place["end"]])

    return PLACE.sub(write, page)


if __name__ == "__main__":
    for path in [DOCS.parent / "README.md", *DOCS.rglob("*.md")]:
        page = path.read_text(encoding="utf-8")
        if (new := written(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(path)
