"""Code that a run names is imported once a person has agreed: by a name that is typed, or a flag."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

import dumo
from dumo.config import trust
from dumo.config.code import shell_command
from dumo.config.load import load
from dumo.types.outside import import_class

CODE = """
open("ran", "a").close()
from typing import Literal
from dumo.objectives import FlowMatching

class Theirs(FlowMatching):
    kind: Literal["{name}:Theirs"] = "{name}:Theirs"
"""


@pytest.fixture(params=["theirs", "many.theirs"])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[str, None, None]:
    """A module that nobody has imported, alone or in a package, and a file of a run that names its class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trust, "accepted_names", set())
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / f"{request.param.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    (file.parent / "__init__.py").write_text("open('ran', 'a').close()" if "." in request.param else "")
    file.write_text(CODE.format(name=request.param))
    Path("theirs.yaml").write_text(f"base: digits-flow-matching\nobjective: {{kind: '{request.param}:Theirs'}}\n")
    yield request.param
    forget(request.param)


def forget(name: str) -> None:
    """As in another process, another day."""
    trust.accepted_names.clear()
    for module in ("many", name):
        sys.modules.pop(module, None)


def taken() -> bool:
    """Whether the file is read; what is refused was not imported."""
    try:
        load("theirs.yaml")
    except dumo.UserError:
        assert not Path("ran").exists()
        return False
    return Path("ran").exists()


def test_nobody_agreed(name: str) -> None:
    with trust.trusting(False):
        assert not taken()
    with pytest.raises(dumo.UserError, match="--trust-code"):
        dumo.recipe("theirs.yaml")
    with pytest.raises(dumo.UserError, match=name):
        load("theirs.yaml", ["about=other:Theirs"])


@pytest.mark.parametrize("how", ["a flag", "typed", "from Python"])
def test_consent_is_for_this_process(name: str, how: str) -> None:
    if how == "a flag":
        with trust.trusting():
            assert taken()
    elif how == "typed":
        load("digits-flow-matching", [f"objective.kind={name}:Theirs"])
    else:
        dumo.recipe("theirs.yaml", trust_code=True)
    assert taken()
    Path("ran").unlink()
    forget(name)
    assert not taken()


def test_what_is_imported_already_needs_consent_too(name: str) -> None:
    __import__(name)
    with pytest.raises(dumo.UserError, match="--trust-code"):
        load("theirs.yaml")


@pytest.mark.parametrize("source", ["builtins:print", "os:system", "shutil:rmtree"])
def test_functions_of_python_need_consent(source: str) -> None:
    with pytest.raises(dumo.UserError, match="--trust-code"):
        trust.require([source], "teacher.source of this run")


def test_an_object_of_python_is_consent(name: str) -> None:
    theirs = import_class(f"{name}:Theirs")()
    run = dumo.recipe("digits-flow-matching").model_copy(update={"objective": theirs})
    assert dumo.recipe(run, {"train.steps": 2}).objective == theirs
    assert taken()


@pytest.mark.parametrize(
    ("override", "needing"),
    [
        ("teacher={kind: python, source: 'theirs:velocity'}", {"train"}),
        ("objective.kind=contract.outside:Outside", {"train", "sample"}),
        ("seed=3", set()),
    ],
)
def test_a_printed_command_names_the_flag_if_it_needs_it(override: str, needing: set[str]) -> None:
    run = load("moons", [override])
    for command in ("train", "sample"):
        printed = shell_command(run, f"dumo {command} runs/moons")
        assert printed.endswith(" --trust-code") == (command in needing), printed
