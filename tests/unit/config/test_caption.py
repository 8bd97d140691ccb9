"""Captions in a run: what its conditions are, what they are called, and which parts do not fit them."""

from pathlib import Path

import pytest
import torch

from dumo.config.load import load, parse, summary
from dumo.config.spec import Run
from dumo.report.evaluation_card import labels_text
from dumo.run import sheet
from dumo.run.judge import sample_conditions
from dumo.run.resolve import resolve
from dumo.types import UserError
from unit.data.animals import SIDE
from unit.data.test_rows import TEXTS, TOLD, as_lines

WORDS = 'data.captions={"kind": "templates", "templates": ["a {}", "{n}"], "held": ["one {}"]}'
READ = "net.texts={kind: learned}"
RUN = ("digits", [WORDS, READ, "evaluate.protocol.samples=500"])


def words(*sets: str) -> Run:
    return load(RUN[0], [*RUN[1], *sets])


def judged(run: Run) -> torch.Tensor:
    return sample_conditions(run.data, run.evaluate)


def named(run: Run, c: torch.Tensor) -> list[str]:
    return [run.conditions.name(k) for k in c.tolist()]


def test_a_run_by_classes_is_judged_by_them() -> None:
    run = load("digits")
    assert judged(run).equal(run.evaluate.protocol.labels(10))
    assert "captions" not in summary(run)["evaluate"]


@pytest.mark.slow
def test_a_run_by_words_is_judged_by_captions_of_the_protocols_classes() -> None:
    run = words()
    assert (run.data.classes, run.data.labels) == (30, 10)
    assert named(run, judged(run))[7:28:10] == ["a seven", "7", "a seven"]
    held = words("evaluate.captions=held")
    assert named(held, judged(held))[:3] == ["one zero", "one one", "one two"]
    for one, which in ((run, "seen"), (held, "held")):
        assert labels_text(one.data, one.evaluate) == f"i mod 10, by {which} templates in turn"
    assert parse(Run, held.model_dump(mode="json")) == held


def test_sheets_and_samples_have_captions_of_classes_in_turn() -> None:
    run = words()
    assert sheet.sheet_conditions(run.conditions).equal(run.conditions.in_turn(64))
    assert named(run, run.conditions.in_turn(12))[9:] == ["a nine", "0", "1"]
    assert run.conditions.in_turn(3, [29, 4]).tolist() == [29, 4, 29]


def test_a_caption_is_meant_by_its_words_or_number() -> None:
    run = words()
    assert run.conditions.index("one seven") == 27
    assert run.conditions.index("7") == run.conditions.names.index("7")  # which is what is written, not number 7
    assert run.conditions.index("29") == 29
    with pytest.raises(UserError, match=r"there is no label 'a cow'.*as a prompt"):
        run.conditions.index("a cow")


def test_captions_of_files_are_judged_by_those_of_images(tmp_path: Path) -> None:
    as_lines(tmp_path, TOLD)
    data = f"data={{kind: images, root: {tmp_path}, side: {SIDE}, captions: {{kind: files}}}}"
    run = resolve(load("digits", [data, READ, "net.patch=2", "evaluate.protocol={kind: photos, samples: 24}"]))
    few = run.conditions.of_labels(torch.zeros(4, dtype=torch.long)).tolist()  # of images 0, 3, 6, 9
    assert few[0] == len(TEXTS)
    assert [TEXTS[k] in TOLD[i] for i, k in zip((3, 6, 9), few[1:], strict=True)] == [True] * 3
    c = judged(run)
    assert len(c) == 24
    for i, k in enumerate(c.tolist()):
        own = TOLD[i % 12]
        assert (TEXTS[k] in own) if own else k == len(TEXTS)
    assert judged(run).equal(c)
