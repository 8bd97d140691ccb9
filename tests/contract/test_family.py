"""A union of specs takes a tree by its kind, and names the kind in the location of an error."""

import sys
from subprocess import run

import pytest
from pydantic import TypeAdapter, ValidationError

from dumo.config.load import load
from dumo.objectives import DuMo, Objective

HEAVY = ("bitsandbytes", "diffusers", "peft", "pyarrow", "scipy", "sklearn", "torch._dynamo", "transformers")


def test_an_error_within_a_member_has_its_kind_in_its_location() -> None:
    wrong = {"kind": "dumo", "guide": {"omega": 0}}
    adapter = TypeAdapter[object](Objective)
    for validate in (adapter.validate_python, lambda tree: adapter.validate_json(str(tree).replace("'", '"'))):
        with pytest.raises(ValidationError) as refused:
            validate(wrong)
        (error,) = refused.value.errors()
        assert error["loc"] == ("bundled", "dumo", "guide", "omega")
        assert error["type"] == "greater_than"
        assert error["input"] == 0


def test_a_spec_is_written_by_its_own_class() -> None:
    run = load("digits")
    assert run.model_dump()["objective"] == run.objective.model_dump()
    assert run.objective.model_dump_json() in run.model_dump_json()
    assert isinstance(run.objective, DuMo)


@pytest.mark.slow
def test_a_run_is_read_without_what_takes_long_to_import() -> None:
    """All objectives, nets, data and protocols are imported then, but none of the libraries that some of them need."""
    program = "import sys; from dumo.config.load import load; load('digits'); print(*sys.modules)"
    modules = run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not {*HEAVY} & {*modules}
