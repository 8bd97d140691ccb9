"""A union of specs takes a tree by its kind, and names the kind in the location of an error."""

import sys
from subprocess import run

import pytest
from pydantic import TypeAdapter, ValidationError

from dumo.config.load import load
from dumo.objectives import DuMo, Objective
from dumo.types.outside import make_objective, members

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


def test_a_flow_knows_all_kinds_that_ship_with_dumo_and_no_class_from_outside() -> None:
    for cls in members(Objective):
        kind = cls.model_fields["kind"].default
        fields = {"kind": kind, "size": 4} if kind == "drift" else kind
        assert type(make_objective(fields)) is cls
    for unknown in ("flow", "contract.outside:Outside"):
        with pytest.raises(ValidationError, match="dumo_any"):
            make_objective(unknown)


@pytest.mark.slow
def test_a_flow_imports_no_library_that_it_does_not_use() -> None:
    """`torch.distributed.fsdp` takes a second, also in the training of a run on one process."""
    program = "import sys, torch, dumo; dumo.Flow(torch.nn.Linear(2, 2), 'meanflow'); print(*sys.modules)"
    modules = run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not {*HEAVY, "torch.distributed.fsdp", "dumo.testing"} & {*modules}

    program = "import sys, dumo.run.trainer; print(*sys.modules)"
    modules = run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "torch.distributed.fsdp" not in modules


@pytest.mark.slow
def test_a_run_is_read_without_what_takes_long_to_import() -> None:
    """All objectives, nets, data and protocols are imported then, but none of the libraries that some of them need."""
    program = "import sys; from dumo.config.load import load; load('digits'); print(*sys.modules)"
    modules = run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert not {*HEAVY} & {*modules}
