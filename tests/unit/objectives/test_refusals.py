"""What objectives refuse: one case per row, with the name that the message must contain."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from dumo.objectives import Objective

CASES: list[tuple[dict[str, Any], str]] = [
    ({"kind": "cmt", "times": {"steps": 1}}, "times.steps"),
    ({"kind": "f2d2", "times": {"kind": "pair"}}, "jumps"),
    ({"kind": "imf", "times": {"kind": "jumps", "data_ratio": 1.0, "velocity_ratio": 0.0}}, "times.kind"),
    ({"kind": "meanflow", "power": 1.0, "normalize": 0.1}, "normalize"),
    ({"kind": "shortcut", "scale": 1.5, "w": 4.5}, "scale"),
    (
        {"kind": "several", "third": "shortcut", "apart": True, "times": {"kind": "pair", "velocity_ratio": 0.0}},
        "times.kind",
    ),
    ({"kind": "self_e", "times": {"kind": "uniform"}}, "times={kind: jumps"),
    ({"kind": "split_meanflow", "times": {"kind": "pair", "velocity_ratio": 0.0}}, "times.velocity_ratio"),
]


@pytest.mark.parametrize(("fields", "name"), CASES, ids=[fields["kind"] for fields, _ in CASES])
def test_refused(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter[Any](Objective).validate_python(fields)
    assert name in str(refused.value)
