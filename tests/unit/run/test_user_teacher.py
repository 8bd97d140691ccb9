"""A teacher that is a user's function: found where the command is called, tried before anything is written."""

import json
import sys
from pathlib import Path

import pytest

from dumo.run.teacher import file_of
from dumo.run.train import train
from dumo.types import UserError
from unit.run.known import tiny


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("unit.run.known", "Give module:function"),
        ("unit.nowhere:line", "No module named"),
        ("unit.run.known:nothing", "no attribute 'nothing'"),
        ("unit.run.known:wrong", "returned int"),
        ("unit.run.known:line_of_one", r"unit.run.known:line_of_one: TypeError: .*that takes \(run, device\)"),
        ("unit.run.known:failing", r"unit.run.known:failing: KeyError: 'x'. .*dumo.types.Reads"),
        ("unit.run.known:CPU", "not callable"),
        (".known:line", "relative import"),
        ("os.path:join", "os.path:join: TypeError"),
        ("unit.run.known:flat", r"velocity of x of shape \(2, 2\) has shape \(2, 1\)"),
        ("unit.run.known:untimed", r"TypeError: .*velocity must take \(x, t, c\)"),
        ("unit.run.known:nan", "velocity at t = 0.5 is no finite number"),
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


def test_what_runs_is_said_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("loud/__init__.py", "loud/inner/__init__.py", "loud/inner/my_teacher.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"import sys\nprint('{file} runs', file=sys.stderr)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert file_of("loud.inner.my_teacher") == str(tmp_path / "loud/inner/my_teacher.py")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="no attribute 'make'"):
        train(tiny("moons", "teacher.kind=python", "teacher.source=loud.inner.my_teacher:make"), tmp_path / "run")
    said = capsys.readouterr().err.splitlines()
    file = tmp_path / "loud/inner/my_teacher.py"
    assert said[0] == f"teacher.source: this run executes loud.inner.my_teacher:make of {file}"
    assert said[1:] == [
        f"{file} runs" for file in ("loud/__init__.py", "loud/inner/__init__.py", "loud/inner/my_teacher.py")
    ]
    monkeypatch.setattr(sys, "path", [])
    assert file_of("loud.inner.my_teacher") == str(file)  # imported by now


@pytest.mark.parametrize("module", ["nowhere", "nowhere.at.all", ".known", "os.path.deep", "sys", ""])
def test_a_module_whose_file_is_not_known(module: str) -> None:
    assert file_of(module) is None
