"""What is said of captions before training: how many there are, and whether an encoder tells them apart."""

from pathlib import Path

import pytest
import torch

from dumo.config.load import load
from dumo.data import Data
from dumo.plan.findings import TIMES, caption_findings, measure_separability, rate_finding, velocity_index
from dumo.run.resolve import resolve
from dumo.runtime.random import keyed_normal
from unit.data.animals import SIDE, as_folder
from unit.data.test_annotation import TOLD, as_lines, as_texts

READ = "net.texts={kind: learned, root: runs/texts/here}"

CLASSES, EACH = 8, 5


def placed(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions of classes around a centre each, and their classes."""
    group = torch.arange(CLASSES).repeat_interleave(EACH)
    centres = keyed_normal("centres", rows=range(CLASSES), shape=[16])
    return centres[group] + spread * keyed_normal("around", rows=range(len(group)), shape=[16]), group


def test_captions_of_a_class_lie_together_or_not() -> None:
    near, far = measure_separability(*placed(0.1)), measure_separability(*placed(30.0))
    assert near.accuracy == 1
    assert not near.is_low
    assert far.accuracy is not None
    assert far.accuracy < 0.3
    assert far.is_low
    assert near.chance == far.chance == (EACH - 1) / (CLASSES * EACH - 1)


def test_what_all_embeddings_share_says_nothing() -> None:
    x, group = placed(0.3)
    moved = measure_separability(5 * x.double() + 100, group)
    here = measure_separability(x, group)
    assert moved.accuracy == here.accuracy
    assert abs(moved.gap - here.gap) < 1e-6


def test_one_caption_each_is_judged_by_the_gap_and_twins_always() -> None:
    x, _ = placed(1.0)
    found = measure_separability(x, torch.arange(len(x)))
    assert found.accuracy is None
    assert not found.is_low
    x[3] = x[17]
    twins = measure_separability(x)
    assert twins.twins == 2
    assert twins.is_low
    pairs = x.repeat_interleave(2, 0)
    pairs[1::2] += 0.01
    close = measure_separability(pairs[:-2])
    assert close.gap < 0.01
    assert close.is_low


def test_captions_that_one_of_two_encoders_tells_apart_are_no_twins() -> None:
    """CLIP cuts captions off behind 77 tokens, where T5 reads on."""
    pooled, _ = placed(1.0)
    tokens = pooled.flip(1)
    pooled[3] = pooled[17]
    assert measure_separability(pooled, token_means=tokens).twins == 0
    tokens[3] = tokens[17]
    assert measure_separability(pooled, token_means=tokens).twins == 2
    equal = torch.ones(4, 2)
    assert measure_separability(equal, token_means=equal).twins == 4


def captioned(root: Path) -> Data:
    """Images with captions in files."""
    data = f"data={{kind: images, root: {root}, side: {SIDE}, captions: {{kind: files}}}}"
    return resolve(load("digits", [data, READ, "evaluate.protocol={kind: photos}"])).data


def lines(data: Data) -> list[tuple[str, str]]:
    return [(found.state, found.text) for found in caption_findings(data)]


def test_captions_are_counted(tmp_path: Path) -> None:
    assert lines(load("digits").data) == []
    words = "200, of 10 classes by 15 templates, and 5 that are held out of training"
    assert lines(load("digits-words").data) == [("ok", words)]
    as_lines(tmp_path / "a", TOLD)
    assert lines(captioned(tmp_path / "a")) == [("ok", "9 different ones of 12 images, up to 2 each; 1 image has none")]
    assert lines(captioned(tmp_path / "later")) == []


def test_few_captions_are_a_warning_and_others_a_failure(tmp_path: Path) -> None:
    as_texts(root := tmp_path / "a", [[], ["one"], ["two"], *[[]] * 9])
    data = captioned(root)
    assert [state for state, _ in lines(data)] == ["warning"]
    for file in root.rglob("*.txt"):
        file.unlink()
    assert [state for state, _ in lines(data)] == ["failing"]
    as_folder(root)
    assert "no captions found" in caption_findings(data)[0].way


def test_the_velocity_is_examined_wherever_it_stands() -> None:
    """Of a few-step net the first head may be its jump."""
    assert velocity_index(["v", "u"]) == 0
    assert velocity_index(["u", "v"]) == 1
    assert velocity_index(["u"]) == 0


@pytest.mark.parametrize(
    ("lowpass", "way"), [(None, "net.lowpass=10"), (30.0, "net.lowpass=10"), (10.0, "net.lowpass=5")]
)
def test_a_velocity_that_changes_too_quickly_asks_for_a_lower_lowpass_than_the_run_has(
    lowpass: float | None, way: str
) -> None:
    t = torch.ones(len(TIMES))
    v = torch.ones(len(TIMES), 1)
    assert rate_finding(t, v, 2 * v, lowpass).state == "ok"
    finding = rate_finding(t, v, 4 * v, lowpass)
    assert (finding.state, finding.way.split(",")[0]) == ("warning", way)
