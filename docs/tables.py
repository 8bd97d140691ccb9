"""Write the tables of measured numbers into the pages, from the results that `dumo reproduce` stored.

    python docs/tables.py

A table stands between `<!-- table: zoo -->` and `<!-- end -->`; `with_tables` replaces what is there. A test fails if a
page differs from this output. `TABLES` has, by the table's name, the file of its results and the function that makes a
`Table`. Each function groups the rows of the file by arm and writes their scores with errors. Bold are the best arm and
those that are neither significantly worse nor more than a quarter behind; nothing is bold if the standard error of the
best exceeds a quarter of its mean.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum, hypot, log
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any

from dumo.config.load import load
from dumo.lab.experiment import read_plan
from dumo.lab.ranking import ArmScore, is_tied
from dumo.lab.result_table import average_rows, error_of_mean, main_score, rows_of_all_nfes

DOCS = Path(__file__).parent
MODELS = DOCS.parent / "src/dumo/trained"
RESULT_FOLDERS = (DOCS / "results", DOCS.parent / "tools", MODELS)
PLACE = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->)(?:(?!<!--).)*(?P<end><!-- end -->)", re.DOTALL)
SCORES = ("fd", "mmd", "class_mmd")
TRAINED_SCORES = ("mmd", "class_mmd")  # of the bundled models
SCORE_TITLES = {"class_mmd": "kernel distance by class · 10³"}
# The tables of README: by plan, the budget, and how README calls an arm.
FRONT_BUDGETS = {"best": 1, "scaling": 10}
FRONT_NAMES = {
    "best": {
        "dumo-best": "DuMo-Any, our settings (`dumo-best`)",
        "DuMo, untuned": "DuMo, the paper's loss (`digits`)",
    },
    "scaling": {
        "DuMo": "DuMo, our settings (`dumo-best-latents`)",
        "DuMo, untuned": "DuMo, the paper's loss (`cifar10-latents`)",
    },
}
# The largest standard error of an arm that may be called best, over its mean, and the largest difference of its mean
# from the best one, over the best. An arm with a large error would be called best because nothing tells it apart.
TOLERANCE = 0.25
# A seed has failed if its distance exceeds FAILED_RATIO times the median of its arm, or if, on CIFAR-10, the bundled
# classifier recognizes less than MIN_ACCURACY of its samples.
FAILED_RATIO = 1.5
MIN_ACCURACY = 0.6
Results = dict[str, Any]  # a file of results
Row = dict[str, Any]  # of its table: means over the seeds of an arm, at one number of passes
ArmRows = list[Row]  # the rows of an arm, by number of passes
Point = tuple[float, float, float]  # budget, distance and the standard error of the distance


# --------------------------------------------------------------------------------------------------- tables, as text


@dataclass
class Table:
    """A Markdown table."""

    head: list[str]
    rows: list[list[str]] = field(default_factory=list[list[str]])
    failed: list[str] = field(default_factory=list[str])  # by row, how many seeds failed, as "1 of 3"; "": none

    def add(self, *cells: str, failed: str = "") -> None:
        """Add a row."""
        self.rows.append([*cells])
        self.failed.append(failed)

    def lines(self) -> Iterator[str]:
        """Yield the Markdown lines, with a last column for failed seeds if there are any."""
        has_failures = any(self.failed)
        head = [*self.head, "failed seeds"] if has_failures else self.head
        yield _line(head)
        yield "|" + "---|" * len(head)
        for cells, failed in zip(self.rows, self.failed, strict=True):
            yield _line([*cells, failed] if has_failures else cells)


def _line(cells: Sequence[str]) -> str:
    """Return a row of a table as Markdown."""
    return f"|{'|'.join(cells)}|"


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    """Return a number and its error without line breaks between them; None means that there is no error."""
    if error is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f}&nbsp;±&nbsp;{error:.{digits}f}"


def with_minus(text: str) -> str:
    """Replace hyphens by minus signs."""
    return text.replace("-", "−")


# ---------------------------------------------------------------------------------------------------- arms and scores


def from_cells(stored: Results) -> list[Row]:
    """Make the table of results.json again from its stored cells, with two further columns.

    `by_seed` has the row of each cell by its seed, and `protocol` what evaluated them.
    """
    cells_by_arm: dict[str, dict[str, Row]] = {}
    for cell in stored["cells"]:
        arm, _, seed = cell["cell"].rpartition("-")
        cells_by_arm.setdefault(arm, {})[seed] = cell
    rows: list[Row] = []
    for cells in cells_by_arm.values():
        protocol = next(iter(cells.values()))["protocol"]
        rows_of_seeds = [rows_of_all_nfes(cell) for cell in cells.values()]
        for rows_of_passes in zip(*rows_of_seeds, strict=True):
            by_seed = dict(zip(cells, rows_of_passes, strict=True))
            rows.append({**average_rows(rows_of_passes), "by_seed": by_seed, "protocol": protocol})
    return [stored_row | row for stored_row, row in zip(stored["table"], rows, strict=True)]


def group_by_arm(results: Results, *columns: str) -> list[ArmRows]:
    """Group the rows of results by arm, in order; rows that agree in these columns belong to the same arm."""
    arms: dict[tuple[Any, ...], ArmRows] = {}
    for stored_row, row in zip(results["table"], from_cells(results), strict=True):
        for score in SCORES:
            assert abs((stored_row.get(score) or 0) - (row.get(score) or 0)) < 1e-9, stored_row
        arms.setdefault(tuple(row[column] for column in columns), []).append(row)
    return list(arms.values())


def arms_at_budget(results: Results, budget: float) -> list[ArmRows]:
    """Return the arms at one budget."""
    return [arm for arm in group_by_arm(results, "arm", "budget") if arm[0]["budget"] == budget]


def budgets_of(results: Results) -> list[float]:
    """Return the budgets of results in ascending order."""
    return sorted({row["budget"] for row in results["table"]})


def score_title(arm: ArmRows) -> str:
    """Return the column title for the main score of an arm."""
    return SCORE_TITLES[main_score(arm[0])]


def score_cells(arms: Sequence[ArmRows], passes: Sequence[int]) -> list[list[str]]:
    """Return the main score of each arm at each NFE with its error; the best are bold."""
    columns = [_score_column(arms, nfe) for nfe in passes]
    return [list(cells) for cells in zip(*columns, strict=True)]


def _score_column(arms: Sequence[ArmRows], nfe: int) -> list[str]:
    """Return the main score of each arm at one NFE, or an empty string if it was not measured."""
    score = main_score(arms[0][0])
    rows: dict[int, Row] = {}  # by index of the arm
    for number, arm in enumerate(arms):
        for row in arm:
            if row["nfe"] == nfe:
                rows[number] = row

    cells = [""] * len(arms)
    best = best_arms([ArmScore(score_by_seed(row, score), row["error"]) for row in rows.values()])
    for (number, row), is_best in zip(rows.items(), best, strict=True):
        cell = with_minus(with_error(row[score], row["error"]))
        cells[number] = f"**{cell}**" if is_best else cell
    return cells


def best_arms(arms: Sequence[ArmScore]) -> list[bool]:
    """Whether each arm is the best one, or neither significantly worse nor far behind, and known to TOLERANCE.

    If the best arm is not known so well, none counts as best: a worse arm with a smaller error would seem to win.
    """
    best = min(arms, key=lambda arm: arm.mean)
    if not _is_precise(best):
        return [False] * len(arms)
    return [_is_precise(arm) and arm.mean <= (1 + TOLERANCE) * best.mean and is_tied(arm, best) for arm in arms]


def _is_precise(arm: ArmScore) -> bool:
    """Return whether the standard error is within TOLERANCE of the mean."""
    return arm.error <= TOLERANCE * arm.mean


def score_by_seed(row: Row, score: str) -> dict[str, float]:
    """Return a score by seed, without seeds that lack it."""
    scores: dict[str, float] = {}
    for seed, cell in row["by_seed"].items():
        if cell.get(score) is not None:
            scores[seed] = cell[score]
    return scores


def failed_counts(arms: Sequence[ArmRows]) -> list[str]:
    """Return the failed seeds of each arm at one NFE, as "1 of 3", or "" if none failed or one NFE was not measured."""
    return [_failed_count(arm[0]) for arm in arms]


def _failed_count(row: Row) -> str:
    """Return the failed seeds in an arm's first row, as in `failed_counts`."""
    if row["nfe"] != 1:
        return ""
    judges_classes = row["protocol"].startswith("cifar10")
    accuracies = score_by_seed(row, "accuracy") if judges_classes else {}
    failed = failed_seeds(score_by_seed(row, main_score(row)), accuracies)
    return f"{len(failed)} of {row['seeds']}" if failed else ""


