"""The bench of data holds few batches, however many there are, and says whether a device would wait."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo.lab import reading
from dumo.runtime.progress import no_bar
from dumo.training.loop import BATCHES
from dumo.types import UserError
from e2e.shell import call, refused, sets
from unit.data.animals import as_folder

CPU = torch.device("cpu")


class Huge:
    """A million million images, made batch by batch; `most` live at one time."""

    size = 10**12

    def __init__(self) -> None:
        self.made: list[int] = []
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def batch(self, step: int, batch: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        x = torch.zeros(batch, 3, 8, 8)
        self.made.append(step)
        self.alive.add(x)
        self.most = max(self.most, len(self.alive))
        return x, torch.zeros(batch, dtype=torch.long)

    def reference(self, n: int, seed: int, i: int = 0) -> tuple[Tensor, Tensor]:
        raise AssertionError

    def fingerprint(self) -> str:
        raise AssertionError


def test_few_batches_live_at_a_time() -> None:
    source = Huge()
    steps = range(100, 100 + reading.WARM + 50)
    assert reading.speed(source, 4, steps, CPU, lambda done, note: None) > 0
    assert source.most <= BATCHES + 2  # ahead, and in use
    assert set(steps) <= set(source.made) <= set(range(100, steps.stop + BATCHES))
    assert len(source.made) == len(set(source.made))


def test_each_number_of_threads_has_a_line(tmp_path: Path) -> None:
    as_folder(tmp_path)
    words = ("bench", "data", tmp_path, "--side", "8", *sets("data.memory=0"), "--batch", "4", "--batches", "2")
    done = call(*words, "--threads", "1,3", "--step-seconds", "0.000001", "--json").json
    assert [row["threads"] for row in done["rows"]] == [1, 3]
    assert all(row["waits"] for row in done["rows"])
    assert reading.powers(6) == [1, 2, 4, 6]
    assert (done["images_per_second_needed"], done["images"]) == (pytest.approx(4e6), 12)
    assert done["kind"] == "folder, decoded at every visit"
    shown = call(*words, "--threads", "1", "--step-seconds", "1000000")
    assert (shown.code, "the device does not wait: a step takes 0 images/s (given)" in shown.out) == (0, True)
    kept = call("bench", "data", tmp_path, "--side", "8", "--batches", "1", "--json").json
    assert [row["threads"] for row in kept["rows"]] == [None]
    assert kept["rows"][0]["waits"] is None


def test_a_recipe_is_read_at_its_own_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = reading.measure(
        reading.reading_of("digits", ["train.batch=32"]), batches=1, step_seconds=0.1, device="cpu", bar=no_bar
    )
    assert (report["batch"], report["kind"], report["images_per_second_needed"]) == (32, "numbers in memory", 320)
    with pytest.raises(UserError, match="--side"):
        reading.reading_of("digits", side=8)
    refused("bench", "data", "nowhere-at-all", named=("nowhere-at-all",))


@pytest.mark.parametrize(("rate", "words"), [(100.0, "waits 90% of the time"), (2000.0, "does not wait")])
def test_the_verdict_says_who_waits(rate: float, words: str) -> None:
    report = {
        "rows": [{"images_per_second": 1.0}, {"images_per_second": rate}],
        "images_per_second_needed": 1000.0,
        "step_seconds_are": "given",
        "kind": "folder, decoded at every visit",
    }
    assert words in reading.verdict(report)
    assert ("dumo encode" in reading.verdict(report)) == (rate < 1000)
