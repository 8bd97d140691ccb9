"""What every spec keeps: a frozen value, told apart by kind, that survives a file and refuses what it does not know."""

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from contract.case import GIVEN, kind, members
from contract.outside import Alternate, Bars, Once, Outside, PlainNet, Weight
from dumo.data import Data
from dumo.flow.guide import Guide, Interval
from dumo.flow.slope import Slope
from dumo.flow.solver import Solver
from dumo.flow.times import Times
from dumo.nets import Net
from dumo.objectives import Objective
from dumo.types import Spec

FAMILIES = [Objective, Slope, Times, Net, Data]
FROM_OUTSIDE = [(Objective, Outside), (Net, PlainNet), (Data, Bars), (Solver, Once)]
EVERY = [
    *(pytest.param(family, cls, id=kind(cls)) for family in FAMILIES for cls in members(family)),
    *(pytest.param(cls, cls, id=kind(cls)) for cls in (Alternate, Weight)),
    *(pytest.param(family, cls, id=kind(cls)) for family, cls in FROM_OUTSIDE),
]


def built(cls: type[Spec]) -> Spec:
    """By its defaults, and what has none."""
    return cls(**GIVEN.get(kind(cls), {}))


@pytest.mark.parametrize(("family", "cls"), EVERY)
def test_a_spec_is_a_value_that_survives_a_file(family: object, cls: type[Spec]) -> None:
    """Its kind alone builds the defaults, but for what has none; it is frozen, and refuses what it does not know."""
    adapter, tree, spec = TypeAdapter(family), {"kind": kind(cls), **GIVEN.get(kind(cls), {})}, built(cls)
    assert adapter.validate_python(tree) == spec
    assert adapter.validate_json(adapter.dump_json(spec)) == spec
    assert hash(spec) == hash(built(cls))
    with pytest.raises(ValidationError, match="frozen"):
        spec.kind = "other"
    with pytest.raises(ValidationError, match="slop"):
        adapter.validate_python({**tree, "slop": 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_kinds_are_refused_with_the_known_ones(family: object) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(family).validate_python({"kind": "nonsense"})
    assert all(kind(cls) in str(refused.value) for cls in members(family))
    with pytest.raises(ValidationError, match="kind"):
        TypeAdapter(family).validate_python({})


def bounds(field: FieldInfo) -> dict[str, float]:
    """The ends of a number's range: ge, gt, le, lt."""
    names = ("ge", "gt", "le", "lt")
    return {name: getattr(end, name) for end in field.metadata for name in names if hasattr(end, name)}


@pytest.mark.parametrize(("family", "cls"), EVERY)
def test_numbers_must_be_numbers_in_their_range(family: object, cls: type[Spec]) -> None:
    """Every one has a range, but for a mean; what is beyond it is refused by name."""
    for key, field in cls.model_fields.items():
        if field.annotation in (int, float):
            ends = bounds(field)
            assert ends or key == "mean"
            beyond = [end - 1 if name.startswith("g") else end + 1 for name, end in ends.items()]
            for wrong in ("much", float("nan"), float("inf"), *beyond):
                with pytest.raises(ValidationError, match=key):
                    TypeAdapter(family).validate_python({**GIVEN.get(kind(cls), {}), "kind": kind(cls), key: wrong})


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        *((Guide, wrong) for wrong in ({"omega": 0}, {"zeta": 1}, {"zeta": -0.1}, {"scale": 2})),
        *((Interval, wrong) for wrong in ({"low": 0.6, "high": 0.5}, {"low": -0.1}, {"high": 1.1})),
    ],
)
def test_guides_that_have_no_scale_and_intervals_out_of_order_are_refused(
    cls: type[Guide | Interval], wrong: dict[str, float]
) -> None:
    with pytest.raises(ValidationError):
        cls.model_validate(wrong)
