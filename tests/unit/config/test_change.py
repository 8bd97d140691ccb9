"""Changes to a run's tree: a file's to its base, and overrides, whose order says nothing but which comes last."""

from copy import deepcopy
from itertools import permutations
from typing import Any

import pytest
import yaml

from dumo.config.change import merge
from dumo.config.load import load
from dumo.config.overrides import DEFAULT_KINDS, override
from dumo.training.ema import Ema
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
    with pytest.raises(UserError, match=r"^path is linear in the base, a value without fields"):
        merged("path: {kind: linear}")
    with pytest.raises(UserError, match=r"^train.ema is \[\{decay: 0.9\}, \{decay: 0.99\}\] in the base"):
        merged("train: {ema: {decay: 0.5}}")


def overridden(*texts: str) -> dict[str, Any] | str:
    """The base with overrides, or the words that refuse them."""
    tree = deepcopy(BASE)
    try:
        override(tree, texts)
    except UserError as error:
        return str(error)
    return tree


@pytest.mark.parametrize(
    "texts",
    [
        ("objective.drop=0", "objective.guide.zeta=0", "objective.kind=several", "objective.times.kind=below"),
        ("objective.times.kind=pair", "objective.times.of.kind=beta", "objective.times.of.a=1", "objective.kind=imm"),
        ("train.ema=[{decay: 0.1}, {}, {}]", "train.ema.1.decay=0.2", "train.ema.2.ramp=true", "train.steps=1"),
        ("teacher={source: me}", "teacher.kind=python", "teacher.guide.scale=2", "sample.knobs={}"),
        ("objective={kind: imm, drop: 1}", "objective.drop=0", "objective.times={kind: beta, a: 1}"),
        ("objective={kind: dumo, beta: 1}", "objective.kind=imm", "objective.drop=0"),
        ("train.ema=[]", "train.ema.0.decay=0.5", "train.steps=1"),  # refused in any order, with the same words
        ("teacher=null", "teacher.source=me", "train.steps=1"),
        ("objective.guide=none", "objective.guide.zeta=0", "train.steps=1"),
    ],
)
def test_the_order_of_overrides_says_nothing(texts: tuple[str, ...]) -> None:
    found = [overridden(*some) for some in permutations(texts)]
    assert all(one == found[0] for one in found)
    assert found[0] != BASE


def test_no_override_is_lost_to_a_kind() -> None:
    given = ["objective.drop=0", "objective.guide.zeta=0", "objective.kind=several"]
    objective = load("digits-guided", given).objective
    assert (objective.kind, objective.drop) == ("several", 0)
    assert objective.needs.guide is not None
    assert objective.needs.guide.scale == 1


def test_another_kind_of_an_item_that_says_none_drops_its_fields() -> None:
    found = overridden("train.ema.0.kind=power", "train.ema.0.std=0.05", "train.ema.1.kind=exponential")
    assert isinstance(found, dict)
    assert found["train"]["ema"] == [{"kind": "power", "std": 0.05}, {"decay": 0.99, "kind": "exponential"}]
    assert Ema(decay=0.9).kind == DEFAULT_KINDS["train", "ema"]


def test_the_last_of_two_for_one_field_holds() -> None:
    for texts, steps in (
        (("train.steps=1", "train.clip=2", "train.steps=3"), 3),
        (("train.steps=3", "train.steps=1"), 1),
    ):
        found = overridden(*texts)
        assert isinstance(found, dict)
        assert found["train"]["steps"] == steps
    found = overridden("objective.kind=imm", "objective.kind=dumo")
    assert found == BASE  # as if the first had not been said


def test_overrides_that_contradict_are_refused() -> None:
    said = overridden("teacher.source=me", "teacher=null")
    assert said == "teacher=null takes away what teacher.source is a part of: leave out one of them"


@pytest.mark.parametrize("texts", [*permutations(["pipeline=dir", "pipeline.without=[text_encoder_3]"])])
def test_a_text_for_the_pipeline_is_its_source_beside_other_fields(texts: tuple[str, ...]) -> None:
    """As `dumo train sd3-lora pipeline=DIR` is typed, and messages propose the other."""
    tree: dict[str, Any] = {"pipeline": {"source": "stabilityai/stable-diffusion-3-medium-diffusers", "without": []}}
    override(tree, texts)
    assert tree == {"pipeline": {"source": "dir", "without": ["text_encoder_3"]}}
