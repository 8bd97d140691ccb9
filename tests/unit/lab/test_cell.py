"""A cell is trained and measured once: what is finished is kept, what was stopped resumes, what changed begins anew."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

import trap
from dumo.config.load import load
from dumo.lab import cell, fig4b, reproduce
from dumo.lab.cell import Result, sources
from dumo.lab.experiment import Cell, Cost, Plan, read_plan
from dumo.report.evaluation import evaluate
from dumo.run.trainer import Trainer
from dumo.runtime import signals
from dumo.runtime.progress import no_bar
from dumo.training.state import Diverged
from dumo.types import UserError
from trained import train
from unit.data.spy import spied

TINY = ["net.width=8", "net.depth=1", "train.batch=4", "train.save_every=2", "evaluate.protocol.samples=20"]
IN_PROCESSES = cell.run_in_processes


def two(*sets: str) -> Plan:
    """DuMo on moons, in no time, and with these settings."""
    scale = {"seeds": [0], "steps": 4, "cost": "steps", "set": [*TINY, "one-pass"]}
    arms = [{"arm": "a", "recipe": "moons"}, {"arm": "b", "recipe": "moons", "set": ["train.clip=1.0", *sets]}]
    return Plan.model_validate(
        {"name": "two", "title": "A test", "columns": ["arm"], "scales": {"smoke": scale}, "arms": arms}
    )


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are trained, as they are."""
    return spied(monkeypatch, Trainer, "train_step", lambda trainer, *_: trainer.state.step)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are finished in this process, one after another."""

    def run(cells: Sequence[Cell], folder: Path, **_: object) -> dict[str, str]:
        failures: dict[str, str] = {}
        for one in cells:
            try:
                cell.finish(one.spec, cell.cell_folder(one, folder), device="cpu")
            except Diverged as error:
                failures[one.name] = str(error)
        return failures

    monkeypatch.setattr(cell, "run_in_processes", run)


def finished(folder: Path, *more: str) -> Result:
    """A cell, trained and measured."""
    spec = load("moons", [*TINY, "train.steps=4", "evaluate.nfe=[1]", *more])
    one = replace(next(iter(two().cells("smoke"))), spec=spec)
    ((result,), failures) = cell.finish_all([one], folder, jobs=1, device="cpu", bar=no_bar)
    assert not failures
    return result


# --- processes


def faked(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """A cell's process runs this code, which finds the cell's spec and folder in its arguments."""
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> "subprocess.Popen[bytes]":  # noqa: ANN401
        return popen([sys.executable, "-S", "-c", code, *command[4:]], **options)

    monkeypatch.setattr(cell.subprocess, "Popen", start)


def test_a_cell_that_fails_or_is_killed_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(
        monkeypatch,
        "import os, signal, sys\n"
        "name = os.path.basename(sys.argv[2])\n"
        "if name.startswith('a'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if name.startswith('b'): sys.exit('step 3 diverged')\n",
    )
    first, second = two().cells("smoke")
    third = replace(first, name="c-0")
    failures = IN_PROCESSES([first, second, third], tmp_path, jobs=2, device="cpu", bar=no_bar)
    assert failures.keys() == {"a-0", "b-0"}
    assert failures["a-0"] == "its process was ended by SIGKILL, possibly because memory ran out"
    assert failures["b-0"].startswith("step 3 diverged (")


@pytest.mark.usefixtures("default_signals")
def test_a_signal_stops_all_cells_which_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(
        monkeypatch,
        "import os, pathlib, signal, sys, time\n"
        "def save(*_): pathlib.Path(sys.argv[2] + '.saved').touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n",
    )
    first, second = two().cells("smoke")
    waiting = replace(first, name="c-0")
    with signals.listening(), pytest.raises(signals.Stopped):
        IN_PROCESSES([first, second, waiting], tmp_path, jobs=1, device="cpu", bar=no_bar)
    assert [file.name[:3] for file in tmp_path.glob("*.saved")] == ["a-0"]


def test_cells_are_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    faked(monkeypatch, "import sys, pathlib; pathlib.Path(sys.argv[2] + '.device').write_text(sys.argv[3])")
    first, second = two().cells("smoke")
    IN_PROCESSES([first, second, replace(first, name="c-0")], tmp_path, jobs=3, device="auto", bar=no_bar)
    devices = [file.read_text() for file in sorted(tmp_path.glob("*.device"))]
    assert devices == ["cuda:0", "cuda:1", "cuda:0"]


@pytest.mark.slow
def test_a_cell_in_a_process_is_the_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No module of the working folder is imported there."""
    trap.lay(tmp_path)
    monkeypatch.chdir(tmp_path)
    cells = list(two().cells("smoke"))[:1]
    here, _ = cell.finish_all(cells, tmp_path / "here", jobs=1, device="cpu", bar=no_bar)
    monkeypatch.setattr(cell, "run_in_processes", IN_PROCESSES)
    apart, failures = cell.finish_all(cells, tmp_path / "apart", jobs=1, device="cpu", bar=no_bar)
    assert not failures
    assert [one.report["results"] for one in apart] == [one.report["results"] for one in here]
    assert trap.sprung(tmp_path) == []


