"""The strip shows one noise while the net learns, and changes nothing of the training."""

from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dumo.config.spec import Run
from dumo.report.sheet import Sheets, is_strip_due, read_strip
from dumo.report.strip import MAX_MOMENTS, draw_strip, strip_samples
from dumo.run.train import train as train_run
from dumo.run.weights import open_run
from unit.run import known

train = partial(train_run, sheets=Sheets)


def tiny(name: str, *more: str) -> Run:
    """A recipe made small, of twenty steps."""
    fields = ("net.attention=2",) if name == "digits" else ()
    return known.tiny(name, *fields, "train.steps=20", "train.log_every=4", "train.save_every=20", *more)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights do not move."""
    folder = tmp_path_factory.mktemp("still") / "run"
    train(tiny("digits", "train.optimizer.lr=1e-30", "sample.nfe=[2,1]"), folder)
    return folder


def test_moments_are_of_one_noise(still: Path) -> None:
    """While the weights stay, so do all pictures: those of the training, and those of the report."""
    assert [path.name for path in sorted((still / "strip").iterdir())] == [
        f"step-{step:08d}-nfe1-seed0.safetensors" for step in (8, 16)
    ]
    opened = open_run(str(still), device="cpu")
    samples = strip_samples(opened)
    assert [*samples] == [8, 16, 20]
    assert len(samples[8]) == 6
    assert (samples[8][0] - samples[8][1]).abs().max() > 0.1  # each of its own noise
    for x in samples.values():
        torch.testing.assert_close(x, samples[20], rtol=1e-3, atol=1e-3)  # files have half precision


def test_moments_are_drawn_with_their_times(still: Path) -> None:
    moments = draw_strip(open_run(str(still), device="cpu"))
    seconds = [moment.seconds for moment in moments]
    assert [moment.step for moment in moments] == [8, 16, 20]
    assert None not in seconds
    assert seconds == sorted(seconds)  # pyright: ignore[reportArgumentType]
    assert [len(moment.images) for moment in moments] == [6, 6, 6]
    assert {image.size for moment in moments for image in moment.images} == {(64, 64)}


def test_files_of_another_noise_or_a_later_step_or_damaged_are_left_out(still: Path, tmp_path: Path) -> None:
    sampling = open_run(str(still), device="cpu").sampler.spec
    (tmp_path / "strip").mkdir()
    good = (still / "strip/step-00000008-nfe1-seed0.safetensors").read_bytes()
    contents = {
        "step-00000008-nfe1-seed0": good,
        "step-00000016-nfe2-seed0": good,
        "step-00000032-nfe1-seed1": good,
        "step-00000064-nfe1-seed0": good[:-9],
        "step-00000128-nfe1-seed0": good,
        "step-00000256-nfe1-seed0": good,
    }
    for count, shape in ((3, (1, 8, 8)), (6, (1, 4, 4))):
        contents[f"step-{512 * count:08d}-nfe1-seed0"] = safetensors.torch.save({"x": torch.zeros(count, *shape)})
    for name, data in contents.items():
        (tmp_path / f"strip/{name}.safetensors").write_bytes(data)
    assert [*read_strip(tmp_path, sampling, (1, 8, 8), 128)] == [8, 128]
    assert [*read_strip(tmp_path, sampling, (1, 8, 8), 10_000)] == [8, 128, 256]
    assert read_strip(tmp_path / "nothing", sampling, (1, 8, 8), 128) == {}


def test_the_last_moments_are_shown(still: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dumo.report.strip.MAX_MOMENTS", 2)
    assert [*strip_samples(open_run(str(still), device="cpu"))] == [16, 20]
    assert MAX_MOMENTS == 8


def test_steps_of_the_strip_double() -> None:
    assert [step for step in range(200) if is_strip_due(step)] == [8, 16, 32, 64, 128]


@pytest.mark.slow
def test_a_strip_changes_nothing_of_the_training(tmp_path: Path) -> None:
    train_run(tiny("digits"), tmp_path / "without")
    train(tiny("digits"), tmp_path / "with")
    assert not (tmp_path / "without/strip").exists()
    assert len([*(tmp_path / "with/strip").iterdir()]) == 2
    for file in (tmp_path / "without/checkpoints").rglob("*.safetensors"):
        assert (tmp_path / "with" / file.relative_to(tmp_path / "without")).read_bytes() == file.read_bytes(), file
    assert (tmp_path / "with/metrics.jsonl").read_bytes() == (tmp_path / "without/metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_what_a_stop_leaves_out_is_drawn_when_the_run_goes_on(tmp_path: Path) -> None:
    train(tiny("digits", "train.steps=8"), tmp_path)
    file = tmp_path / "strip/step-00000008-nfe1-seed0.safetensors"
    before = file.read_bytes()
    file.unlink()
    train(tiny("digits", "train.steps=9"), tmp_path)
    assert file.read_bytes() == before


def test_a_net_in_16_bits_has_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    fields = ("train.weights=bfloat16", "train.optimizer.kind=adamw8bit", "train.precision=bf16", "train.ema=[]")
    told: list[str] = []
    train(tiny("digits", *fields, "train.steps=8"), tmp_path, tell=told.append)
    assert [path.name for path in (tmp_path / "strip").iterdir()] == ["step-00000008-nfe1-seed0.safetensors"]
    assert not [line for line in told if line.startswith("warning: no sheet")]


def test_points_have_none(tmp_path: Path) -> None:
    train(tiny("moons"), tmp_path)
    assert not (tmp_path / "strip").exists()
    assert strip_samples(open_run(str(tmp_path), device="cpu")) == {}
