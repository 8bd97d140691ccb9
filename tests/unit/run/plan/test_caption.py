"""What is said of captions before training."""

from pathlib import Path

from dumo.run.config.load import load
from dumo.run.plan.caption import findings, line
from unit.data.animals import SIDE, as_folder
from unit.data.test_written import TOLD, as_lines, as_texts

READ = "net.texts={kind: learned, root: runs/texts/here}"


def run(root: Path):  # noqa: ANN201, a Run
    data = f"data={{kind: images, root: {root}, side: {SIDE}, captions: {{kind: files}}}}"
    return load("digits", [data, READ, "evaluate.protocol={kind: photos}"])


def test_captions_are_counted(tmp_path: Path) -> None:
    assert findings(load("digits")) == []
    assert line(load("digits-words")) == "200, of 10 classes by 15 templates, and 5 that are held out of training"
    as_lines(tmp_path / "a", TOLD)
    assert line(run(tmp_path / "a")) == "9 of 12 images, up to 2 each; 1 image has none"
    assert line(run(tmp_path / "later")) is None


def test_few_captions_are_a_warning_and_others_a_failure(tmp_path: Path) -> None:
    as_texts(root := tmp_path / "a", [[], ["one"], ["two"], *[[]] * 9])
    spec = run(root)
    assert [found.state for found in findings(spec)] == ["warning"]
    for file in root.rglob("*.txt"):
        file.unlink()
    assert [found.state for found in findings(spec)] == ["failing"]
    as_folder(root)
    assert "no captions found" in findings(spec)[0].way
