"""A plan is made once: what is finished is kept, what was stopped goes on, what has changed is made anew."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from dumo import run
from dumo.config.load import load
from dumo.judge.evaluation import evaluate
from dumo.reproduce import PLANS, fig3, reproduce, trajectory, zoo
from dumo.reproduce.plan import SCALES, Cell, Finished, Plan, finish, markdown, units
from dumo.train import loop
from dumo.train.state import State
from dumo.train.step import Record
from dumo.types import UserError
from dumo.watch import unwatched

TINY = ["net.width=8", "net.depth=1", "train.batch=4", "train.steps=4", "train.save_every=2"]
TINY += ["evaluate.protocol.samples=20", "evaluate.nfe=[1]"]


def cell(name: str = "a", *more: str) -> Cell:
    """DuMo on moons, in no time."""
    return Cell(name, load("moons", [*TINY, *more]), {"seed": 0})


def plan(*cells: Cell) -> Plan:
    """Of these cells; a row a cell, a text for a picture."""

    def draw(done: list[Finished], folder: Path) -> list[Path]:
        (folder / "picture.txt").write_text(f"{len(done)} cells")
        return [folder / "picture.txt"]

    def table(done: list[Finished]) -> list[dict[str, object]]:
        return [{"cell": one.cell.name, "mmd2": one.report["results"][0]["mmd2"], "none": None} for one in done]

    def made(scale: str) -> Iterator[Cell]:
        yield from cells

    return Plan("A test", made, table, draw)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are trained, as they are."""
    made: list[int] = []
    original = loop.train_step

    def train_step(state: State, *values: object, **named: object) -> Record:
        made.append(state.step)
        return original(state, *values, **named)

    monkeypatch.setattr(loop, "train_step", train_step)
    return made


def test_a_plan_leaves_results_table_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "test", plan(cell("a"), cell("b", "train.seed=1")))
    results = reproduce("test", "smoke", tmp_path / "out")
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    assert [row["cell"] for row in results["table"]] == ["a", "b"]
    assert results["table"][0]["mmd2"] != results["table"][1]["mmd2"]
    assert [one["cell"] for one in results["cells"]] == ["a", "b"]
    assert results["origin"]["command"] == "dumo reproduce test --scale smoke"
    assert results["files"] == [str(tmp_path / "out" / name) for name in ("picture.txt", "table.md", "results.json")]
    assert all(Path(file).is_file() for file in results["files"])
    assert (tmp_path / "out/picture.txt").read_text() == "2 cells"
    assert (tmp_path / "out/table.md").read_text().splitlines()[0] == "# A test"


