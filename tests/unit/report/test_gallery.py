"""Laws of the galleries: a cell is an image of one noise, one net and one number of passes, and stands in its place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dumo.config.load import load
from dumo.flow.solver import Euler, Heun, Hop, Restart
from dumo.io import picture
from dumo.report import gallery
from dumo.run.trained import TrainedRun
from dumo.run.weights import load_run
from dumo.types import UserError
from trained import train
from unit.run.known import Seen

TINY = ["net.width=16", "net.depth=1", "train.batch=16", "train.steps=12", "train.schedule.kind=constant"]
TINY += ["train.optimizer.lr=0.02", "train.milestones=[0,6]"]
SIDE, GAP = 64, 6  # of a cell, of what is between


def trained(folder: Path, recipe: str, *more: str) -> TrainedRun:
    train(load(recipe, [*TINY, *more]), folder)
    return load_run(str(folder))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return trained(tmp_path_factory.mktemp("run") / "digits", "digits")


@pytest.fixture(scope="module")
def moons(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return trained(tmp_path_factory.mktemp("run") / "moons", "moons")


def cell(panel: Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """The pixels of one cell, counted from the lower right corner: names stand left and above."""
    right, low = panel.width - (columns - 1 - column) * (SIDE + GAP), panel.height - (rows - 1 - row) * (SIDE + GAP)
    return np.asarray(panel.crop((right - SIDE, low - SIDE, right, low)))


def shown(one: TrainedRun, number: int, label: int, **asked: object) -> np.ndarray:
    """The pixels of an image made alone."""
    c = torch.full((number + 1,), label)
    (part,) = one.make_batches(c, indices=[number], **asked)
    return np.asarray(picture.sheet(picture.to_rows(part.x), 1))


def stages(one: TrainedRun, steps: list[int] | None = None) -> dict[int, Path | None]:
    """Those of a run's folder."""
    return gallery.milestone_files(one.folder, one.step, steps)


@pytest.mark.nightly
def test_every_cell_is_its_image(digits: TrainedRun) -> None:
    """Rows are images, columns are passes, and the noise of a row is the same by any reading, after any step."""
    panels = gallery.trajectories(digits, nfe=(1, 2, 5), count=3, only=[7, 4], seed=5)
    u, v = panels
    assert (u.letter, u.solver, v.letter, v.solver) == ("u", Restart(), "v", Heun())
    for reading, row in panels.items():
        assert list(row) == [0, 6, 12]
        for step, panel in row.items():
            one = gallery.open_milestone(digits, step, stages(digits)[step])
            for i, label in enumerate((7, 4, 7)):
                for j, n in enumerate((1, 2, 5)):
                    solver = Euler() if reading is v and n % 2 else reading.solver
                    alone = shown(one, i, label, nfe=n, solver=solver, seed=5)
                    assert np.abs(cell(panel, i, j, 3, 3).astype(int) - alone).max() <= 1  # rounding


def test_steps_differ_and_the_last_is_the_checkpoint(digits: TrainedRun) -> None:
    assert [path and path.name for path in stages(digits).values()] == [
        "step-00000000.safetensors", "step-00000006.safetensors", None,
    ]  # fmt: skip
    first, middle = (gallery.open_milestone(digits, step, stages(digits)[step]) for step in (0, 6))
    assert (first.step, first.weights) == (0, "milestones/step-00000000.safetensors")
    assert not np.array_equal(shown(first, 0, 3, nfe=1), shown(middle, 0, 3, nfe=1))
    assert gallery.open_milestone(digits, 12, None) is digits
    assert list(stages(digits, [6])) == [6]
    with pytest.raises(UserError, match=r"train\.milestones=\[7\]"):
        stages(digits, [6, 7])


@pytest.mark.parametrize(
    ("recipe", "u", "v"),
    [
        ("digits", "u head, jumps (restart)", "v head, Euler steps"),
        ("digits-flow-matching", None, "v head, Euler steps"),
        ("digits-meanflow", "u head, jumps (hop)", "v = u at r = t, Euler steps"),
        ("digits-imf", "u head, jumps (hop)", "v = u at r = t, Euler steps"),  # its v head serves in training alone
        ("digits-facm", "u head, jumps (restart)", "v by the u head, Euler steps"),  # at -t; it has no r
        ("digits-shortcut", "u head, jumps (hop)", "v by the u head, Euler steps"),  # at the last k
        ("digits-sct", "f head, jumps (restart)", None),
        ("digits-three-heads", "u head, jumps (restart)", "v head, Euler steps"),
        ("digits-three-heads sample.solver.kind=hop", "mean-velocity head, jumps (hop)", "v head, Euler steps"),
    ],
)
def test_readings_are_those_that_were_taught(recipe: str, u: str | None, v: str | None) -> None:
    """Their titles name the head that is read."""
    name, *fields = recipe.split()
    found = {letter: one.title for letter, one in gallery.sampling_modes(load(name, fields)).items()}
    assert found == {letter: title for letter, title in (("u", u), ("v", v)) if title}


