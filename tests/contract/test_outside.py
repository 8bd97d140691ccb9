"""A class of a user's own stands in a run like one of ours, by `module:Class`, or is refused with the reason."""

import copy
from pathlib import Path

import pytest
import torch

import dumo
from contract import outside
from dumo.config.load import load
from dumo.run.resolve import resolve
from dumo.types.outside import code_hash

RUN = {
    "objective": {"kind": "contract.outside:Outside"},
    "net": {"kind": "contract.outside:PlainNet"},
    "data": {"kind": "contract.outside:Bars"},
    "sample.solver": {"kind": "contract.outside:Once"},
    "sample.nfe": [1],
    "evaluate": {"protocol": {"kind": "photos", "samples": 24}, "nfe": [1], "contrast": []},
    "train.steps": 4,
}


def test_a_run_of_four_classes_from_outside_is_trained_sampled_and_judged(tmp_path: Path) -> None:
    run = dumo.train("digits", RUN, out=tmp_path / "run", device="cpu")
    again = dumo.load(tmp_path / "run")
    assert again.spec == run.spec
    codes = again.spec.resolved["code"]
    assert isinstance(codes, dict)
    names = ("Outside", "PlainNet", "Bars", "Once")
    assert codes.keys() == {f"contract.outside:{name}" for name in names}
    assert torch.equal(again.sample(labels=[0, 1], seed=3), run.sample(labels=[0, 1], seed=3))
    assert again.evaluate()["results"][0]["solver"] == "contract.outside:Once"
    assert again.report().is_file()


@pytest.mark.slow
def test_code_that_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dumo.train("digits", RUN, out=tmp_path / "run", device="cpu")
    monkeypatch.setattr("dumo.config.code.code_hash", lambda spec: "other")
    for go_on in (lambda: dumo.load(tmp_path / "run"), lambda: dumo.train(tmp_path / "run", RUN)):
        with pytest.raises(dumo.UserError, match=r"contract.outside:.* is not the code that .* was trained with"):
            go_on()


@pytest.mark.slow
def test_a_new_run_of_an_old_runs_settings_begins_with_the_code_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = dumo.train("digits", RUN, out=tmp_path / "old", device="cpu")
    monkeypatch.setattr("dumo.config.code.code_hash", lambda spec: "other")
    dumo.train(old.spec, out=tmp_path / "new", device="cpu")
    codes = dumo.load(tmp_path / "new").spec.resolved["code"]
    assert isinstance(codes, dict)
    assert all(code == "other" for code in codes.values())


@pytest.mark.slow
def test_a_class_that_comes_later_is_known_from_then_on(tmp_path: Path) -> None:
    solver = {"sample.solver": RUN["sample.solver"]}
    folder = tmp_path / "run"
    dumo.train("digits", RUN | {"sample.solver": {"kind": "hop"}}, out=folder, device="cpu")
    assert len(dumo.load(folder, solver).sample(labels=[0], seed=0)) == 1
    dumo.train(folder, solver | {"train.steps": 5}, device="cpu")
    codes = dumo.load(folder).spec.resolved["code"]
    assert isinstance(codes, dict)
    assert "contract.outside:Once" in codes


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("class Own(Spec):\n    # a remark\n    kind:   Literal['own:Own'] = 'own:Own'\n", True),
        ("class Own(Spec):\n    kind: Literal['own:Own'] = 'own:Own'\n    power: float = 2.0\n", False),
        ("class Own(Spec):\n    kind: Literal['own:Own'] = 'own:Own'\n\ndef other():\n    return 3\n", False),
    ],
)
def test_code_is_known_by_what_it_does(text: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments and layout aside; what else is in its file counts."""
    found: list[str | None] = []
    for i, body in enumerate(("class Own(Spec):\n    kind: Literal['own:Own'] = 'own:Own'\n", text)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "own.py").write_text(f"from typing import Literal\nfrom dumo.types import Spec\n{body}")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / str(i))
            patch.delitem(__import__("sys").modules, "own", raising=False)
            found.append(code_hash(__import__("own").Own()))
            patch.delitem(__import__("sys").modules, "own")
    assert (found[0] == found[1]) == same
    assert None not in found


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nowhere:Own", "nowhere:Own"),
        ("contract.outside:Nothing", "contract.outside:Nothing"),
        ("__main__:Nothing", "__main__:Nothing"),
        ("torch:Tensor", "torch:Tensor"),
        ("dumo.objectives:DuMo", "dumo.objectives:DuMo"),
        ("contract.outside:PlainNet", "dumo.objectives.base.ObjectiveSpec"),
        ('"os:"', "os:"),
        ('":"', ":"),
    ],
)
def test_what_is_no_such_class_is_refused(kind: str, said: str) -> None:
    with pytest.raises(dumo.UserError, match=f"^objective: .*{said}"):
        load("digits", [f"objective.kind={kind}"])


def test_a_field_of_a_class_from_outside_is_refused_by_its_path() -> None:
    with pytest.raises(dumo.UserError, match=r"^objective\.drop: Input should be less than or equal to 1; got 2"):
        dumo.recipe("digits", {"objective": {"kind": "contract.outside:Outside", "drop": 2}})


def test_a_run_without_such_classes_records_none() -> None:
    assert resolve(load("moons")).resolved == {}
    assert code_hash(copy.copy(outside.Once())) == code_hash(outside.Bars()), "both are of one file"
