"""The arms of a plan as pictures: `ranking_chart` shows how they rank, `sample_sheets` what each of them makes."""

from collections.abc import Sequence

from PIL import Image

from dumo.config.conditions import spread_evenly
from dumo.config.word import MERITS, word
from dumo.io import picture
from dumo.lab.cell import Result, Row
from dumo.lab.plan import Plan
from dumo.lab.result_table import group_by_arm, main_score, main_score_of_names
from dumo.report import chart, score
from dumo.runtime.formatting import nfe_text

# The number of columns of a sheet of samples.
_COLUMNS = 10
# Pixels between the sheets of two arms.
_GAP = 28


def ranking_chart(plan: Plan, rows: Sequence[Row]) -> Image.Image:
    """A chart of the main score of a plan's table: a line for each arm, with a mark for each number of passes.

    The best arm in the fewest passes is on top.
    """
    score_name = main_score(rows[0])
    lines: dict[str, dict[str, chart.Dot]] = {}
    for row in sorted(rows, key=lambda row: (row["nfe"], row[score_name])):
        arm = ", ".join(str(row[name]) for name in plan.columns if not name.startswith("paper_"))
        lines.setdefault(arm, {})[nfe_text(row["nfe"])] = chart.Dot(row[score_name], score.error(row, score_name))
    passes = sorted({row["nfe"] for row in rows})
    return chart.dots(plan.title, chart.score_label(score_name), lines, [nfe_text(nfe) for nfe in passes])


def sample_sheets(results: Sequence[Result]) -> Image.Image:
    """A sheet of samples per arm, below its score, the best arm first.

    Samples are of the arm's first seed at its fewest NFE, two of each class, or of ten of the classes.
    """
    lead = main_score_of_names(score.score_names(results[0].report["results"][0]))
    score_title = word(MERITS, lead).title
    sheets: list[tuple[float, str, Image.Image]] = []
    for first, *_ in group_by_arm(results):
        value = first.report["results"][0][lead]
        arm = next(iter(first.cell.labels.values()))
        sheets.append((value, f"{arm}\n{score_title}: {score.number(value)}", _sheet(first)))
    sheets.sort(key=lambda entry: entry[0])
    titles = [title for _, title, _ in sheets]
    return picture.labelled_grid([sheet for *_, sheet in sheets], min(3, len(sheets)), titles, gap=_GAP)


def _sheet(result: Result) -> Image.Image:
    """Two rows of samples in the fewest passes: a class to a column, with its name. Of many classes every n-th one."""
    run = result.trained.spec
    # The passes as they were asked for: those of a row also count the ones of guidance.
    nfe = result.report["card"]["nfe"][0]
    c = run.conditions.of_labels(spread_evenly(_COLUMNS, max(run.data.labels, 1)))
    samples = result.trained.make_samples(c.repeat(2), nfe=nfe)
    names = [run.conditions.name(k) for k in c.tolist()] if run.data.labels else []
    cells = [picture.sheet(image, 1) for image in picture.to_rows(samples.x).split(1)]
    return picture.labelled_grid(cells, _COLUMNS, names, gap=2)
