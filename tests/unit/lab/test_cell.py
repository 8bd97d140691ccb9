"""A cell is trained and measured once: what is finished is kept, what was stopped goes on, what changed begins anew."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from dumo.config.load import load
from dumo.lab import cell, fig4b, origin, reproduce
from dumo.lab.cell import Result, finish, sources
from dumo.lab.plan import Cell, Cost, Plan, read_plan
from dumo.objectives import DuMo
from dumo.report.evaluate import evaluate
from dumo.run.train import train
from dumo.runtime.progress import no_bar
from dumo.training import loop
from dumo.training.state import Diverged
from dumo.types import Terms, UserError
from unit.data.spy import spied

TINY = ["net.width=8", "net.depth=1", "train.batch=4", "train.save_every=2", "evaluate.protocol.samples=20"]


def two(*sets: str) -> Plan:
    """DuMo on moons, in no time, and with these settings."""
    scale = {"steps": 4, "seeds": [0], "set": [*TINY, "one-pass"]}
    arms = [
        {"labels": {"arm": name}, "recipe": "moons", "set": more}
        for name, more in (("a", []), ("b", ["train.clip=1.0", *sets]))
    ]
    return Plan.model_validate(
        {"name": "two", "title": "A test", "columns": ["arm"], "scales": {"smoke": scale}, "arms": arms}
    )


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are trained, as they are."""
    return spied(monkeypatch, loop, "train_step", lambda state, *_: state.step)


def finished(folder: Path, *more: str) -> Result:
    """A cell, trained and measured."""
    one = next(iter(two().cells("smoke")))
    spec = load("moons", [*TINY, "train.steps=4", "evaluate.nfe=[1]", *more])
    return finish(replace(one, spec=spec), folder, device="cpu", bar=no_bar)


@pytest.mark.nightly
def test_cells_side_by_side_are_those_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    """Made in processes of their own: here no step is trained, and the numbers are the same."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # a core each, as the tests have
    monkeypatch.setattr(reproduce, "read_plan", lambda name: two())
    apart = reproduce.reproduce("two", "smoke", tmp_path / "apart", jobs=2)
    assert steps == []
    assert apart["origin"]["command"].endswith("--jobs 2")
    assert apart["table"] == reproduce.reproduce("two", "smoke", tmp_path / "in turn")["table"]
    assert steps


@pytest.mark.parametrize(
    ("device", "jobs", "options", "device_type"),
    [("cpu", 1, "--device cpu", "cpu"), ("auto", 2, "--jobs 2", "cuda")],
)
def test_results_name_the_device_and_all_options_of_their_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, jobs: int, options: str, device_type: str
) -> None:
    """Of a machine with a GPU, which `--device cpu` leaves alone."""
    folder = tmp_path / "two words"
    view = reproduce.View(
        run_cells=lambda cells, folder, **options: [],
        make_table=lambda plan, results: [{"arm": "a"}],
        make_charts=lambda plan, table: {},
        draw_pictures=lambda plan, results, folder: [],
    )
    monkeypatch.setitem(reproduce.VIEWS, "two", view)
    monkeypatch.setattr(reproduce, "read_plan", lambda name: two())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = reproduce.reproduce("two", "smoke", folder, jobs=jobs, device=device)
    assert report["origin"]["device"] == device_type
    assert report["origin"]["command"] == f"dumo reproduce two --scale smoke --out '{folder}' {options}"


def test_results_name_their_commit_and_the_hours_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    cell_result = finished(tmp_path)
    speed = {"step": 1, "steps_per_second": 1 / 3600}
    (cell_result.trained.folder / "speed.jsonl").write_text(json.dumps(speed) + "\n")
    found = reproduce._origin("a command", "cpu", [cell_result, cell_result])
    assert found["training_hours"] == 2 * cell_result.trained.step
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (found["commit"] or "").removesuffix("-dirty") == head.stdout[:8]
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "origin.py"))
    assert origin.commit() is None


def test_a_commit_is_dirty_where_code_or_plans_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where results did, which `make measured` writes between two plans."""
    code, plan, results = files = [
        tmp_path / name for name in ("src/dumo/lab/origin.py", "src/dumo/lab/plans/a.yaml", "docs/results/a.json")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(origin, "__file__", str(code))
    clean = origin.commit()
    assert clean is not None
    assert not clean.endswith("-dirty")
    results.write_text("2")
    assert origin.commit() == clean
    for file in (code, plan):
        file.write_text("2")
        assert origin.commit() == f"{clean}-dirty"
        file.write_text("1")


@pytest.mark.usefixtures("steps")
def test_commits_are_those_of_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the day on which a table is made of finished cells."""
    monkeypatch.setattr(origin, "commit", lambda: "then")
    first = finished(tmp_path)
    monkeypatch.setattr(origin, "commit", lambda: "now")
    assert finished(tmp_path).origin == first.origin
    other = finished(tmp_path, "net.width=9")
    assert reproduce._origin("a command", "cpu", [first, first, other])["commit"] == "then, now"


@pytest.mark.usefixtures("steps")
def test_a_run_of_another_objective_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else old numbers would stand in a table as those of the objective of today."""
    folder = finished(tmp_path).trained.folder
    plain = DuMo.loss
    monkeypatch.setattr(DuMo, "loss", lambda self, net, ref, b: Terms(0.9 * plain(self, net, ref, b).loss))
    with pytest.raises(UserError, match=r"another version of its objective: move .* away"):
        finished(tmp_path)
    monkeypatch.undo()
    folder.with_name(f"{folder.name}.json").unlink()
    with pytest.raises(UserError, match=r"is not there: move .* away"):
        finished(tmp_path)


def test_what_is_finished_is_kept_and_what_was_stopped_goes_on(tmp_path: Path, steps: list[int]) -> None:
    first = finished(tmp_path)
    kept = [first.trained.folder / "evaluation.json", *(first.trained.folder / "checkpoints").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert finished(tmp_path).report == first.report
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    (first.trained.folder / "evaluation.json").unlink()  # trained, but not measured
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3]
    (first.trained.folder / "evaluation.json").unlink()
    shutil.rmtree(first.trained.folder / "checkpoints/step-00000004")
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3, 2, 3]


