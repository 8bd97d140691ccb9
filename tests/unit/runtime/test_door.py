"""Options are called as the door that was taken calls them."""

from pathlib import Path

import pytest

from dumo.runtime import door


def test_an_option_has_the_name_of_the_door() -> None:
    assert [door.option("out"), door.option("from", 4), door.option("trust-code", True), door.option("to", "lora")] == [
        "out=",
        "step=4",
        "trust_code=True",
        'to="lora"',
    ]
    with door.command_line():
        assert door.option("out") == "--out"
        assert door.option("from", 4) == "--from 4"
        assert door.option("trust-code", True) == "--trust-code"
        assert door.option("to", "lora") == "--to lora"
    assert door.option("out") == "out="


@pytest.mark.parametrize(
    ("text", "shell", "python"),
    [
        ("train.steps=2000", "--set train.steps=2000", 'changes={"train.steps": 2000}'),
        ("train.optimizer.lr=1e-05", "--set train.optimizer.lr=1e-05", 'changes={"train.optimizer.lr": 1e-05}'),
        ("train.optimizer.lr=...", "--set train.optimizer.lr=...", 'changes={"train.optimizer.lr": ...}'),
        ("path.sd=0.123456789", "--set path.sd=0.123456789", 'changes={"path.sd": 0.123456789}'),
        ("train.seed=-1234567", "--set train.seed=-1234567", 'changes={"train.seed": -1234567}'),
        ("""about='a "b"'""", """--set 'about='"'"'a "b"'"'"''""", 'changes={"about": "a \\"b\\""}'),
        ("data.captions=null", "--set data.captions=null", 'changes={"data.captions": None}'),
        ("train.milestones=[4]", "--set 'train.milestones=[4]'", 'changes={"train.milestones": [4]}'),
        ("a={kind: files}", "--set 'a={kind: files}'", "changes={\"a\": {'kind': 'files'}}"),
        ("train.precision=fp32", "--set train.precision=fp32", 'changes={"train.precision": "fp32"}'),
    ],
)
def test_a_setting_can_be_typed(text: str, shell: str, python: str) -> None:
    assert door.settings(text) == python
    with door.command_line():
        assert door.settings(text) == shell


def test_going_on_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("runs/a b")
    assert door.train_call(folder, ["train.steps=3"], step=4) == 'dumo.train("runs/a b", {"train.steps": 3}, step=4)'
    assert door.train_call(folder, minutes=0.5) == 'dumo.train("runs/a b", minutes=0.5)'
    assert door.train_call(folder, accept=True) == 'dumo.train("runs/a b", accept=True)'
    assert door.train_call(folder, ["a=3"], out="DIR") == 'dumo.train("runs/a b", {"a": 3}, out="DIR")'
    with door.command_line():
        assert door.train_call(folder, ["a=3"], step=4) == "dumo train 'runs/a b' --from 4 --set a=3"
        assert door.train_call(folder, minutes=30) == "dumo train 'runs/a b' --minutes 30"
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        words = "torchrun --nproc-per-node 2 -m dumo train 'runs/a b'"
        assert door.train_call(folder, accept=True) == f"{words} --accept"
        with door.naming_code(True):
            assert door.train_call(folder) == f"{words} --trust-code"
        assert door.train_call(folder) == words
        monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # nodes
        every_node = "on every node, after the options of torchrun:  -m dumo train 'runs/a b'"
        assert door.train_call(folder, step=4) == f"{every_node} --from 4"
    with door.naming_code(True):
        assert door.train_call(folder, step=4) == 'dumo.train("runs/a b", step=4, trust_code=True)'


def test_a_script_that_the_shell_does_not_find_is_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = tmp_path / "our own/dumo", tmp_path / "other/dumo"
    for script in (ours, other):
        script.parent.mkdir()
        script.touch(0o755)
    monkeypatch.setattr("sys.argv", [str(ours)])
    for folders, word in ((ours.parent, "dumo"), (other.parent, f"'{ours}'"), (tmp_path, f"'{ours}'")):
        monkeypatch.setenv("PATH", str(folders))
        with door.command_line():
            assert door.train_call(Path("a")) == f"{word} train a"
