"""Figures 5 to 10 on digits: trajectories after several steps of the training, and class grids at one and two passes.

The paper starts from a trained teacher (Fig. 5), here the nets start from nothing: at step 0 no number of passes makes
an image. What can be seen is in how many passes the images of many come out, by which head, and when.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dumo.config.load import load
from dumo.evaluation.evaluate import evaluator_of, row
from dumo.io import archive
from dumo.progress import no_bar
from dumo.report import gallery
from dumo.reproduce.plan import Cell, Finished, Plan
from dumo.run.folder import RunFolder

RECIPES = {"DuMo": "digits", "MeanFlow": "digits-meanflow"}
JUDGED = (1, 2, 50)  # passes: few, and as many as the velocity needs


def cells(scale: str) -> Iterator[Cell]:
    """DuMo and MeanFlow on one net and as many steps, with milestones."""
    steps, milestones = {"smoke": (20, "[0,10]"), "laptop": (5000, "[0,200,1000]")}[scale]
    small = ["train.batch=32", "net.width=32", "net.depth=1", "evaluate.protocol.samples=500"]
    sets = [f"train.steps={steps}", f"train.milestones={milestones}", "evaluate.nfe=[1,2]"]
    for title, recipe in RECIPES.items():
        spec = load(recipe, [*sets, *(small if scale == "smoke" else [])])
        yield Cell(recipe, spec, {"objective": title})


def table(done: list[Finished]) -> list[dict[str, Any]]:
    """A row per objective, reading, step and number of passes: the first of the protocol's distances to the data."""
    return [{"objective": one.cell.labels["objective"], **row} for one in done for row in judged(one.opened)]


def judged(opened: RunFolder) -> Iterator[dict[str, Any]]:
    """How near samples come to the data after each step that was kept, by reading and number of passes."""
    spec = opened.run
    evaluator, c = evaluator_of(opened, no_bar), spec.evaluate.protocol.labels(spec.data.classes)
    for step, file in gallery.stages(opened).items():
        then = gallery.open_at(opened, step, file)
        for reading in gallery.chosen(spec, None, JUDGED):
            for n in JUDGED:
                found = row(then, evaluator, reading.at(n), n, c, no_bar)
                passes_solver_distance = dict(islice(found.items(), 3))
                yield {"reading": reading.letter, "step": step, **passes_solver_distance}


def draw(done: list[Finished], folder: Path) -> list[Path]:
    """Trajectories of all readings in one picture, class grids of each objective, and each panel by itself."""
    files, rows = list[Path](), dict[str, Any]()
    for one in done:
        title = one.cell.labels["objective"]
        panels = gallery.trajectories(one.opened)
        rows |= {f"{title},\n{reading.name}": row for reading, row in panels.items()}
        grids = gallery.class_grids(one.opened, None, nfe=(1, 2))
        files += gallery.write_trajectories(folder / one.cell.name, panels)
        files += gallery.write_class_grids(folder / one.cell.name, grids)
    archive.write_picture(folder / "fig5.png", gallery.side_by_side(rows))
    return [folder / "fig5.png", *files]


PLAN = Plan(
    "Trajectories of DuMo and MeanFlow in training, and class grids (Figs. 5-10)",
    cells,
    table,
    draw,
    unpublished="the paper's Figs. 5 and 6 start from a teacher that is not published",
)