@pytest.mark.nightly
def test_what_is_measured_otherwise_is_measured_again(tmp_path: Path, steps: list[int]) -> None:
    """In the same folder, without training; what trains otherwise has a folder of its own."""
    first = finished(tmp_path)
    evaluate(first.trained, nfe=[3, 4], seed=5, solver="euler")  # someone looks at a cell with dumo evaluate
    assert finished(tmp_path).report == first.report
    for more in ("evaluate.protocol.samples=21", "evaluate.seed=1", "evaluate.nfe=[2]", "sample.solver.m=0.4"):
        found = finished(tmp_path, more)
        spec, report = found.trained.run, found.report
        assert (report["samples"], report["seed"]) == (spec.evaluate.protocol.samples, spec.evaluate.seed)
        assert report["solver"] == spec.sample.solver.model_dump()
        assert [row["nfe"] for row in report["results"]] == list(spec.evaluate.nfe)
    assert len(steps) == 4
    assert finished(tmp_path, "net.width=9").trained.folder != first.trained.folder
    assert len(steps) == 8


def test_a_cell_that_was_trained_on_with_other_settings_is_refused(tmp_path: Path) -> None:
    """As by the command that a diverged run prints: it is no longer the run of its arm."""
    first = finished(tmp_path)
    changed = first.trained.run.train.model_copy(update={"steps": 6, "clip": 0.5})
    train(first.trained.run.model_copy(update={"train": changed}), first.trained.folder, device="cpu", accept=True)
    with pytest.raises(UserError, match=r"was continued with another train\.\w+, so it is no longer"):
        finished(tmp_path)


