"""A plan is made once: what is finished is kept, what was stopped goes on, what has changed is made anew."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dumo import reproduce as module
from dumo import run
from dumo.config.load import load
from dumo.config.spec import Run
from dumo.reproduce import (
    PLANS,
    RATIOS,
    Cell,
    Finished,
    Plan,
    fig3_cells,
    finish,
    markdown,
    reproduce,
    units,
    zoo_cells,
    zoo_table,
)
from dumo.types import UserError

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
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are trained in, as they are."""
    folders: list[str] = []
    original = run.train

    def train(spec: Run, folder: Path, **rest: object) -> object:
        folders.append(folder.name)
        return original(spec, folder, **rest)

    monkeypatch.setattr(run, "train", train)
    return folders


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


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PLANS, "test", plan(cell()))
    reproduce("test", "laptop")
    assert Path("runs/reproduce/test-laptop/results.json").is_file()


def test_finished_cells_are_kept(tmp_path: Path, trainings: list[str]) -> None:
    first = finish(cell(), tmp_path, device="cpu", watch=run.unwatched)
    folder = first.trained.folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    second = finish(cell(), tmp_path, device="cpu", watch=run.unwatched)
    assert second.report == first.report
    assert len(trainings) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_stopped_cell_goes_on(tmp_path: Path, trainings: list[str]) -> None:
    first = finish(cell(), tmp_path, device="cpu", watch=run.unwatched)
    folder = first.trained.folder
    shutil.rmtree(folder / "checkpoints/step-00000004")
    (folder / "evaluation.json").unlink()
    second = finish(cell(), tmp_path, device="cpu", watch=run.unwatched)
    assert second.report == first.report
    assert trainings == [folder.name] * 2


def test_a_cell_that_was_trained_but_not_judged(tmp_path: Path, trainings: list[str]) -> None:
    first = finish(cell(), tmp_path, device="cpu", watch=run.unwatched)
    (first.trained.folder / "evaluation.json").unlink()
    assert finish(cell(), tmp_path, device="cpu", watch=run.unwatched).report == first.report
    assert len(trainings) == 1


def test_a_changed_spec_is_another_cell(tmp_path: Path, trainings: list[str]) -> None:
    for more in ("train.seed=0", "train.seed=1", "train.steps=5", "evaluate.protocol.samples=21"):
        finish(cell("a", more), tmp_path, device="cpu", watch=run.unwatched)
    assert len(set(trainings)) == len(trainings) == 4
    assert all(name.startswith("a-") for name in trainings)


def test_a_judgement_by_other_means_is_not_taken(tmp_path: Path) -> None:
    first = finish(cell(), tmp_path, device="cpu", watch=run.unwatched)
    run.evaluate(first.trained, nfe=[3, 4], seed=5)  # someone looks at a cell with dumo evaluate
    assert finish(cell(), tmp_path, device="cpu", watch=run.unwatched).report == first.report


def test_wrong_names_are_refused_before_any_work(tmp_path: Path, trainings: list[str]) -> None:
    for name, scale, said in (("fig33", "smoke", "'fig3'"), ("fig3", "smoky", "'smoke'"), ("zoo", "", "smoke, laptop")):
        with pytest.raises(UserError, match=said):
            reproduce(name, scale, tmp_path / "out")
    assert trainings == []
    assert list(tmp_path.iterdir()) == []


def test_markdown() -> None:
    rows = [{"a": 1, "b": 0.123456, "c": None}, {"a": 20, "b": 1e-9, "c": "x"}]
    lines = markdown("T", rows).splitlines()
    assert lines == ["# T", "", "| a | b | c |", "| --- | --- | --- |", "| 1 | 0.1235 | None |", "| 20 | 1e-09 | x |"]


@pytest.mark.parametrize("scale", module.SCALES)
def test_figure_3_varies_the_ratio_alone(scale: str) -> None:
    *meanflows, dumo = fig3_cells(scale)
    assert [one.labels["velocity_ratio"] for one in meanflows] == list(RATIOS)
    assert [one.spec.model_dump()["objective"]["times"]["velocity_ratio"] for one in meanflows] == list(RATIOS)
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
    cells = list(zoo_cells(scale))
    assert len(cells) == 3 * seeds
    assert len({one.name for one in cells}) == len(cells)
    each = {one.spec.objective.kind: units(one.spec) for one in cells if one.spec.train.seed == 0}
    budget = each["dumo"] * cells[0].spec.train.steps
    for one in cells:
        per_step = each[one.spec.objective.kind]
        assert one.labels["units"] == per_step
        assert abs(per_step * one.spec.train.steps - budget) <= per_step / 2 + 1e-9  # to half a step
        assert one.spec.evaluate.nfe == (1, 2, 4)
    assert len({one.spec.net for one in cells}) == 1
    assert len({one.spec.train.batch for one in cells}) == 1
    assert {one.spec.train.seed for one in cells} == set(range(seeds))
    assert cells[0].spec.train.steps == (20 if scale == "smoke" else load("digits").train.steps)


def test_the_table_of_the_zoo_is_means_over_seeds() -> None:
    spec = load("digits")
    keys = ("kid", "precision", "recall", "accuracy")

    def one(title: str, seed: int) -> Finished:
        rows = [{"nfe": n, "solver": "s", "fd": n + 2.0 * seed, **dict.fromkeys(keys, float(seed))} for n in (1, 2)]
        labels = {"objective": title, "units": 5.0}
        trained = run.Trained(spec, Path("x"), tiny.build(), 7, "w")
        return Finished(Cell(title, spec, labels), trained, {"step": 7, "results": rows})

    tiny = load("digits", ["net.width=8", "net.depth=1"])
    table = zoo_table([one(title, seed) for title in module.ZOO for seed in (0, 1, 2)])
    assert [(row["objective"], row["nfe"]) for row in table] == [(title, n) for title in module.ZOO for n in (1, 2)]
    assert [(row["fd"], row["fd_sd"], row["kid"], row["seeds"]) for row in table[:2]] == [(3, 2, 1, 3), (4, 2, 1, 3)]
