"""Write the tables of measured numbers into the pages, from the files that hold what was measured.

    python docs/tables.py

A table stands between `<!-- table: zoo -->` and `<!-- end -->`. A test holds the pages to what this writes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import stdev
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "src/dumo/recipes/results"
PLACE = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n\n).*?(?P<end>\n\n<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def by_objective(results: Row) -> list[list[Row]]:
    """The rows of each objective, of 1, 2 and 4 passes; the smallest `fd_grey` in one pass first.

    Adds the spread of `fd_grey` over the seeds, which is in the cells.
    """
    found: dict[str, list[Row]] = {}
    for row in results["table"]:
        found.setdefault(row["objective"], []).append(row)
    cells: dict[str, list[Row]] = {}
    for cell in results["cells"]:
        cells.setdefault(cell["cell"].rpartition("-")[0], []).append(cell)
    for own, seeds in zip(found.values(), cells.values(), strict=True):
        for row in own:
            values = [one["fd_grey"] for seed in seeds for one in seed["results"] if one["nfe"] == row["nfe"]]
            assert abs(sum(values) / len(values) - row["fd_grey"]) < 1e-9, row["objective"]
            row["fd_grey_sd"] = stdev(values)
    return sorted(found.values(), key=lambda own: own[0]["fd_grey"])


def zoo(results: Row) -> Iterator[str]:
    """Every objective: what it cost, and its measures in 1, 2 and 4 passes."""
    head = ["", "steps", "F per step", "FD, 1 pass", "2", "4", "raw FD, 1 pass", "2", "4"]
    yield f"| {' | '.join([*head, 'KID · 10³, 1, 2, 4', 'recall, 1, 2, 4'])} |"
    yield "|" + "---|" * (len(head) + 2)
    for own in by_objective(results):
        name, steps, cost = (own[0][key] for key in ("objective", "steps", "F_per_step"))
        distances = [f"{row[key]:.2f}&nbsp;±&nbsp;{row[f'{key}_sd']:.2f}" for key in ("fd_grey", "fd") for row in own]
        kid = ", ".join(f"{round(1000 * row['kid'])}".replace("-", "−") for row in own)
        recall = ", ".join(f"{row['recall']:.2f}" for row in own)
        cells = [f"**{name}**" if name == "DuMo" else name, f"{steps:,}", f"{cost:.2f}", *distances, kid, recall]
        yield f"| {' | '.join(cells)} |"


def far(results: Row) -> Iterator[str]:
    """Why some are far from DuMo, nearest first."""
    rows = [row for row in results["table"] if row["why"]]
    for row in sorted(rows, key=lambda row: row["over_dumo_1_pass"]):
        yield f"- {row['objective']}, {row['over_dumo_1_pass']:.1f} times: {row['why']}."


def front(results: Row) -> Iterator[str]:
    """Five of them, short."""
    yield "| objective | a step | 1 pass | 2 | 4 | recall |"
    yield "|---|---|---|---|---|---|"
    for own in by_objective(results):
        if (name := own[0]["objective"]) in FRONT:
            kind, cost = FRONT[name]
            cells = [f"{row['fd_grey']:.2f}±{row['fd_grey_sd']:.2f}" for row in own] + [f"{own[0]['recall']:.2f}"]
            yield f"| `{kind}` | {cost} | {' | '.join(cells)} |"


# of the README: the kind, and what a step costs by docs/objectives/index.md, to which a test holds it
FRONT = {
    "DuMo": ("dumo", "4 F"),
    "MeanFlow": ("meanflow", "3.25 F"),
    "α-Flow": ("alpha_flow", "3.2 F"),
    "RCGM": ("rcgm", "5 F"),
    "Flow matching": ("flow_matching", "3 F"),
}
TABLES = {
    "zoo": ("zoo", zoo),
    "zoo-far": ("zoo", far),
    "front": ("zoo", front),
}  # by name: the file, and what is made of it


def written(page: str) -> str:
    """A page with its tables as the files have them."""

    def write(place: re.Match[str]) -> str:
        file, table = TABLES[place["name"]]
        results = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        return place["begin"] + "\n".join(table(results)) + place["end"]

    return PLACE.sub(write, page)


if __name__ == "__main__":
    for path in [DOCS.parent / "README.md", *DOCS.rglob("*.md")]:
        page = path.read_text(encoding="utf-8")
        if (new := written(page)) != page:
            path.write_text(new, encoding="utf-8")
            print(path)
