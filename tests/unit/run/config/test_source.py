"""A file may name a base, and then only what it changes: the same run as the file written out. And its format."""

from pathlib import Path

import pytest

from dumo.run.config.load import dump, load
from dumo.run.config.source import FORMAT
from dumo.types import UserError

MINE = "base: {base}\nabout: mine\ntrain:\n  steps: 7\nobjective:\n  kind: flow_matching\n  drop: 0.25\n"
SETS = ["about=mine", "train.steps=7", "objective.kind=flow_matching", "objective.drop=0.25"]
MINE += "sample:\n  solver: {{kind: euler}}\n"
SETS += ["sample.solver.kind=euler"]


def written(file: Path, text: str) -> str:
    """A file's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_base_is_a_recipe(tmp_path: Path) -> None:
    assert load(written(tmp_path / "mine.yaml", MINE.format(base="digits"))) == load("digits", SETS)


@pytest.mark.parametrize("base", ["../other/my base.yaml", "../other/run", "../other/run/run.yaml", "$THERE/run"])
def test_a_base_is_a_file_or_a_folder_beside_it(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", str(tmp_path / "other"))
    monkeypatch.chdir(Path("/"))  # wherever the command is called
    for name in ("my base.yaml", "run/run.yaml"):
        written(tmp_path / "other" / name, dump(load("digits", ["net.depth=2"])))
    mine = written(tmp_path / "mine" / "mine.yaml", MINE.format(base=base))
    assert load(mine) == load("digits", ["net.depth=2", *SETS])
    assert load(mine, ["net.depth=3"]).net == load("digits", ["net.depth=3"]).net


def test_a_recipe_is_a_recipe_whatever_lies_beside_the_file(tmp_path: Path) -> None:
    written(tmp_path / "digits/run.yaml", dump(load("moons")))
    assert load(written(tmp_path / "mine.yaml", "base: digits")) == load("digits")
    assert load(written(tmp_path / "mine.yaml", "base: ./digits")) == load("moons")


def test_a_base_may_have_a_base(tmp_path: Path) -> None:
    mine = written(tmp_path / "a/mine.yaml", MINE.format(base="digits-meanflow"))  # of which digits is the base
    assert load(mine) == load("digits-meanflow", SETS)
    written(tmp_path / "b/run.yaml", "base: ../a/mine.yaml\ntrain: {steps: 8, batch: 8}")
    last = written(tmp_path / "c.yaml", "base: b\ntrain: {batch: 4}")
    assert load(last) == load("digits-meanflow", [*SETS, "train.steps=8", "train.batch=4"])


@pytest.mark.parametrize("name", ["run.yaml", "mine.yaml"])
@pytest.mark.parametrize("line", ["", f"format: {FORMAT}\n"])
def test_a_file_may_say_its_format(name: str, line: str, tmp_path: Path) -> None:
    text = f"{line}base: digits\ntrain: {{micro_batch: 8}}"
    assert load(written(tmp_path / name, text)) == load("digits", ["train.micro_batch=8"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", r"run\.yaml is of format 1, and this dumo reads 2: .* \(commit 9ebbef4\)\. A run.yaml of your own begins"),
        ("format: 1", "is of format 1, "),
        ("format: 3", r"run\.yaml is of format 3, and this dumo reads 2: take the dumo that wrote it"),
        ("format: two", "is of format two"),
        ("format:", "is of format null"),
    ],
)
def test_another_format_is_refused_in_a_line(line: str, said: str, tmp_path: Path) -> None:
    text = dump(load("digits")).replace(f"format: {FORMAT}", line)
    with pytest.raises(UserError, match=said) as refused:
        load(written(tmp_path / "run.yaml", text))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: mine.yaml", r"base goes round in a circle: \S+mine.yaml -> \S+mine.yaml$"),
        ("base: other.yaml", r"circle: \S+mine.yaml -> \S+other.yaml -> \S+mine.yaml$"),
        ("base: dgits", r"base: there is no recipe 'dgits', .*did you mean 'digits'"),
        ("base: nowhere/run.yaml", "no recipe 'nowhere/run.yaml', nor a file"),
        ("base: $NOWHERE/a.yaml", "NOWHERE is not set"),
        ("base: 3", "base: there is no recipe '3'"),
        ("base: [digits, moons]", r"no recipe '\[digits, moons\]'"),
        ("base:", "no recipe 'null'"),
        ("base: ''", "base is empty"),
        ("base: list.yaml", r"list\.yaml holds no run"),
        ("base: notes.txt", r"notes\.txt is no YAML file"),
        ("base: digits\nabout: {a: 1}", r"mine\.yaml: about is DuMo on .* in the base, a value without fields"),
        ("base: digits\ntrain: {stpes: 1}", r"mine\.yaml: train\.stpes: unknown key; did you mean 'steps'"),
    ],
)
def test_a_base_that_is_none_is_refused_in_a_line(text: str, said: str, tmp_path: Path) -> None:
    written(tmp_path / "other.yaml", "base: mine.yaml")
    written(tmp_path / "list.yaml", "- 1")
    written(tmp_path / "notes.txt", "base: digits")
    mine = written(tmp_path / "mine.yaml", text)
    with pytest.raises(UserError, match=said) as refused:
        load(mine)
    assert "\n" not in str(refused.value)
