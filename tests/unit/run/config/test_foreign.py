"""Names that other trainers use are answered with ours, and ours exist."""

import pytest
from pydantic import BaseModel

import dumo
from dumo.run.config.foreign import FOREIGN, ours
from dumo.run.config.load import load

ELSEWHERE = {"net.lora.rank": "flux-lora", "net.source": "flux-lora", "data.root": "my-images"}
ELSEWHERE |= dict.fromkeys(("data.side", "data.crop", "data.flip"), "my-images")
ELSEWHERE |= dict.fromkeys(("train.schedule.warmup", "train.schedule.kind"), "imagenet256-xl2")


@pytest.mark.parametrize("name", FOREIGN)
def test_the_field_that_is_named_exists(name: str) -> None:
    field, _, value = FOREIGN[name][0].partition("=")
    if "." not in field or " " in field:  # a command
        return
    part: object = load(ELSEWHERE.get(field, "digits"), [f"{field}={value}"] if value else [])
    for step in field.split("."):
        assert isinstance(part, BaseModel)
        assert step in type(part).model_fields, field
        part = getattr(part, step)


def test_a_foreign_name_is_answered_with_ours() -> None:
    assert ours("--train-batch-size") == "here it is train.batch (images of a step, of all ranks together)"
    assert ours("stps") is None
    for field, said in (
        ("learning_rate", "learning_rate: unknown key; here it is train.optimizer.lr"),
        ("train.max_grad_norm", r"train\.max_grad_norm: unknown key; here it is train\.clip"),
        ("train.stps", "train.stps: unknown key; did you mean 'steps'"),
    ):
        with pytest.raises(dumo.UserError, match=said):
            dumo.recipe("digits", {field: 1})


@pytest.mark.parametrize(
    ("field", "value", "way"),
    [
        ("objective", "meanflow", "; write objective.kind=meanflow"),
        ("train.optimizer", "adam", "; write train.optimizer.kind=adam"),
        ("train", "digits", ""),
        ("sample.knobs", "x", ""),
    ],
)
def test_a_bare_kind_is_answered_with_its_field(field: str, value: str, way: str) -> None:
    with pytest.raises(dumo.UserError, match=f"^{field}: input should be a mapping .*; got '{value}'{way}$"):
        dumo.recipe("digits", {field: value})
