"""What is tested before training: the slope, captions, and a pretrained network's velocity."""

from pathlib import Path

import pytest
import torch

from dumo.config.load import load
from dumo.data import Data
from dumo.plan.preflight import TIMES, caption_findings, rate_finding, velocity_index
from dumo.run.resolve import resolve
from unit.data.animals import SIDE, as_folder
from unit.data.test_rows import TOLD, as_lines, as_texts

READ = "net.texts={kind: learned}"


def captioned(root: Path) -> Data:
    """Images with captions in files."""
    data = f"data={{kind: images, root: {root}, side: {SIDE}, captions: {{kind: files}}}}"
    return resolve(load("digits", [data, READ, "evaluate.protocol={kind: photos}"])).data


def lines(data: Data) -> list[tuple[str, str]]:
    return [(found.state, found.text) for found in caption_findings(data)]


def test_captions_are_counted(tmp_path: Path) -> None:
    assert lines(load("digits").data) == []
    words = "200, from 10 classes and 15 templates; 5 more templates are held out"
    assert lines(load("digits-words").data) == [("ok", words)]
    as_lines(tmp_path / "a", TOLD)
    assert lines(captioned(tmp_path / "a")) == [
        ("ok", "9 different captions for 12 images, up to 2 each; 1 image has none")
    ]
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