def test_cells_after_one_that_diverges_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that begin from it are not."""
    first, second = two().cells("smoke")
    start = SimpleNamespace(source="a-0")
    spec = SimpleNamespace(start=start, teacher=None, data=None, evaluate=first.spec.evaluate)
    third = replace(first, name="c-0", spec=cast(Any, spec))

    def finish(one: Cell, folder: Path, **_: object) -> Result:
        if one.name == "a-0":
            raise Diverged("step 3 diverged")
        return Result(one, cast(Any, None), {"card": {}})

    monkeypatch.setattr(cell, "finish", finish)
    with pytest.raises(cell.CellsDiverged, match="a-0: step 3 diverged\n") as raised:
        cell.finish_all([first, second, third], tmp_path, jobs=1, device="cpu", bar=no_bar)
    assert [one.cell.name for one in raised.value.results] == ["b-0"]
    assert [*raised.value.messages] == ["a-0", "c-0"]


@pytest.mark.parametrize("needs_all_cells", [False, True])
def test_a_point_that_diverges_leaves_the_table_of_the_others(
    needs_all_cells: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a table compares with that point. Columns may have any names."""
    view = reproduce.View(make_charts=lambda plan, table: {}, needs_all_cells=needs_all_cells)
    monkeypatch.setitem(reproduce.VIEWS, "two", view)
    monkeypatch.setattr(reproduce, "read_plan", lambda name: two("train.optimizer.lr=1e6", "train.max_skips=1"))
    if needs_all_cells:
        with pytest.raises(cell.CellsDiverged, match="b-0: "):
            reproduce.reproduce("two", "smoke", tmp_path, device="cpu")
        return
    report = reproduce.reproduce("two", "smoke", tmp_path, device="cpu")
    assert [(row["arm"], "failed" in row) for row in report["table"]] == [("a", False)]
    assert "\nb-0: " in (tmp_path / "table.md").read_text()
    assert "diverged" in report["diverged"]["b-0"]


def test_nothing_is_trained_where_a_cell_could_not_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of ADM's file, whose variable is not set; Inception is there."""
    weights = tmp_path / "inception.safetensors"
    weights.touch()
    monkeypatch.setenv("DUMO_INCEPTION", str(weights))
    monkeypatch.delenv("DUMO_ADM", raising=False)
    first, second = two().cells("smoke")
    cells = [first, replace(second, spec=load("imagenet256-xl2"))]
    with pytest.raises(UserError, match=r"b-0 cannot be judged: .* ADM's reference, \$DUMO_ADM/VIRTUAL_imagenet256"):
        cell.finish_all(cells, tmp_path / "cells", jobs=1, device="cpu", bar=no_bar)
    assert not (tmp_path / "cells").exists()


def test_a_finished_plan_needs_nothing_to_judge_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table is made again on a machine without weights of Inception."""
    cells = list(two().cells("smoke"))
    made = cell.finish_all(cells, tmp_path, jobs=1, device="cpu", bar=no_bar)
    monkeypatch.setattr(cell, "missing_to_judge", lambda run, num_images: "the weights of Inception")
    again = cell.finish_all(cells, tmp_path, jobs=1, device="cpu", bar=no_bar)
    assert [result.report for result in again] == [result.report for result in made]
    (made[1].trained.folder / "evaluation.json").unlink()
    with pytest.raises(UserError, match="b-0 cannot be judged"):
        cell.finish_all(cells, tmp_path, jobs=1, device="cpu", bar=no_bar)


def test_a_cell_is_trained_anew_where_its_code_is_another(tmp_path: Path, steps: list[int]) -> None:
    planned = replace(next(iter(two().cells("smoke"))), code="1")
    for code in ("1", "1", "2"):
        finish(replace(planned, code=code), tmp_path, device="cpu", bar=no_bar)
    assert steps == [*range(4), *range(4)]


@pytest.mark.slow
def test_cells_that_were_measured_otherwise_make_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "read_plan", lambda name: two("evaluate.seed=1"))
    with pytest.raises(UserError, match=r"not measured alike(.|\n)*  seed: 0 in a-0; 1 in b-0\n"):
        reproduce.reproduce("two", "smoke", tmp_path / "out")
    assert not (tmp_path / "out/table.md").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("digits", ("data.held=359", "data.fold={0}")), ("cifar10-latents", ("evaluate.split={1}",))],
    ids=["fold", "split"],
)
def test_cells_of_other_folds_or_splits_have_other_references(
    recipe: str, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fold is held out of its own training; within one all must be judged against the same images."""
    monkeypatch.setattr(cell.encode, "ensure_cache", lambda *_, **__: None)
    cells = [
        replace(next(iter(two().cells("smoke"))), name=name, spec=load(recipe, [word.format(*which) for word in words]))
        for name, which in (("a", (0, "train")), ("b", (1, "test")), ("c", (1, "test")))
    ]

    def finish(one: Cell, folder: Path, **_: object) -> Result:
        seen = {"reference_sha256": references[one.name], "solver": {}}
        return Result(one, cast(Any, None), {"card": seen})

    monkeypatch.setattr(cell, "finish", finish)
    references = {"a": "x", "b": "y", "c": "y"}
    assert len(cell.finish_all(cells, tmp_path, jobs=1, device="cpu", bar=no_bar)) == len(cells)
    references["c"] = "x"
    with pytest.raises(UserError, match="reference_sha256: y in b; x in c"):
        cell.finish_all(cells, tmp_path, jobs=1, device="cpu", bar=no_bar)