def failed_seeds(distances: Mapping[str, float], accuracies: Mapping[str, float]) -> list[str]:
    """The seeds of an arm that have failed at one NFE, by their distances and accuracies.

    `accuracies` is empty if accuracy does not count. Nor does it count if most seeds are below MIN_ACCURACY: then the
    arm has not learned the classes yet.
    """
    max_distance = FAILED_RATIO * median(distances.values())
    counts_accuracy = bool(accuracies) and median(accuracies.values()) >= MIN_ACCURACY
    failed: list[str] = []
    for seed, distance in distances.items():
        is_wrong = counts_accuracy and accuracies[seed] < MIN_ACCURACY
        if distance > max_distance or is_wrong:
            failed.append(seed)
    return failed


def failed_counts_by_arm(results: Results) -> dict[str, str]:
    """Return the failed seeds of each arm at all budgets, as "1 of 3 at 10"."""
    counts: dict[str, list[str]] = {}
    for budget in budgets_of(results):
        arms = arms_at_budget(results, budget)
        for arm, count in zip(arms, failed_counts(arms), strict=True):
            counts_of_arm = counts.setdefault(arm[0]["arm"], [])
            if count:
                counts_of_arm.append(f"{count} at {budget:g}")
    return {name: ", ".join(counts_of_arm) for name, counts_of_arm in counts.items()}


