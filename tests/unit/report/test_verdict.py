"""The verdict says where a run stands, and what it names to type is what dumo takes."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from docs.test_command import check
from dumo.config.load import load
from dumo.report.proximity import Proximity
from dumo.report.verdict import FAR_FROM_NEAREST, Verdict, reach_verdict
from dumo.run.index import Index
from dumo.run.judge import missing_to_judge
from dumo.run.weights import RunFolder
from dumo.training.deadline import Timing
from dumo.training.manifest import Checkpoint, Manifest
from unit.report.test_score import judged

NAME = "runs/photos"
PERFECT = {"perfect": {"mean": 0.0, "sd": 1.3, "copies": 0.02, "copies_sd": 0.01}}


def run_folder(folder: Path, step: int, steps: int = 5000, *, shipped: bool = False) -> RunFolder:
    """A run at a step, whose training had two steps a second."""
    run = load("digits", [f"train.steps={steps}"])
    (folder / "speed.jsonl").write_text(json.dumps({"step": 50, "steps_per_second": 2.0}) + "\n")
    weights = f"checkpoints/step-{step:08d}/ema-0.999.safetensors"
    own_output = folder if shipped else None
    return RunFolder(run, Index.read(folder), nn.Identity(), step, weights, own_output=own_output)


def evaluation(state: str | None, lead: float = 168.0, **more: Any) -> dict[str, Any]:  # noqa: ANN401, what a report holds
    """An evaluation by `class_mmd`."""
    row = {"nfe": 1, "solver": "restart", "class_mmd": lead, "class_mmd_sd": 1.0, **more}
    return judged() | {"results": [row], "columns": ["class_mmd"], "baselines": PERFECT, "state": state}


def proximity(ratio: float, copies: int = 0) -> Proximity:
    """Ten samples, so far from their nearest images."""
    return Proximity(torch.zeros(10, 1, 8, 8), [ratio] * 10, [i < copies for i in range(10)], 100)


def texts(verdict: Verdict) -> list[str]:
    """What is typed, all of which dumo must take, and what it does."""
    for step in verdict.next_steps:
        program, *words = shlex.split(step.command)
        assert program == "dumo"
        check(words)
    return [f"{step.command} {step.effect}" for step in verdict.next_steps]


def test_a_run_that_is_not_like_the_data_goes_on(tmp_path: Path) -> None:
    verdict = reach_verdict(run_folder(tmp_path, 5000), NAME, evaluation("far"), proximity(1.0))
    assert verdict.head == "Not yet like the data"
    assert verdict.reason == "kernel distance by class · 10³ is 168, of a perfect sampler 0.0 ± 1.3"
    assert texts(verdict) == [
        "dumo train runs/photos --set train.steps=10000 goes on for 5,000 more steps, in about 42 min"
    ]
    near = reach_verdict(run_folder(tmp_path, 5000), NAME, evaluation("near", 3.0), None)
    assert near.head == "Near the data, but not like them"
    assert texts(near) == texts(verdict)


@pytest.mark.parametrize(("step", "minutes"), [(100, 10), (1200, 30), (5000, 120), (100_000, 1680), (1_000_000, 16680)])
def test_a_run_that_ends_by_the_clock_gets_minutes(tmp_path: Path, step: int, minutes: int) -> None:
    opened = replace(timed_folder(tmp_path, Timing(minutes=6, seconds=360, share=1)), step=step)
    verdict = reach_verdict(opened, NAME, evaluation("far"), None)
    assert texts(verdict) == [f"dumo train runs/photos --minutes {minutes} goes on for {minutes:,} minutes"]


def test_a_run_that_is_stopped_goes_on_to_its_end(tmp_path: Path) -> None:
    verdict = reach_verdict(run_folder(tmp_path, 20), NAME, None, proximity(4.1))
    assert verdict.head == "Not yet like the data, and stopped at step 20 of 5,000"
    assert verdict.reason == "samples are 4.10 times as far from the nearest training image as real images are"
    assert texts(verdict) == ["dumo train runs/photos goes on to step 5,000, in about 42 min"]
    assert reach_verdict(run_folder(tmp_path, 20), NAME, None, proximity(1.0)).head == "Stopped at step 20 of 5,000"
    untrained = reach_verdict(run_folder(tmp_path, 0), NAME, None, None)
    assert untrained.head.startswith("Untrained")
    assert texts(untrained) == ["dumo train runs/photos trains it, for 5,000 steps"]


def timed_folder(folder: Path, timing: Timing | None, *, steps: int = 5000) -> RunFolder:
    """A run at step 6,000 that ends after six minutes, with guessed steps, and the timing of its checkpoint."""
    opened = run_folder(folder, 6000, steps)
    run = load("digits", [f"train.steps={steps}", "train.minutes=6"])
    checkpoint = Checkpoint(folder)
    checkpoint.manifest = Manifest(step=6000, images=0, timing=timing, files={})
    return replace(opened, run=run, checkpoint=checkpoint)


def test_a_run_that_ends_by_the_clock_was_stopped_where_time_is_left(tmp_path: Path) -> None:
    """Its steps are a guess, of which it may have made more when it was stopped."""
    stopped = reach_verdict(timed_folder(tmp_path, Timing(minutes=6, seconds=120, share=0.3)), NAME, None, None)
    assert stopped.head == "Stopped after 2 min of 6 min"
    assert texts(stopped) == ["dumo train runs/photos goes on for the 4 min that are left"]
    more = reach_verdict(timed_folder(tmp_path, Timing(minutes=4, seconds=240, share=1)), NAME, None, None)
    assert more.head == "Stopped after 4 min of 6 min"
    by_steps = reach_verdict(timed_folder(tmp_path, None), NAME, None, None)
    assert by_steps.head == "Stopped after 0 s of 6 min"

    over = Timing(minutes=6, seconds=360, share=1)
    for steps in (5000, 6000, 7000):
        ended = reach_verdict(timed_folder(tmp_path, over, steps=steps), NAME, None, None)
        assert ended.head == "Trained, and not judged yet"
    assert texts(reach_verdict(timed_folder(tmp_path, over), NAME, evaluation("far"), None)) == [
        "dumo train runs/photos --minutes 120 goes on for 120 minutes"
    ]
    untrained = reach_verdict(replace(timed_folder(tmp_path, None), step=0), NAME, None, None)
    assert texts(untrained) == ["dumo train runs/photos trains it, for 6 minutes"]


def test_a_run_that_ends_by_the_clock_copies_less_after_half_its_minutes(tmp_path: Path) -> None:
    opened = timed_folder(tmp_path, Timing(minutes=6, seconds=360, share=1), steps=6000)
    assert texts(reach_verdict(opened, NAME, None, proximity(1.0, copies=4))) == [
        "dumo train runs/photos/run.yaml --out runs/photos-shorter --set train.minutes=3 makes a run of 3 minutes; "
        "more photos help more"
    ]


@pytest.mark.parametrize(
    ("steps_per_second", "minutes", "text"),
    [(50.0, "1", "1 minute"), (26.3, "1.9", "1.9 minutes"), (5000.0, "0.1", "6 seconds")],
)
def test_the_time_of_its_steps_is_halved_not_that_of_encoding(
    tmp_path: Path, steps_per_second: float, minutes: str, text: str
) -> None:
    opened = timed_folder(tmp_path, Timing(minutes=6, seconds=360, share=1))
    (tmp_path / "speed.jsonl").write_text(json.dumps({"step": 50, "steps_per_second": steps_per_second}) + "\n")
    assert texts(reach_verdict(opened, NAME, None, proximity(1.0, copies=4))) == [
        f"dumo train runs/photos/run.yaml --out runs/photos-shorter --set train.minutes={minutes} "
        f"makes a run of {text}; more photos help more"
    ]


def test_many_copies_go_before_all_else(tmp_path: Path) -> None:
    """By the evaluation, or else by the page's samples. An earlier checkpoint, where one is kept, is named."""
    for known in (
        reach_verdict(run_folder(tmp_path, 5000), NAME, evaluation("far", copies=0.42), proximity(1.0)),
        reach_verdict(run_folder(tmp_path, 5000), NAME, None, proximity(1.0, copies=4)),
    ):
        assert known.head == "It copies the training images"
        assert _share(known.reason) in ("42%", "40%")
        assert texts(known) == [
            "dumo train runs/photos/run.yaml --out runs/photos-shorter --set train.steps=2500 "
            "makes a run of 2,500 steps, in about 21 min; more photos help more"
        ]
    few = reach_verdict(run_folder(tmp_path, 5000), NAME, evaluation("far", copies=0.1), proximity(1.0, copies=9))
    assert few.head == "Not yet like the data"  # real images are copies of one another, too

    earlier = tmp_path / "checkpoints/step-00001000"
    earlier.mkdir(parents=True)
    (earlier / "ema-0.999.safetensors").touch()
    (earlier / "state.json").write_text("{}")
    kept = reach_verdict(run_folder(tmp_path, 5000), NAME, evaluation("far", copies=0.42), None)
    assert texts(kept) == [
        f"dumo sample runs/photos --weights {earlier}/ema-0.999.safetensors takes the weights of step 1,000; "
        "more photos help more"
    ]