@pytest.mark.slow
def test_a_cell_is_made_after_those_it_begins_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []

    def finish(one: Cell, folder: Path, **_: object) -> Result:
        assert not sources(one, names)
        for part in (one.spec.start, one.spec.teacher):
            assert part is None or part.source in {str(folder / name) for name in made}
        made.append(one.name)
        trained: Any = SimpleNamespace(folder=folder / one.name)
        return Result(one, trained, {"card": {}})

    monkeypatch.setattr(Cost, "units", 4.0)
    monkeypatch.setattr(cell, "finish", finish)
    monkeypatch.setattr(cell, "compare", SimpleNamespace(require_comparable=lambda cards: None))
    cells = list(read_plan("stages").cells("smoke"))
    names = [one.name for one in cells]
    done = cell.finish_all(cells[::-1], tmp_path, jobs=1, device="cpu", bar=no_bar)
    assert [one.cell.name for one in done] == names[::-1]
    assert sorted(made) == sorted(names)
    last = cast(Any, next(one.cell.spec for one in done if one.cell.labels["stages"].endswith("CMT, then DuMo")))
    assert last.start.source == str(tmp_path / "start-1")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "scale", "jobs", "words"),
    [
        ("fig4b", "paper", 1, "needs a GPU"),
        ("fig4b", "smoke", 2, "leave out --jobs"),
        ("fig4a", "paper", 1, "cannot be judged: .* needs the weights of Inception"),
    ],
)
def test_what_cannot_be_timed_or_read(
    name: str, scale: str, jobs: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("DUMO_LATENTS", "IMAGENET", "DUMO_DATA", "DUMO_INCEPTION"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=words):
        reproduce.reproduce(name, scale, tmp_path / "out", jobs=jobs, device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
def test_steps_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One size, the paper's two in three ways and the plain step, two rounds."""
    chosen = read_plan("fig4b")
    monkeypatch.setattr(reproduce, "read_plan", lambda name: chosen.model_copy(update={"arms": chosen.arms[:4]}))
    results = reproduce.reproduce("fig4b", "smoke", tmp_path, device="cpu")
    names = [fig4b.FLOW_MATCHING, fig4b.DUMO, fig4b.MEANFLOW, fig4b.MEANFLOW_FEWER_ROWS]
    assert [row["objective"] for row in results["table"]] == names
    plain, dumo, meanflow, sparing = (row["F_per_step"] for row in results["table"])
    assert meanflow > dumo > sparing > plain
    assert all(row["low"] <= row["time_over_flow_matching"] <= row["high"] for row in results["table"])
    assert results["cells"][0]["card"]["rounds"] == 2
    for name in ("fig4b.png", "fig4b-all.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
