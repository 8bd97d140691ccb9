"""A family's table names all its members, and a member is imported when its kind is read."""

import ast
import sys
from pathlib import Path
from subprocess import run
from types import ModuleType
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from dumo import data, encoders, evaluation, nets, objectives
from dumo.config.load import load
from dumo.flow import solver
from dumo.nets import textfamily
from dumo.objectives import DuMo, Objective
from dumo.types.family import SpecFamily, is_instance_of, members

PACKAGES = [data, encoders, evaluation, nets, objectives]
FAMILIES = [package.FAMILY for package in (*PACKAGES, solver, textfamily)]
# Of a run of digits no other objective, net, data set or protocol is needed, and nothing that reads files or judges.
NEEDLESS = (
    "dumo.objectives.meanflow",
    "dumo.nets.pretrained",
    "dumo.nets.textblock",
    "dumo.data.image",
    "dumo.evaluation.images",
    "dumo.evaluation.measures",
    "dumo.training.eightbit",
)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: next(iter(family.names)))
def test_a_table_has_every_kind_of_its_members(family: SpecFamily) -> None:
    kinds_by_class: dict[str, set[str]] = {}
    for kind, name in family.names.items():
        kinds_by_class.setdefault(name, set()).add(kind)
    for name, kinds in kinds_by_class.items():
        (member,) = {family.load(kind) for kind in kinds}
        assert f"{member.__module__}:{member.__name__}" == name
        assert kinds == set(get_args(member.model_fields["kind"].annotation))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_type_checker_sees_the_members_of_the_table(package: ModuleType) -> None:
    """What is imported for it alone is the classes of the table, each of which the package gives."""
    exported = set[str]()
    for node in ast.walk(ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(package.__name__):
            exported |= {f"{node.module}:{alias.name}" for alias in node.names if alias.asname}
    table = {*package.FAMILY.names.values()}
    assert table <= exported <= table | {*getattr(package, "OTHERS", ())}
    for name in exported:
        assert isinstance(getattr(package, name.partition(":")[2]), type)


def test_a_value_is_of_a_class_that_is_not_imported_for_it() -> None:
    assert is_instance_of(DuMo(), "dumo.objectives.dumo:DuMo")
    assert not is_instance_of(DuMo(), "dumo.objectives.meanflow:MeanFlow")
    assert not is_instance_of(DuMo(), "dumo.not_there:Class")


def test_an_unknown_name_of_a_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'dumo\.objectives' has no attribute 'DuMoo'"):
        _ = objectives.DuMoo  # pyright: ignore[reportAttributeAccessIssue]


def test_an_error_within_a_member_has_its_kind_in_its_location() -> None:
    wrong = {"kind": "dumo", "guide": {"omega": 0}}
    adapter = TypeAdapter[object](Objective)
    for validate in (adapter.validate_python, lambda tree: adapter.validate_json(str(tree).replace("'", '"'))):
        with pytest.raises(ValidationError) as refused:
            validate(wrong)
        (error,) = refused.value.errors()
        assert error["loc"] == ("dumo", "guide", "omega")
        assert error["type"] == "greater_than"
        assert error["input"] == 0


def test_a_spec_is_written_by_its_own_class() -> None:
    run = load("digits")
    assert run.model_dump()["objective"] == run.objective.model_dump()
    assert run.objective.model_dump_json() in run.model_dump_json()
    assert isinstance(run.objective, DuMo)


def test_all_members_are_imported_on_demand() -> None:
    assert len(members(Objective)) == len(objectives.MEMBERS)


@pytest.mark.slow
def test_a_run_imports_the_members_that_it_names() -> None:
    program = "import sys; from dumo.config.load import load; load('digits'); print(*sys.modules)"
    modules = run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "dumo.objectives.dumo" in modules
    assert not set(NEEDLESS) & set(modules)
