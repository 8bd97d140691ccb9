"""A teacher that is a user's function: found where the command is called, tried before anything is written."""

import json
import sys
from pathlib import Path

import pytest

from dumo.run.train import train
from dumo.types import UserError
from unit.run.known import tiny


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("unit.run.known:mute", "Give module:function"),
        ("unit.run.known", "Give module:function"),
        ("unit.nowhere:line", "No module named"),
        ("unit.run.known:nothing", "no attribute 'nothing'"),
        ("unit.run.known:wrong", "AttributeError: 'int' object has no attribute 'velocity'"),
        ("unit.run.known:line_of_one", r"unit.run.known:line_of_one: TypeError: .*that takes \(run, device\)"),
        ("unit.run.known:failing", r"unit.run.known:failing: KeyError: 'x'. .*dumo.types.Reads"),
        ("unit.run.known:CPU", "not callable"),
        (".known:line", "relative import"),
        ("os.path:join", "os.path:join: TypeError"),
        ("unit.run.known:flat", r"velocity of x of shape \(2, 2\) has shape \(2, 1\)"),
        ("unit.run.known:untimed", r"TypeError: .*velocity takes \(x, t, c\)"),
    ],
)
def test_a_function_that_is_none_is_refused(source: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        train(tiny("moons", "teacher.kind=python", f"teacher.source={source}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_function_of_the_current_folder_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed command has its own folder on the path, not that where it is called."""
    monkeypatch.chdir(tmp_path)
    path, asked = list(sys.path), tiny("moons", "teacher.kind=python", "teacher.source=my_teacher:make")
    text = "from dumo.types import Reads\n\ndef make(run, device):\n    return Reads(velocity=lambda x, t, c: -x)\n"
    Path("my_teacher.py").write_text(text)
    train(asked, tmp_path / "run")
    assert len(json.loads((tmp_path / "run/teacher.json").read_text())["sha256"]) == 64
    assert sys.path == path
    train(asked, tmp_path / "run")
    del sys.modules["my_teacher"]
    Path("my_teacher.py").write_text(text.replace("-x", "2 * x"))
    with pytest.raises(UserError, match="began with another teacher"):
        train(asked, tmp_path / "run")
    del sys.modules["my_teacher"]
    Path("my_teacher.py").write_text("def make(")
    with pytest.raises(UserError, match="my_teacher:make: SyntaxError"):
        train(asked, tmp_path / "run")
