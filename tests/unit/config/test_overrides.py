"""Overrides: their order says nothing but which comes last, a few have short forms, and a kind may stand alone."""

from copy import deepcopy
from itertools import permutations
from typing import Any

import pytest
import yaml

from dumo.config.load import load
from dumo.config.overrides import DEFAULT_KINDS, SHORT_FORMS, full_overrides, override
from dumo.objectives import DuMo, FlowMatching, MeanFlow
from dumo.training.ema import Ema
from dumo.types import UserError

BASE = yaml.safe_load("""
objective: {kind: dumo, drop: 0.1, guide: {zeta: 0.5, omega: 1}, times: {kind: beta, a: 2, b: 3}}
train: {steps: 5, ema: [{decay: 0.9}, {decay: 0.99}], clip: 1.0}
sample: {knobs: {w: 2}}
teacher: null
path: linear
""")


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
    assert said == "teacher=null removes the parent of teacher.source: remove one of the two"


@pytest.mark.parametrize("texts", [*permutations(["pipeline=dir", "pipeline.without=[text_encoder_3]"])])
def test_a_text_for_the_pipeline_is_its_source_beside_other_fields(texts: tuple[str, ...]) -> None:
    """As `dumo train sd3-lora pipeline=DIR` is typed, and messages propose the other."""
    tree: dict[str, Any] = {"pipeline": {"source": "stabilityai/stable-diffusion-3-medium-diffusers", "without": []}}
    override(tree, texts)
    assert tree == {"pipeline": {"source": "dir", "without": ["text_encoder_3"]}}


def test_short_forms_and_kinds_are_written_out() -> None:
    """As values of YAML 1.2 and JSON, so 1e-4 is a number."""
    words = [
        "steps=500",
        "lr=1e-4",
        "batch=8",
        "seed=1",
        "minutes=.5",
        "net=unet",
        "objective.slope=jvp",
        "net.lora=null",
    ]
    words += ["pipeline=owner/name", "train.ema.0=power", "sample.nfe=[1, 2]", "data={kind: digits}"]
    assert full_overrides(words) == [
        "train.steps=500",
        "train.optimizer.lr=0.0001",
        "train.batch=8",
        "train.seed=1",
        "train.minutes=0.5",
        "net.kind=unet",
        "objective.slope.kind=jvp",
        "net.lora=null",
        "pipeline.source=owner/name",
        "train.ema.0.kind=power",
        "sample.nfe=[1, 2]",
        "data={kind: digits}",
    ]


def test_a_short_form_sets_what_the_field_sets() -> None:
    for short, field in SHORT_FORMS.items():
        assert load("digits", [f"{short}=7"]) == load("digits", [f"{field}=7"])
    assert load("digits", ["steps=5", "train.steps=6"]).train.steps == 6


@pytest.mark.parametrize("word", ["objective=meanflow", "objective.kind=meanflow"])
def test_another_objective_keeps_dropout_and_guidance_and_gets_a_solver(word: str) -> None:
    guided = load("digits-guided")
    assert isinstance(guided.objective, DuMo)
    assert guided.objective.guide.active
    other = load("digits-guided", [word])
    assert other.objective == MeanFlow(drop=guided.objective.drop, guide=guided.objective.guide)
    assert (guided.sample.solver.kind, other.sample.solver.kind) == ("restart", "hop")
    # Fields that are set count more.
    fields = [word, "objective.drop=0.3", "objective.guide.zeta=0", "sample.solver=euler"]
    chosen = load("digits-guided", fields)
    assert (chosen.objective.drop, chosen.objective.guide.scale, chosen.sample.solver.kind) == (0.3, 1, "euler")
    # Its own kind changes nothing, and an objective that is written out has nothing of the one before.
    assert load("digits-guided", ["objective=dumo"]) == guided
    assert load("digits-guided", ["objective={kind: flow_matching}"]).objective == FlowMatching()


@pytest.mark.parametrize(("kind", "scale"), [("imf", 8.0), ("shortcut", 1.5), ("tvm", 2.0)])
def test_another_objective_is_not_guided_where_no_label_is_dropped(kind: str, scale: float) -> None:
    """Its V(null) would never be trained. Where labels are dropped, it has its own default."""
    plain, dropped = (load(recipe, [f"objective={kind}"]).objective for recipe in ("digits", "digits-guided"))
    field = "w" if kind == "imf" else "scale"
    assert getattr(plain, field) == (None if kind == "imf" else 1)
    assert getattr(dropped, field) == scale
    assert (plain.drop, dropped.drop > 0) == (0, True)
