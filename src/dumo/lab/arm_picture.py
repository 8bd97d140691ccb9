"""Draw the results of a plan: `ranking_chart` plots the scores of its arms, `sample_sheets` shows samples from each."""

from collections.abc import Sequence

from PIL import Image

from dumo.config.conditions import spread_evenly
from dumo.config.word import MERITS, word
from dumo.io import picture
from dumo.lab.cell import Result, Row
from dumo.lab.experiment import Plan
from dumo.lab.result_table import group_by_arm, main_score, main_score_of_names
from dumo.report import chart, score
from dumo.runtime.formatting import nfe_text

_SHEET_COLUMNS = 10
# Pixels between the sheets of two arms.
_SHEET_GAP = 28


def ranking_chart(plan: Plan, rows: Sequence[Row]) -> Image.Image:
    """Plot the main score of a plan's table: a line for each arm, with a mark for each NFE.

    The best arm at the smallest NFE is on top.
    """
    score_name = main_score(rows[0])
    lines: dict[str, dict[str, chart.Dot]] = {}
    for row in sorted(rows, key=lambda row: (row["nfe"], row[score_name])):
        arm = ", ".join(str(row[name]) for name in plan.columns if not name.startswith("paper_"))
        lines.setdefault(arm, {})[nfe_text(row["nfe"])] = chart.Dot(row[score_name], score.error(row, score_name))
    nfes = sorted({row["nfe"] for row in rows})
    return chart.dots(plan.title, chart.score_label(score_name), lines, [nfe_text(nfe) for nfe in nfes])


def sample_sheets(results: Sequence[Result]) -> Image.Image:
    """Draw a sheet of samples for each arm under its score, the best arm first.

    Samples are drawn with the arm's first seed at its smallest NFE.
    """
    score_name = main_score_of_names(score.score_names(results[0].report["results"][0]))
    score_title = word(MERITS, score_name).title
    sheets: list[tuple[float, str, Image.Image]] = []
    for first_seed, *_ in group_by_arm(results):
        value = first_seed.report["results"][0][score_name]
        arm = next(iter(first_seed.cell.labels.values()))
        sheets.append((value, f"{arm}\n{score_title}: {score.number(value)}", _draw_sheet(first_seed)))
    sheets.sort(key=lambda entry: entry[0])
    titles = [title for _, title, _ in sheets]
    return picture.labelled_grid([sheet for *_, sheet in sheets], min(3, len(sheets)), titles, gap=_SHEET_GAP)


def _draw_sheet(result: Result) -> Image.Image:
    """Draw two samples for each class, one class per column. If there are many classes, ten evenly spaced ones."""
    run = result.trained.spec
    # The requested NFE; the NFE in the results also counts guidance passes.
    nfe = result.report["card"]["nfe"][0]
    c = run.conditions.of_labels(spread_evenly(_SHEET_COLUMNS, max(run.data.labels, 1)))
    samples = result.trained.make_samples(c.repeat(2), nfe=nfe)
    names = [run.conditions.name(k) for k in c.tolist()] if run.data.labels else []
    cells = [picture.sheet(image, 1) for image in picture.to_rows(samples.x).split(1)]
    return picture.labelled_grid(cells, _SHEET_COLUMNS, names, gap=2)