def test_a_run_is_sampled_by_the_readings_that_were_taught() -> None:
    assert gallery.sampling_modes(load("digits-meanflow"))["u"].solver == Hop()
    assert gallery.sampling_modes(load("digits", ["sample.solver.m=0.3"]))["u"].solver == Restart(m=0.3)
    flow = load("digits-flow-matching")
    assert [one.letter for one in gallery.choose_modes(flow, [1, 3])] == ["v"]
    assert [one.letter for one in gallery.choose_modes(load("digits-sct"), None)] == ["u"]


def test_passes_by_default_are_those_that_can_be_made() -> None:
    """Shortcut knows jumps of powers of two, so 50 are out of its reach; where none is left, the run's own do."""
    halves = load("digits-shortcut")
    ways = gallery.choose_modes(halves, None)
    assert gallery.reachable_passes(gallery.PASSES, halves, ways) == [1, 2, 4, 8, 16]
    assert gallery.reachable_passes((1,), halves, ways) == [1]
    with pytest.raises(UserError, match="does not train"):
        gallery.choose_modes(halves, [50])
    late = load("digits-shortcut", ["sample.solver.start=0.75", "sample.nfe=[3]", "evaluate.nfe=[6]"])
    assert gallery.reachable_passes(gallery.PASSES, late, gallery.choose_modes(late, None)) == [3]
    for recipe in ("digits", "digits-imm", "digits-cm", "digits-sct", "digits-flow-matching"):
        there = load(recipe)
        assert gallery.reachable_passes(gallery.PASSES, there, gallery.choose_modes(there, None)) == [*gallery.PASSES]
    heun = load("digits", ["sample.solver.kind=heun", "sample.nfe=[2]", "evaluate.nfe=[2]"])
    assert gallery.reachable_passes(gallery.PASSES, heun, gallery.choose_modes(heun, None)) == [
        *gallery.PASSES
    ]  # odd by Euler


def test_heun_where_it_can_and_euler_elsewhere() -> None:
    _, v = gallery.choose_modes(load("digits"), [1, 2])
    assert [v.solver_for(n) for n in (1, 2, 3, 50)] == [Euler(), Heun(), Euler(), Heun()]


def test_all_labels_that_are_asked_for_have_a_row(digits: TrainedRun) -> None:
    panels, _ = gallery.trajectories(digits, nfe=(1,), steps=[12], only=range(10)).values()
    eight, _ = gallery.trajectories(digits, nfe=(1,), steps=[12]).values()
    assert panels[12].height > eight[12].height


@pytest.mark.slow
def test_nothing_is_made_of_what_cannot_be(digits: TrainedRun, moons: TrainedRun) -> None:
    for wrong in ({"nfe": [1, 0]}, {"steps": [5]}, {"only": [10]}, {"only": [7, 4], "count": 1}):
        with pytest.raises(UserError):
            gallery.trajectories(digits, **wrong)


@pytest.mark.slow
def test_points_are_scattered_in_one_row(moons: TrainedRun) -> None:
    panels = gallery.trajectories(moons, nfe=(1, 2), steps=[12], count=50)
    for row in panels.values():
        assert row[12].width == 2 * 450 + GAP
        assert row[12].height < 600


def test_files_say_what_they_are(digits: TrainedRun, tmp_path: Path) -> None:
    panels = gallery.trajectories(digits, nfe=(1, 2), count=2)
    files = gallery.write_trajectories(tmp_path, panels)
    steps = ("00000000", "00000006", "00000012")
    assert [path.name for path in files] == [
        *(f"{letter}-step-{step}.png" for letter in "uv" for step in steps), "trajectories.png",
    ]  # fmt: skip
    assert sorted(files) == sorted(tmp_path.iterdir())
    with Image.open(files[-1]) as joined:
        u, v = (row[12] for row in panels.values())
        assert v.height > u.height  # the solver's name stands above one pass
        assert joined.width >= 3 * u.width
        low = np.asarray(joined.convert("RGB").crop((joined.width - v.width, joined.height - SIDE, *joined.size)))
        assert np.array_equal(low, np.asarray(v)[-SIDE:])  # nothing is cut off


@pytest.mark.slow
def test_work_is_watched(digits: TrainedRun) -> None:
    gallery.trajectories(digits, nfe=(1, 2), count=1, bar=(seen := Seen()))
    assert seen.ticks == [3, 6, 9, 12, 15, 18]
    assert {total for _, total in seen.titles} == {18}