# ------------------------------------------------------------------------------------------------ a table of a plan


def ranked_table(results: Results) -> Table:
    """Every arm, the best at its fewest passes first: F, the score at 1, 2 and 4 NFE, and recall at one.

    NFE that no arm has get no column.
    """
    measured = {row["nfe"] for row in results["table"]}
    passes = [nfe for nfe in (1, 2, 4) if nfe in measured]
    name_column = next(iter(results["table"][0]))
    arms = group_by_arm(results, name_column)
    score = main_score(arms[0][0])
    arms.sort(key=lambda arm: (arm[0]["nfe"], arm[0][score]))
    links = _links_to_objectives(results["name"])

    more_columns = [str(nfe) for nfe in passes[1:]]
    table = Table(["", "F", f"{score_title(arms[0])}, {passes[0]} NFE", *more_columns, "recall"])
    for arm, scores, failed in zip(arms, score_cells(arms, passes), failed_counts(arms), strict=True):
        row = arm[0]
        name = str(links.get(row[name_column], row[name_column]))
        recall = f"{row['recall']:.2f}" if row["nfe"] == 1 else ""
        table.add(name, f"{row['F_per_step']:.2f}", *scores, recall, failed=failed)
    return table


def _links_to_objectives(plan: str) -> dict[str, str]:
    """Links to the sections of the objectives that a plan's arms are named after, by the arm's name."""
    links: dict[str, str] = {}
    for arm in read_plan(plan).arms:
        name = arm.labels.get("objective")
        if name is not None:
            links[name] = f"[{name}](objectives/details.md#{load(arm.recipe).objective.kind})"
    return links


def front_table(results: Results) -> Table:
    """The arms at the plan's budget in README, and a perfect sampler.

    Ablations, whose names begin with +, and wider networks are left out.
    """
    plan = results["name"]
    arms: list[ArmRows] = []
    for arm in arms_at_budget(results, FRONT_BUDGETS[plan]):
        name = arm[0]["arm"]
        if not name.startswith("+") and not name.endswith("twice as wide"):
            arms.append(arm)
    score = main_score(arms[0][0])
    arms.sort(key=lambda arm: arm[0][score])
    table = Table(["", "1 NFE", "2", "4", "50"])
    for arm, scores, failed in zip(arms, score_cells(arms, (1, 2, 4, 50)), failed_counts(arms), strict=True):
        name = str(arm[0]["arm"])
        table.add(FRONT_NAMES[plan].get(name, name), *scores, failed=failed)

    variances = [cell["baselines"]["perfect"]["class_mmd_sd"] ** 2 for cell in results["cells"]]
    mean_variance = sum(variances) / len(variances)
    # The arms are means over seeds, so the perfect sampler's error is that of such a mean, too.
    error = (mean_variance / arms[0][0]["seeds"]) ** 0.5
    table.add("*a perfect sampler*", *[with_error(0, error)] * 4)
    return table


