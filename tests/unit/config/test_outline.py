"""The outline of a run has the fields that the specs have, and what is found by it is what pydantic finds."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from dumo import data
from dumo.config import label, line, outline, recipes
from dumo.config.change import override
from dumo.config.declaration import declarations_hash
from dumo.config.fault import faults
from dumo.config.load import dump, load, load_recipe
from dumo.config.schema import outline_text
from dumo.config.source import read
from dumo.types import UserError
from e2e.test_refuse import FIELDS


def test_the_file_is_what_the_specs_say() -> None:
    assert outline.FILE.read_text(encoding="utf-8") == outline_text(), "write it: python tools/outline.py"


@pytest.mark.parametrize(
    ("declared", "is_current"),
    [
        ("", True),
        ("x = 3", True),
        ("class Other:\n    def run(self) -> None:\n        x: int = 3", True),
        ("class DuMo(Spec):\n    field: int", False),
        ('MEMBERS = {"any_step": "dumo.objectives.any_step:AnyStep"}', False),
        ('FAMILY = SpecFamily({"other": "dumo.objectives.dumo:DuMo"})', False),
    ],
)
def test_a_field_or_kind_that_was_added_leaves_all_to_the_specs(declared: str, is_current: bool, package: Path) -> None:
    with (package / "objectives" / "dumo.py").open("a", encoding="utf-8") as file:
        file.write(f"\n{declared}\n")
    assert outline.is_current() == is_current
    assert bool(found("digits", "steps=3")) == is_current


@pytest.mark.parametrize(
    ("name", "was", "now", "is_current"),
    [
        ("runtime/limits.py", "STEPS = 10**9", "STEPS = 10**10", False),
        ("flow/precision.py", 'Literal["fp32", ', 'Literal["fp32", "fp16", ', False),
        ("config/parts.py", "class RunParts(", "class RunParts(Other, ", False),  # another base
        ("types/__init__.py", 'extra="forbid"', 'extra="allow"', False),
        ("training/deadline.py", "RISE_SHARE = 0.05", "RISE_SHARE = 0.06", True),
        ("types/__init__.py", "A value that says", "A thing that says", True),  # a docstring
    ],
)
def test_so_does_a_bound_a_choice_or_a_base_that_the_run_names(
    name: str, was: str, now: str, is_current: bool, package: Path
) -> None:
    file = package / name
    text = file.read_text(encoding="utf-8")
    assert was in text
    file.write_text(text.replace(was, now), encoding="utf-8")
    assert outline.is_current() == is_current


def test_a_bound_is_found_by_the_name_of_its_module(package: Path) -> None:
    """`le=limits.STEPS`, in a file that names no base of dumo's."""
    (package / "own.py").write_text("from dumo.runtime import limits\n\nclass DuMo(Mine):\n    x: Bound[limits.MOST]\n")
    (package / "bound.py").write_text("MOST = 3\n")
    before = declarations_hash(package)
    declarations_hash.cache_clear()
    (package / "bound.py").write_text("MOST = 4\n")
    assert declarations_hash(package) != before


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of dumo's files, of which the outline is looked up."""
    package = tmp_path / "dumo"
    shutil.copytree(
        outline.PACKAGE, package, ignore=lambda _, names: [n for n in names if "." in n and n[-3:] != ".py"]
    )
    monkeypatch.setattr(outline, "PACKAGE", package)
    return package


@pytest.mark.parametrize("name", recipes.names())
def test_no_recipe_has_a_fault(name: str) -> None:
    assert faults(read(name).tree) == []


@pytest.mark.parametrize("name", ["digits", "cifar10-latents-words", "sd3-lora", "digits-three-heads", "cifar10-small"])
def test_no_complete_run_has_a_fault(name: str) -> None:
    tree = yaml.safe_load(dump(load_recipe(name)))
    del tree["format"]
    assert faults(tree) == []


def found(name: str, fields: str) -> list[str]:
    """The faults of a recipe with these fields, or the error of setting them."""
    tree = read(name).tree
    try:
        override(tree, fields.split("; "))
    except UserError as error:
        return [str(error)]
    return faults(tree)