def _share(text: str) -> str:
    """The share at the beginning of a text."""
    return text.split()[0]


def test_a_run_that_is_good_is_used(tmp_path: Path) -> None:
    verdict = reach_verdict(run_folder(tmp_path, 5000), NAME, evaluation("like the data", 1.0), None)
    assert verdict.is_good
    commands = [text.split(" runs/photos")[0] for text in texts(verdict)]
    assert commands == ["dumo sample", "dumo demo", "dumo export"]


@pytest.mark.parametrize(
    ("recipe", "fields", "is_exported"),
    [
        ("digits", (), True),
        ("digits", ("sample.guide.scale=2", "objective.drop=0.1"), False),  # the exported code guides nothing
        ("digits", ("net.precondition=data",), False),
        ("digits-sct", (), False),  # its head is f
        ("moons", (), False),  # nobody else knows the net
    ],
)
def test_a_run_that_cannot_be_exported_is_not_to_be(
    recipe: str, fields: tuple[str, ...], is_exported: bool, tmp_path: Path
) -> None:
    opened = replace(run_folder(tmp_path, 5000), run=load(recipe, ["train.steps=5000", *fields]))
    verdict = reach_verdict(opened, NAME, evaluation("like the data", 1.0), None)
    assert ("dumo export runs/photos" in [step.command for step in verdict.next_steps]) == is_exported


