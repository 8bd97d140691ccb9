"""Sheets show what the weights make of one noise, as `dumo sample` does, and change nothing of the training."""

import signal
from contextlib import suppress
from pathlib import Path

import pytest

from dumo.config.load import load
from dumo.config.spec import Run
from dumo.report.sample_to_files import sample_to_files
from dumo.run import sheet
from dumo.run.folder import RunFolder
from dumo.run.sheet import RenderSheets
from dumo.run.trained import TrainedRun
from dumo.run.trainer import Trainer
from dumo.run.weights import build, load_run
from dumo.runtime import signals
from dumo.training.state import begin
from e2e.shell import tree
from trained import train
from unit.run import known


def tiny(name: str, sheets: str, *more: str) -> Run:
    """A recipe made small, of six steps."""
    words = ("train.steps=6", "train.log_every=3", "sample.nfe=[1,2]", f"train.sheets={sheets}")
    return known.tiny(name, *words, *more)


def drawn(folder: Path) -> list[str]:
    """The sheets of a run."""
    return sorted(path.name for path in (folder / "sheets").iterdir())


@pytest.mark.nightly
@pytest.mark.parametrize("average", ["[{decay: 0.9}]", "[]"])  # what is shown: one that is evaluated, one that trains
def test_sheets_are_samples_and_change_nothing(average: str, tmp_path: Path) -> None:
    train(tiny("digits", "[]", f"train.ema={average}"), tmp_path / "without")
    train(tiny("digits", "[2,6]", f"train.ema={average}"), tmp_path / "with")
    assert drawn(tmp_path / "with") == [f"step-{step:08d}-nfe{nfe}.png" for step in (2, 6) for nfe in (1, 2)]
    for file in (tmp_path / "without/checkpoints").rglob("*.safetensors"):
        assert (tmp_path / "with" / file.relative_to(tmp_path / "without")).read_bytes() == file.read_bytes(), file
    assert (tmp_path / "with/metrics.jsonl").read_bytes() == (tmp_path / "without/metrics.jsonl").read_bytes()
    opened = load_run(str(tmp_path / "with"), device="cpu")
    samples = sample_to_files(opened, tmp_path / "samples", count=sheet.SHEET_COUNT)
    sheets = [tmp_path / f"with/sheets/step-00000006-nfe{nfe}.png" for nfe in (1, 2)]
    assert [path.read_bytes() for path in sheets] == [path.read_bytes() for path in samples]


@pytest.mark.slow
def test_a_stop_leaves_the_same_sheets(tmp_path: Path) -> None:
    train(tiny("moons", "2"), tmp_path / "whole")
    train(tiny("moons", "2", "train.steps=3"), tmp_path / "parts")
    train(tiny("moons", "2"), tmp_path / "parts")
    names = drawn(tmp_path / "whole")
    assert names == drawn(tmp_path / "parts") == [f"step-{n:08d}-nfe{nfe}.png" for n in (2, 4, 6) for nfe in (1, 2)]
    for name in names:
        assert (tmp_path / "parts/sheets" / name).read_bytes() == (tmp_path / "whole/sheets" / name).read_bytes()


@pytest.mark.nightly
@pytest.mark.parametrize("step", [4, 6])  # the last one ends by itself
@pytest.mark.parametrize(("where", "what"), [(Trainer, "train_step"), (RenderSheets, "sample")])
def test_a_signal_in_a_step_with_a_sheet_loses_none(
    where: object, what: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that a stop leaves is of this step, or, where the sheet was begun, of the next one."""
    work, raised = getattr(where, what), list[int]()

    def stop(*given: object, **more: object) -> object:
        state = next(getattr(one, "state", one) for one in given if isinstance(one, Trainer | TrainedRun))
        if not raised and state.step == (step if where is RenderSheets else step - 1):
            raised.append(step)
            signal.raise_signal(signal.SIGTERM)
        return work(*given, **more)

    train(tiny("moons", "2"), tmp_path / "whole")
    monkeypatch.setattr(where, what, stop)
    with suppress(signals.Stopped), signals.listening():
        train(tiny("moons", "2"), tmp_path / "parts")
    train(tiny("moons", "2"), tmp_path / "parts")
    assert raised
    assert tree(tmp_path / "parts/sheets") == tree(tmp_path / "whole/sheets")


def test_what_goes_wrong_with_a_sheet_is_told_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*what: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sheet, "write_samples", full)
    told: list[str] = []
    assert train(tiny("moons", "[4]", "sample.nfe=[1]"), tmp_path / "run", print_line=told.append).step == 6
    assert told[-1] == "warning: no sheet step-00000004-nfe1: [Errno 28] No space left on device"


def test_a_pass_has_as_many_rows_as_in_training(tmp_path: Path) -> None:
    run = tiny("moons", "[2]", "train.micro_batch=2")
    state = begin(build(run), run.train)
    trained = TrainedRun(run, RunFolder(tmp_path), state.sampled_net)
    rows: list[int] = []
    state.sampled_net.register_forward_hook(lambda net, inputs, heads: rows.append(len(inputs[0])))
    assert len(RenderSheets(run).sample(trained, nfe=1, count=7)) == 7
    assert rows == [2, 2, 2, 1]


def test_a_codec_that_is_not_there_is_refused_before_the_first_step() -> None:
    words = ["data.codec.weights=/not/there", "data.root=/nor/this"]
    RenderSheets(load("cifar10-latents", words))
    with pytest.raises(FileNotFoundError, match="/not/there"):
        RenderSheets(load("cifar10-latents", [*words, "train.sheets=100"]))


def test_of_many_classes_some_from_end_to_end() -> None:
    assert sheet.sheet_conditions(load("digits").conditions).tolist() == [i % 10 for i in range(64)]
    many = sheet.sheet_conditions(load("imagenet256-xl2").conditions).tolist()
    assert (many[0], many[-1], len(set(many))) == (0, 984, 64)
    assert sheet.sheet_conditions(load("moons").conditions).tolist() == [0] * 2000