def best_table(results: Results) -> Table:
    """The arms at the largest budget, in the plan's order: the score by number of passes, and recall."""
    arms = arms_at_budget(results, budgets_of(results)[-1])
    table = Table(["", f"{score_title(arms[0])}, 1 NFE", "2", "4", "50", "recall"])
    for arm, scores, failed in zip(arms, score_cells(arms, (1, 2, 4, 50)), failed_counts(arms), strict=True):
        table.add(arm[0]["arm"], *scores, f"{arm[0]['recall']:.2f}", failed=failed)
    return table


def scaling_table(results: Results) -> Table:
    """Every arm at 1, 2, 4 and 50 NFE: the score at each budget, and p where the score is as budget^p."""
    budgets = budgets_of(results)
    scores_by_arm: dict[tuple[str, int], dict[float, str]] = {}  # by arm and passes, then by budget
    for budget in budgets:
        arms = arms_at_budget(results, budget)
        for arm, scores in zip(arms, score_cells(arms, (1, 2, 4, 50)), strict=True):
            for row, score in zip(arm, scores, strict=True):
                scores_by_arm.setdefault((row["arm"], row["nfe"]), {})[budget] = score

    powers = _powers(results)
    failed = failed_counts_by_arm(results)
    table = Table(["", "NFE", *(f"budget {budget}" for budget in budgets), "power"])
    for (name, nfe), scores in scores_by_arm.items():
        is_first = nfe == 1
        cells = [scores.get(budget, "") for budget in budgets]
        table.add(
            name if is_first else "", str(nfe), *cells, powers[name, nfe], failed=failed[name] if is_first else ""
        )
    return table


def _powers(results: Results) -> dict[tuple[str, int], str]:
    """The power p of each arm at each number of passes, with its error: fitted to each seed, and averaged.

    All seeds are fitted over the same budgets: seeds that lack a budget of another seed are left out.
    """
    curves: dict[tuple[str, int], dict[str, list[Point]]] = {}  # by arm and passes, then by seed
    for row in from_cells(results):
        score = main_score(row)
        for seed, cell in row["by_seed"].items():
            curves_of_arm = curves.setdefault((row["arm"], row["nfe"]), {})
            curves_of_arm.setdefault(seed, []).append((row["budget"], cell[score], cell[f"{score}_sd"]))
    powers: dict[tuple[str, int], str] = {}
    for key, curves_of_arm in curves.items():
        num_budgets = max(len(points) for points in curves_of_arm.values())
        fits = [fit_power_law(points) for points in curves_of_arm.values() if len(points) == num_budgets]
        powers[key] = with_minus(with_error(fmean(power for power, _ in fits), error_of_mean(fits)))
    return powers


def fit_power_law(points: Sequence[Point]) -> tuple[float, float]:
    """Fit distance = a budget^p, by least squares of log distance on log budget, to (budget, distance, its error).

    Returns p and its standard error, which follows from the errors of the distances.
    """
    x = [log(budget) for budget, _, _ in points]
    y = [log(distance) for _, distance, _ in points]
    mean_x = fmean(x)
    centred = [value - mean_x for value in x]
    errors = [a * error / distance for a, (_, distance, error) in zip(centred, points, strict=True)]
    power_error = hypot(*errors) / fsum(a * a for a in centred)
    return linear_regression(x, y).slope, power_error