def test_what_nobody_judged_is_to_be_judged(tmp_path: Path) -> None:
    verdict = reach_verdict(run_folder(tmp_path, 5000), NAME, None, proximity(0.99 * FAR_FROM_NEAREST))
    assert verdict.head == "Trained, and not judged yet"
    assert texts(verdict) == [
        "dumo evaluate runs/photos --nfe 1,2 makes 2,000 samples at each NFE, and compares them with the data"
    ]
    stale = evaluation("like the data") | {"fresh": False}
    assert reach_verdict(run_folder(tmp_path, 5000), NAME, stale, None) == verdict
    no_baseline = reach_verdict(run_folder(tmp_path, 5000), NAME, evaluation(None), proximity(1.0))
    assert (no_baseline.head, no_baseline.is_good) == ("Trained", False)


@pytest.mark.parametrize(
    ("classes", "num_images", "missing"),
    [
        (2, 19, "20 images or more"),
        (501, 900, "--set evaluate.protocol.samples=1002"),
        (500, 900, None),
        (2, None, None),
    ],
)
def test_what_cannot_be_judged_is_not_to_be_judged(
    tmp_path: Path, classes: int, num_images: int | None, missing: str | None
) -> None:
    run = load("my-images", ["data.root=photos", f"data.classes={classes}", "train.steps=50"])
    assert (missing or "") in (missing_to_judge(run, num_images) or "")
    opened = replace(run_folder(tmp_path, 50), run=run)
    verdict = reach_verdict(opened, NAME, None, None, num_images)
    assert verdict.head == ("Trained" if missing else "Trained, and not judged yet")


def test_a_run_that_comes_with_dumo_is_not_trained_further(tmp_path: Path) -> None:
    for state in ("far", "near"):
        opened = run_folder(tmp_path, 5000, shipped=True)
        verdict = reach_verdict(opened, "digits-trained", evaluation(state, copies=0.9), None)
        assert [text.split()[1] for text in texts(verdict)] == ["sample", "demo", "export"]