def test_a_diverged_cell_gives_no_command_that_would_make_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one,) = list(two("train.optimizer.lr=1e6", "train.max_skips=1").cells("smoke"))[1:]
    (tmp_path / "b.yaml").write_text(cell.dump(one.spec))
    with pytest.raises(SystemExit) as ended:
        cell.main(str(tmp_path / "b.yaml"), str(tmp_path / "b"), "cpu")
    assert "diverged" in str(ended.value)
    assert "dumo" not in str(ended.value)


# --- results


@pytest.mark.parametrize(
    ("device", "jobs", "options", "device_type"),
    [("cpu", 1, "--device cpu", "cpu"), ("auto", 2, "--jobs 2", "cuda")],
)
def test_results_name_the_device_and_all_options_of_their_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, jobs: int, options: str, device_type: str
) -> None:
    """Of a machine with a GPU, which `--device cpu` leaves alone."""
    folder = tmp_path / "two words"
    cells = list(two().cells("smoke"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command = reproduce._command("two", "smoke", folder, jobs, device, cells)
    assert command == f"dumo reproduce two --scale smoke --out '{folder}' {options}"
    assert reproduce._origin(command, device, [])["device"] == device_type


def test_the_command_of_results_agrees_to_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_loss.py").write_text("""
from typing import Literal

from dumo.objectives import FlowMatching


class Mine(FlowMatching):
    kind: Literal["my_own_loss:Mine"] = "my_own_loss:Mine"
""")
    monkeypatch.syspath_prepend(tmp_path)
    mine = replace(
        next(iter(two().cells("smoke"))), spec=load("moons-flow-matching", ["objective.kind=my_own_loss:Mine"])
    )
    command = reproduce._command("mine.yaml", "laptop", None, 1, "auto", [mine])
    assert command == "dumo reproduce mine.yaml --scale laptop --trust-code"


def test_results_name_their_commit_and_the_hours_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    cell_result = finished(tmp_path)
    speed = {"step": 1, "steps_per_second": 1 / 3600}
    (cell_result.folder / "speed.jsonl").write_text(json.dumps(speed) + "\n")
    found = reproduce._origin("a command", "cpu", [cell_result, cell_result])
    assert found["training_hours"] == 2 * cell_result.report["step"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (found["commit"] or "").removesuffix("-dirty") == head.stdout[:8]
    monkeypatch.setattr(cell, "__file__", str(tmp_path / "cell.py"))
    assert cell.commit() is None


def test_a_commit_is_dirty_if_code_or_plans_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not if results did, which docs/measure.py writes between two plans."""
    code, plan, results = files = [
        tmp_path / name for name in ("src/dumo/lab/cell.py", "src/dumo/lab/plans/a.yaml", "docs/results/a.json")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(cell, "__file__", str(code))
    clean = cell.commit()
    assert clean is not None
    assert not clean.endswith("-dirty")
    results.write_text("2")
    assert cell.commit() == clean
    for file in (code, plan):
        file.write_text("2")
        assert cell.commit() == f"{clean}-dirty"
        file.write_text("1")


@pytest.mark.usefixtures("steps")
def test_commits_are_those_of_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the day on which a table is made of finished cells."""
    monkeypatch.setattr(cell, "commit", lambda: "then")
    first = finished(tmp_path)
    monkeypatch.setattr(cell, "commit", lambda: "now")
    assert finished(tmp_path).commit == first.commit == "then"
    other = finished(tmp_path, "net.width=9")
    assert reproduce._origin("a command", "cpu", [first, first, other])["commit"] == "then, now"


# --- what is finished, stopped or changed


def test_what_is_finished_is_kept_and_what_was_stopped_resumes(tmp_path: Path, steps: list[int]) -> None:
    first = finished(tmp_path)
    kept = [first.folder / "evaluation.json", *(first.folder / "checkpoints").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert finished(tmp_path).report == first.report
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    (first.folder / "evaluation.json").unlink()  # trained, but not measured
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3]
    (first.folder / "evaluation.json").unlink()
    shutil.rmtree(first.folder / "checkpoints/step-00000004")
    assert finished(tmp_path).report == first.report
    assert steps == [0, 1, 2, 3, 2, 3]


def test_a_cell_with_files_is_kept(tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan gives them by relative paths, and its run.yaml by absolute ones."""
    monkeypatch.chdir(tmp_path)
    teacher = finished(Path("teachers")).folder
    for _ in range(2):
        finished(tmp_path / "pupils", f"teacher={{kind: run, source: {teacher}}}")
    assert steps == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.nightly
def test_what_is_measured_otherwise_is_measured_again(tmp_path: Path, steps: list[int]) -> None:
    """In the same folder, without training; what trains otherwise has a folder of its own."""
    first = finished(tmp_path)
    evaluate(first.trained, nfe=[3, 4], seed=5, solver="euler")  # someone looks at a cell with dumo evaluate
    assert finished(tmp_path).report == first.report
    for more in ("evaluate.protocol.samples=21", "evaluate.seed=1", "evaluate.nfe=[2]", "sample.solver.m=0.4"):
        found = finished(tmp_path, more)
        spec, report = found.trained.spec, found.report
        assert (report["samples"], report["seed"]) == (spec.evaluate.protocol.samples, spec.evaluate.seed)
        assert report["solver"] == spec.sample.solver.model_dump()
        assert [row["nfe"] for row in report["results"]] == list(spec.evaluate.nfe)
    assert len(steps) == 4
    assert finished(tmp_path, "net.width=9").folder != first.folder
    assert len(steps) == 8


def test_a_cell_that_was_trained_on_with_other_settings_is_refused(tmp_path: Path) -> None:
    """It is no longer the run of its arm."""
    first = finished(tmp_path)
    changed = first.trained.spec.train.model_copy(update={"steps": 6, "clip": 0.5})
    train(first.trained.spec.model_copy(update={"train": changed}), first.folder, device="cpu")
    with pytest.raises(UserError):
        finished(tmp_path)


def own_objective(factor: float) -> str:
    """A file with an objective, whose loss is multiplied."""
    return f"""
from typing import Literal

from dumo.objectives import FlowMatching
from dumo.types import Frozen, Net, NoisyBatch, Terms


class Mine(FlowMatching):
    kind: Literal["my_scaled_loss:Mine"] = "my_scaled_loss:Mine"

    def loss(self, net: Net, ref: Frozen, b: NoisyBatch) -> Terms:
        return Terms({factor} * super().loss(net, ref, b).loss)
"""


def test_a_cell_is_trained_anew_if_its_code_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is named after the code, too."""
    monkeypatch.syspath_prepend(tmp_path)
    folders: list[Path] = []
    for factor in (1.0, 1.0, 0.9):
        (tmp_path / "my_scaled_loss.py").write_text(own_objective(factor))
        sys.modules.pop("my_scaled_loss", None)
        spec = cell.resolve(load("moons-flow-matching", [*TINY, "objective.kind=my_scaled_loss:Mine"]))
        folders.append(cell.cell_folder(replace(next(iter(two().cells("smoke"))), spec=spec), tmp_path))
    assert folders[0] == folders[1] != folders[2]


# --- failures


def test_what_begins_from_a_failed_cell_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two().cells("smoke")
    start = SimpleNamespace(source="a-0")
    spec = SimpleNamespace(start=start, teacher=None, data=None, evaluate=first.spec.evaluate)
    third = replace(first, name="c-0", spec=cast(Any, spec))
    monkeypatch.setattr(cell, "run_in_processes", lambda cells, *_, **__: {"a-0": "step 3 diverged"})
    monkeypatch.setattr(cell, "read_result", results_of({"b-0"}))
    results, failures = cell.finish_all([first, second, third], tmp_path, jobs=1, device="cpu", bar=no_bar)
    assert [one.cell.name for one in results] == ["b-0"]
    assert [*failures] == ["a-0", "c-0"]


def results_of(
    names: set[str], cards: dict[str, dict[str, Any]] | None = None
) -> Callable[[Cell, Path, str], Result | None]:
    """A stand-in for `read_result` that finds these cells finished."""

    def read_result(one: Cell, folder: Path, device: str) -> Result | None:
        card = (cards or {}).get(one.name, {})
        return Result(one, folder / one.name, {"card": card}) if one.name in names else None

    return read_result


def test_a_point_that_diverges_leaves_the_table_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "read_plan", lambda name: two("train.optimizer.lr=1e6", "train.max_skips=1"))
    report = reproduce.reproduce("two", "smoke", tmp_path, device="cpu")
    assert [(row["arm"], row["failed"]) for row in report["table"]] == [("a", "")]
    assert "\nb-0: " in (tmp_path / "table.md").read_text()
    assert "diverged" in report["failed"]["b-0"]
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert [Path(name).name for name in report["files"]] == ["two.png", "table.md", "results.json"]
    assert all(Path(name).is_file() for name in report["files"])


def test_a_plan_whose_cells_all_fail_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "read_plan", lambda name: two())
    monkeypatch.setattr(cell, "run_in_processes", lambda cells, *_, **__: {one.name: "no disk" for one in cells})
    with pytest.raises(UserError, match="a-0: no disk\nb-0: no disk"):
        reproduce.reproduce("two", "smoke", tmp_path, device="cpu")


@pytest.mark.usefixtures("steps")
def test_the_table_is_there_if_a_picture_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no room for a picture")

    monkeypatch.setattr(reproduce, "read_plan", lambda name: two())
    monkeypatch.setattr(reproduce.arm_picture, "ranking_chart", fail)
    with pytest.raises(OSError, match="no room for a picture"):
        reproduce.reproduce("two", "smoke", tmp_path, device="cpu")
    assert "| a |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["table"]


# --- cells that are compared, and cells that begin from others


@pytest.mark.slow
def test_cells_that_were_measured_otherwise_make_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "read_plan", lambda name: two("evaluate.seed=1"))
    with pytest.raises(UserError, match="seed"):
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
    monkeypatch.setattr(cell.fill_caches, "ensure_cache", lambda *_, **__: None)
    cells = [
        replace(next(iter(two().cells("smoke"))), name=name, spec=load(recipe, [word.format(*which) for word in words]))
        for name, which in (("a", (0, "train")), ("b", (1, "test")), ("c", (1, "test")))
    ]
    cards = {name: {"reference_sha256": sha, "solver": {}} for name, sha in (("a", "x"), ("b", "y"), ("c", "y"))}
    monkeypatch.setattr(cell, "read_result", results_of({"a", "b", "c"}, cards))
    results, _ = cell.finish_all(cells, tmp_path, jobs=1, device="cpu", bar=no_bar)
    assert len(results) == len(cells)
    cards["c"]["reference_sha256"] = "x"
    with pytest.raises(UserError, match="reference_sha256"):
        cell.finish_all(cells, tmp_path, jobs=1, device="cpu", bar=no_bar)


@pytest.mark.slow
def test_a_cell_is_made_after_those_it_begins_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []

    def read_result(one: Cell, folder: Path, device: str) -> Result:
        assert not sources(one, names)
        for part in (one.spec.start, one.spec.teacher):
            assert part is None or part.source in {str(folder / name) for name in made}
        made.append(one.name)
        return Result(one, folder / one.name, {"card": {}})

    monkeypatch.setattr(Cost, "forwards_per_step", 4.0)
    monkeypatch.setattr(cell, "read_result", read_result)
    monkeypatch.setattr(cell, "comparison", SimpleNamespace(require_comparable=lambda cards: None))
    cells = list(read_plan("stages").cells("smoke"))
    names = [one.name for one in cells]
    done, _ = cell.finish_all(cells[::-1], tmp_path, jobs=1, device="cpu", bar=no_bar)
    assert [one.cell.name for one in done] == names[::-1]
    assert sorted(made) == sorted(names)
    last = cast(Any, next(one.cell.spec for one in done if one.cell.labels["stages"].endswith("CMT, then DuMo")))
    assert last.start.source == str(tmp_path / "start-1")


# --- Figure 4b


def test_steps_are_timed_one_after_another(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--jobs"):
        reproduce.reproduce("fig4b", "smoke", tmp_path / "out", jobs=2, device="cpu")


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