@pytest.mark.parametrize("fields", [fields for fields, _ in FIELDS])
def test_each_fault_is_a_line_of_what_pydantic_finds(fields: str) -> None:
    said: list[str] = []
    try:
        load("digits", fields.split("; "))
    except UserError as error:  # some are found when the run is trained
        said = str(error).splitlines()
    assert set(found("digits", fields)) <= set(said)


def test_most_faults_of_fields_are_found() -> None:
    """Of those that one field's name, kind or type shows; fields that contradict one another take the specs."""
    assert sum(bool(found("digits", fields)) for fields, _ in FIELDS) >= 40


@pytest.mark.parametrize(
    "field",
    [
        "net={kind: 'mine:Net', any: 3}",  # a class from outside has fields of its own
        "objective.kind=mine:Objective",
        "pipeline=DIR",  # a text that stands for a part
        "data={kind: images, root: x, classes: null}",
        "train.clip=null",
        "train.sheets=[1, 2]",
        "train.sheets=3",
        "train.ref=0.5",
        "train.optimizer.lr=1",  # a whole number is a number
    ],
)
def test_what_may_be_right_is_left_to_the_specs(field: str) -> None:
    assert found("digits", field) == []


def test_many_faults_are_counted() -> None:
    text = line.lines_of([f"x{k}: no" for k in range(25)], "a.yaml")
    assert text.splitlines()[0] == "a.yaml: x0: no"
    assert text.splitlines()[-1] == "a.yaml: and 5 more mistakes"
    assert len(text.splitlines()) == 21


def test_a_field_without_its_part_is_named_with_it() -> None:
    assert outline.paths_of("steps") == ["train.steps"]
    assert outline.paths_of("seed") == ["train.seed", "sample.seed", "evaluate.seed"]
    assert outline.paths_of("kind") == []
    assert found("digits", "steps=3") == ["steps: unknown key; here it is train.steps (of the optimizer)"]


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        ({"kind": "digits"}, "there is no label 'cat': labels run from 0 to 9"),
        ({"kind": "moons"}, "there is no label 'cat': this run has no classes"),
        ({"kind": "images", "classes": 2, "names": ["bat", "dog"]}, "did you mean 'bat'"),
        ({"kind": "latents", "images": {"classes": 3}}, "labels run from 0 to 2"),
        ({"kind": "digits", "captions": {"kind": "templates"}}, ""),
        ({"kind": "mine:Data"}, ""),
    ],
)
def test_labels_by_the_plain_values_of_a_run(data: dict[str, object], wrong: str) -> None:
    if not wrong:
        label.require_labels("cat", {"data": data})
        return
    with pytest.raises(UserError, match=re.escape(wrong)):
        label.require_labels("cat", {"data": data})


@pytest.mark.parametrize("found", ["data.names", "data.titles", "data.images.names", "data.images.titles"])
def test_a_label_has_the_name_that_the_files_of_a_trained_run_gave_it(found: str) -> None:
    images = {"kind": "images", "classes": 2}
    data = {"kind": "latents", "images": images} if ".images." in found else images
    tree = {"data": data, "resolved": {found: ["cat", "dog"]}}
    label.require_labels("dog,cat,1", tree)
    with pytest.raises(UserError, match="there is no label 'cats': did you mean 'cat'"):
        label.require_labels("cats", tree)


def test_a_name_with_commas_is_one_label() -> None:
    names = ["Paris, France", "Rome", "Paris"]
    assert label.split_labels("Paris, France,Rome,Paris,1", names) == ["Paris, France", "Rome", "Paris", "1"]
    tree = {"data": {"kind": "images", "classes": 3, "names": names}}
    label.require_labels("Rome,Paris, France", tree)
    with pytest.raises(UserError, match="there is no label 'France'"):
        label.require_labels("Rome,France", tree)


@pytest.mark.parametrize(("name", "typed"), [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_a_name_is_found_in_either_form_of_unicode(name: str, typed: str) -> None:
    assert label.label_index(typed, ["bar", name], 2) == 1
    with pytest.raises(UserError, match="did you mean 'caf\u00e9'"):
        label.label_index(f"{typed}s", ["bar", name], 2)


def test_toy_classes_are_those_of_the_specs() -> None:
    toys = [kind for kind, place in data.MEMBERS.items() if place.startswith("dumo.data.toy:")]
    assert {name: load_recipe(name).data.classes for name in toys} == label.TOY_CLASSES
