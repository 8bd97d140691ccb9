"""The changes of a file to its base."""

from copy import deepcopy
from typing import Any

import pytest
import yaml

from dumo.config.change import merge
from dumo.types import UserError

BASE = yaml.safe_load("""
objective: {kind: dumo, drop: 0.1, guide: {zeta: 0.5, omega: 1}, times: {kind: beta, a: 2, b: 3}}
train: {steps: 5, ema: [{decay: 0.9}, {decay: 0.99}], clip: 1.0}
sample: {knobs: {w: 2}}
teacher: null
path: linear
""")


def merged(text: str) -> dict[str, Any]:
    """The base with a change, seen to be left alone."""
    before = deepcopy(BASE)
    found = merge(BASE, yaml.safe_load(text))
    assert before == BASE
    return found


@pytest.mark.parametrize(
    ("change", "part", "expected"),
    [
        ("train: {steps: 7}", "train", {**BASE["train"], "steps": 7}),
        ("train: {ema: [{decay: 0.5}]}", "train", {**BASE["train"], "ema": [{"decay": 0.5}]}),  # a list replaces
        ("train: {clip: null}", "train", {**BASE["train"], "clip": None}),
        ("train: {seed: 1}", "train", {**BASE["train"], "seed": 1}),
        ("objective: {guide: {zeta: 0}}", "objective", {**BASE["objective"], "guide": {"zeta": 0, "omega": 1}}),
        ("objective: {guide: none}", "objective", {**BASE["objective"], "guide": "none"}),
        ("objective: {kind: imm}", "objective", {"kind": "imm"}),  # another kind begins anew
        ("objective: {drop: 0, kind: imm}", "objective", {"kind": "imm", "drop": 0}),
        ("objective: {kind: dumo, drop: 0}", "objective", {**BASE["objective"], "drop": 0}),
        ("objective: {times: {kind: uniform}}", "objective", {**BASE["objective"], "times": {"kind": "uniform"}}),
        ("sample: {knobs: {v: 1}}", "sample", {"knobs": {"w": 2, "v": 1}}),
        ("sample: {knobs: {}}", "sample", {"knobs": {}}),  # nothing is none, not all
        ("teacher: {source: me}", "teacher", {"source": "me"}),
        ("path: trig", "path", "trig"),
    ],
)
def test_merge(change: str, part: str, expected: object) -> None:
    found = merged(change)
    assert found[part] == expected
    assert {**found, part: BASE[part]} == BASE


def test_merge_refuses_fields_of_a_value_that_has_none() -> None:
    with pytest.raises(UserError, match=r"^path is linear in the base, a plain value"):
        merged("path: {kind: linear}")
    with pytest.raises(UserError, match=r"^train.ema is \[\{decay: 0.9\}, \{decay: 0.99\}\] in the base"):
        merged("train: {ema: {decay: 0.5}}")