def test_cells_side_by_side_are_those_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    """Made in processes of their own: here no step is trained, and the numbers are the same."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # a core each, as the tests have
    monkeypatch.setitem(PLANS, "test", plan(cell("a"), cell("b", "train.seed=1")))
    apart = reproduce("test", "smoke", tmp_path / "apart", jobs=2)
    assert steps == []
    assert apart["origin"]["command"].endswith("--jobs 2")
    assert apart["table"] == reproduce("test", "smoke", tmp_path / "in turn")["table"]
    assert steps


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PLANS, "test", plan(cell()))
    reproduce("test", "laptop")
    assert Path("runs/reproduce/test-laptop/results.json").is_file()


def finished(tmp_path: Path, *more: str) -> Finished:
    """A cell, trained and judged."""
    return finish(cell("a", *more), tmp_path, device="cpu", watch=unwatched)


def test_finished_cells_are_kept(tmp_path: Path, steps: list[int]) -> None:
    first = finished(tmp_path)
    kept = [first.trained.folder / "evaluation.json", *(first.trained.folder / "checkpoints").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3]
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_stopped_cell_goes_on(tmp_path: Path, steps: list[int]) -> None:
    first = finished(tmp_path)
    shutil.rmtree(first.trained.folder / "checkpoints/step-00000004")
    (first.trained.folder / "evaluation.json").unlink()
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3, 2, 3]


def test_a_cell_that_was_trained_but_not_judged(tmp_path: Path, steps: list[int]) -> None:
    first = finished(tmp_path)
    (first.trained.folder / "evaluation.json").unlink()
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3]


def test_what_trains_otherwise_is_another_cell(tmp_path: Path) -> None:
    folders = [finished(tmp_path, more).trained.folder for more in ("train.seed=0", "train.seed=1", "net.width=9")]
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path and folder.name.startswith("a-") for folder in folders)


@pytest.mark.parametrize(
    "more", ["evaluate.protocol.samples=21", "evaluate.seed=1", "evaluate.nfe=[2]", "sample.solver.m=0.4"]
)
def test_what_is_judged_otherwise_is_judged_again(tmp_path: Path, more: str) -> None:
    finished(tmp_path)
    spec = cell("a", more).spec
    second = finished(tmp_path, more)
    assert second.report["samples"] == spec.evaluate.protocol.samples
    assert second.report["seed"] == spec.evaluate.seed
    assert second.report["solver"] == spec.sample.solver.model_dump()
    assert [row["nfe"] for row in second.report["results"]] == list(spec.evaluate.nfe)


@pytest.mark.parametrize("otherwise", [{"nfe": [3, 4]}, {"seed": 5}, {"solver": "euler"}])
def test_a_judgement_by_other_means_is_not_taken(tmp_path: Path, otherwise: dict[str, Any]) -> None:
    first = finished(tmp_path)
    evaluate(first.trained, **otherwise)  # someone looks at a cell with dumo evaluate
    assert finished(tmp_path).report == first.report


def test_cells_that_were_measured_otherwise_make_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "test", plan(cell("a"), cell("b", "evaluate.seed=1")))
    with pytest.raises(UserError, match=r"not measured alike(.|\n)*  seed: 0 in a; 1 in b\n"):
        reproduce("test", "smoke", tmp_path / "out")
    assert not (tmp_path / "out/table.md").exists()


def test_wrong_names_are_refused_before_any_work(tmp_path: Path) -> None:
    for name, scale, said in (("fig33", "smoke", "'fig3'"), ("fig3", "smoky", "'smoke'"), ("zoo", "", "smoke, laptop")):
        with pytest.raises(UserError, match=said):
            reproduce(name, scale, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_markdown() -> None:
    rows = [{"a": 1, "b": 0.123456, "c": None}, {"a": 20, "b": 1e-9, "c": "x"}]
    lines = markdown("T", rows).splitlines()
    assert lines == ["# T", "", "| a | b | c |", "| --- | --- | --- |", "| 1 | 0.1235 | None |", "| 20 | 1e-09 | x |"]


@pytest.mark.parametrize("scale", SCALES)
def test_figure_3_varies_the_ratio_alone(scale: str) -> None:
    *meanflows, dumo = fig3.cells(scale)
    assert [one.labels["velocity_ratio"] for one in meanflows] == list(fig3.RATIOS)
    assert [one.spec.model_dump()["objective"]["times"]["velocity_ratio"] for one in meanflows] == list(fig3.RATIOS)
    assert (
        len(
            {
                one.spec.model_dump_json().replace(f'"velocity_ratio":{one.labels["velocity_ratio"]}', "")
                for one in meanflows
            }
        )
        == 1
    )
    assert dumo.labels["objective"] == "DuMo"
    for part in ("data", "net", "train", "evaluate"):
        assert getattr(dumo.spec, part) == getattr(meanflows[0].spec, part)


@pytest.mark.parametrize(("scale", "seeds"), [("smoke", 1), ("laptop", 3)])
def test_the_zoo_is_at_equal_cost(scale: str, seeds: int) -> None:
    cells = list(zoo.cells(scale))
    assert len(cells) == 3 * seeds
    assert len({one.name for one in cells}) == len(cells)
    each = {one.spec.objective.kind: units(one.spec) for one in cells if one.spec.train.seed == 0}
    budget = each["dumo"] * cells[0].spec.train.steps
    for one in cells:
        per_step = each[one.spec.objective.kind]
        assert abs(per_step * one.spec.train.steps - budget) <= per_step / 2 + 1e-9  # to half a step
        assert {1, 2} <= set(one.spec.evaluate.nfe)
    assert len({one.spec.net for one in cells}) == 1
    assert len({one.spec.train.batch for one in cells}) == 1
    assert {one.spec.train.seed for one in cells} == set(range(seeds))
    assert cells[0].spec.train.steps == (20 if scale == "smoke" else load("digits").train.steps)


def test_the_table_of_the_zoo_is_means_over_seeds() -> None:
    keys = ("fd_grey", "kid", "precision", "recall", "accuracy")
    net = load("digits", ["net.width=8", "net.depth=1"]).build()

    def one(cell: Cell) -> Finished:
        seed = cell.spec.train.seed
        rows = [{"nfe": n, "solver": "s", "fd": n + 2.0 * seed, **dict.fromkeys(keys, float(seed))} for n in (1, 2)]
        report = {"step": cell.spec.train.steps, "results": rows, "contrast": []}
        return Finished(cell, run.Trained(cell.spec, Path("x"), net, 7, "w"), report)

    table = zoo.table([one(cell) for cell in zoo.cells("laptop")])
    assert [(row["objective"], row["nfe"]) for row in table] == [(title, n) for title in zoo.ZOO for n in (1, 2)]
    for row in table:
        assert (row["fd"], row["fd_sd"], row["kid"], row["seeds"]) == (row["nfe"] + 2, 2, 1, 3)
    cost = [row["steps"] * row["F_per_step"] for row in table]
    assert max(cost) - min(cost) <= 0.01 * max(cost)


@pytest.mark.parametrize("scale", SCALES)
def test_trajectories_are_of_equal_steps_and_milestones(scale: str) -> None:
    dumo, meanflow = trajectory.cells(scale)
    assert [one.labels["objective"] for one in (dumo, meanflow)] == ["DuMo", "MeanFlow"]
    assert dumo.spec.train == meanflow.spec.train
    for part in ("data", "net", "evaluate"):
        assert getattr(dumo.spec, part) == getattr(meanflow.spec, part)
    assert dumo.spec.train.milestones[0] == 0
    assert max(dumo.spec.train.milestones) < dumo.spec.train.steps


def test_trajectories_are_drawn_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both objectives, both readings, every milestone; the last is what the cell's own report says."""
    monkeypatch.setattr(trajectory, "JUDGED", (1, 2))
    tiny = ["net.width=8", "net.depth=1", "train.batch=4", "train.steps=3", "train.milestones=[0,2]"]
    tiny += ["evaluate.protocol.samples=500", "evaluate.nfe=[1,2]"]
    cells = [Cell(name, load(name, tiny), {"objective": title}) for title, name in trajectory.RECIPES.items()]
    done = [finish(one, tmp_path / "cells", device="cpu", watch=unwatched) for one in cells]
    table = trajectory.table(done)
    keys = [(row["objective"], row["step"], row["reading"], row["nfe"]) for row in table]
    assert keys == list(product(("DuMo", "MeanFlow"), (0, 2, 3), "uv", (1, 2)))
    for one in done:
        last = [row for row in table if row["objective"] == one.cell.labels["objective"] and row["step"] == 3]
        own = [row["fd"] for row in one.report["results"]]
        assert [row["fd"] for row in last if row["reading"] == "u"] == own
    files = trajectory.draw(done, tmp_path / "out")
    assert files[0].name == "fig5.png"
    assert len(files) == len(set(files)) == 1 + 2 * (3 * 2 + 1 + 2)
    assert all(file.is_file() for file in files)