def flow_first_table(results: Results) -> Table:
    """Every arm that ends with DuMo: the score by budget and number of passes."""
    passes = (1, 2, 4)
    head = [""]
    scores_by_arm: dict[str, list[str]] = {}
    for budget in budgets_of(results):
        head += [f"budget {budget}, 1 NFE", "2", "4"]
        arms = [arm for arm in arms_at_budget(results, budget) if "DuMo" in arm[0]["arm"]]
        for arm, scores in zip(arms, score_cells(arms, passes), strict=True):
            scores_by_arm.setdefault(arm[0]["arm"], []).extend(scores)
    failed = failed_counts_by_arm(results)
    table = Table(head)
    for name, scores in scores_by_arm.items():
        table.add(name, *scores, failed=failed[name])
    return table


def words_table(results: Results) -> Table:
    """By words and by classes: the score at one and two NFE, and FDs within a class by captions seen and held out."""
    arms = group_by_arm(results, "data", "condition")
    columns = ["steps", "MFLOP per NFE", f"{score_title(arms[0])}, 1 NFE", "2", "recall", "class FD", "held out"]
    table = Table(["", "by", *columns])
    for data in dict.fromkeys(arm[0]["data"] for arm in arms):
        arms_of_data = [arm for arm in arms if arm[0]["data"] == data]
        scores_of_data = score_cells(arms_of_data, (1, 2))
        for arm, scores, failed in zip(arms_of_data, scores_of_data, failed_counts(arms_of_data), strict=True):
            row = arm[0]
            # The FDs within a class were measured apart; a table that was measured again has none.
            costs = [f"{row['steps']:,}", _optional(row, "MFLOP_per_pass", 1)]
            more_scores = [_optional(row, name, 2) for name in ("recall", "class_fd", "class_fd_held")]
            table.add(data, row["condition"], *costs, *scores, *more_scores, failed=failed)
    return table


def _optional(row: Row, column: str, digits: int) -> str:
    """Return a number of a row, or "" if the row does not have it."""
    value = row.get(column)
    return "" if value is None else f"{value:.{digits}f}"


def fair_table(results: Results) -> Table:
    """Two heads and one, under the same timestep distributions: the score at one and two NFE."""
    arms = group_by_arm(results, "law", "jumps", "rows", "heads", "metric")
    scores_by_times: dict[tuple[str, ...], dict[str, list[str]]] = {}  # then by heads
    for arm, scores in zip(arms, score_cells(arms, (1, 2)), strict=True):
        row = arm[0]
        rows_that_jump = row["rows"]
        if row["metric"] != "l2":
            rows_that_jump += ", MeanFlow's metric"
        far_text = ""
        if "far" in row:
            far = 100 * row["far"]
            far_text = f"{far:.1f}" if far > 0.01 else f"{far:.4f}"
        times = row["law"], row["jumps"], rows_that_jump, far_text
        scores_by_times.setdefault(times, {})[row["heads"]] = scores

    columns = ["two heads, 1 NFE", "one head, 1 NFE", "two heads, 2", "one head, 2"]
    table = Table(["timesteps", "jumps", "on", "far, %", *columns])
    for times, scores_by_heads in scores_by_times.items():
        two_heads = scores_by_heads.get("two", ["", ""])
        one_head = scores_by_heads.get("one", ["", ""])
        table.add(*times, two_heads[0], one_head[0], two_heads[1], one_head[1])
    return table


def shares_table(results: Results) -> Table:
    """Each objective's distance at one NFE by its share on the velocity, with the standard error."""
    is_moons = results["name"] == "fig3"
    share_column = "velocity_ratio" if is_moons else "share_on_velocity"
    distances: dict[str, dict[float | None, str]] = {}  # by objective, then by share
    for row in results["table"]:
        if is_moons:
            distance = 1000 * row["mmd2"]
            error = 1000 * row["mmd2_sd"] / row["seeds"] ** 0.5
        else:
            distance = row["class_mmd"]
            error = row["error"]
        distances.setdefault(row["objective"], {})[row[share_column]] = with_error(distance, error, 1)

    shares: set[float | None] = set()
    for distances_by_share in distances.values():
        shares.update(distances_by_share)
    columns = sorted(shares, key=lambda share: (share is None, share))  # None last
    title = "MMD² · 10³" if is_moons else SCORE_TITLES["class_mmd"]
    table = Table([title, *("none" if share is None else f"{share:g}" for share in columns)])
    for objective, distances_by_share in distances.items():
        table.add(objective, *(distances_by_share.get(share, "") for share in columns))
    return table


# --------------------------------------------------------------------------------------------------- other tables


def kills_table(results: Results) -> Table:
    """The outcomes of kills, by place and number of ranks."""
    cells_by_place: dict[str, list[str]] = {}
    for row in results["rows"]:
        cell = f"{row['hits']}/{row['starts']}"
        if row["differs"]:
            cell += f", {len(row['differs'])} numbers differ"
        cells_by_place.setdefault(row["place"], []).append(cell)
    table = Table(["killed while", "one process: kills/starts", "two ranks"])
    for place, cells in cells_by_place.items():
        table.add(place, *cells)
    return table


def trained_table(_: Results) -> Table:
    """The bundled models, each with a perfect sampler: `TRAINED_SCORES` by NFE."""
    table = Table(["model", "NFE", *(f"`{name}`" for name in TRAINED_SCORES), "`recall`", "`accuracy`"])
    for file in sorted(MODELS.glob("*/evaluation.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        for row in report["results"]:
            scores = [with_error(row[name], row[f"{name}_sd"]) for name in TRAINED_SCORES]
            shares = [f"{row['recall']:.2f}", f"{row['accuracy']:.3f}"]
            table.add(f"`{report['run']}`", str(row["nfe"]), *scores, *shares)
        perfect = report["baselines"]["perfect"]
        scores = [
            with_error(perfect["mean"], perfect["sd"]),
            with_error(perfect["class_mmd"], perfect["class_mmd_sd"]),
        ]
        accuracy = with_error(perfect["accuracy"], perfect["accuracy_sd"], 3)
        table.add("*a perfect sampler*", "", *scores, "", accuracy)
    return table


# ------------------------------------------------------------------------------------------------ tables into pages

# By table name: the file of its results and the function that makes the table.
TABLES = {
    # `trained_table` reads the files of all models itself.
    "trained": ("evaluation", trained_table),
    "zoo": ("zoo", ranked_table),
    "front": ("best", front_table),
    "front-latents": ("scaling", front_table),
    "best": ("best", best_table),
    "scaling": ("scaling", scaling_table),
    "flow-first": ("flow-first", flow_first_table),
    "words": ("words", words_table),
    "fair": ("fair", fair_table),
    "fig3": ("fig3", shares_table),
    "fig4a": ("fig4a", shares_table),
    "pretrained": ("pretrained", ranked_table),
    "latents": ("latents", ranked_table),
    "stages": ("stages", ranked_table),
    "stages-latents": ("stages-latents", ranked_table),
    "lowpass": ("lowpass", ranked_table),
    "kills": ("kill", kills_table),
}


def origin_text(origin: Row) -> str:
    """Return the origin of results: command, training time, machine, commit and date."""
    hours = f"{origin['training_hours']:.1f} hours of training on {origin['machine']}"
    return f"*`{origin['command']}`: {hours}; commit {origin['commit']}, {origin['date']}.*"


def read_results(file_name: str) -> Results:
    """Read the results in the file with this name, without its suffix."""
    for folder in RESULT_FOLDERS:
        for path in sorted(folder.glob(f"**/{file_name}.json")):
            return json.loads(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"{file_name}.json is in none of {RESULT_FOLDERS}")


def with_tables(page: str) -> str:
    """Replace the tables of a page by those of the result files."""

    def text_of(place: re.Match[str]) -> str:
        file_name, make_table = TABLES[place["name"]]
        results = read_results(file_name)
        parts = [place["begin"], "\n".join(make_table(results).lines())]
        if results.get("origin", {}).get("commit"):
            parts.append(origin_text(results["origin"]))
        return "\n\n".join([*parts, place["end"]])

    return PLACE.sub(text_of, page)


if __name__ == "__main__":
    for path in [DOCS.parent / "README.md", *DOCS.rglob("*.md")]:
        page = path.read_text(encoding="utf-8")
        new_page = with_tables(page)
        if new_page != page:
            path.write_text(new_page, encoding="utf-8")
            print(path)
