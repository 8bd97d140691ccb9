"""Names that other trainers use are answered with ours, and ours exist."""

import pytest
from pydantic import BaseModel

from dumo.config.foreign import FOREIGN
from dumo.config.load import load
from e2e.shell import call

ELSEWHERE = {"net.lora.rank": "flux-lora", "data.root": "my-images"}
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning_rate 1e-4", "--learning_rate: here it is --set train.optimizer.lr=... (of a step"),
        ("--train-batch-size 8", "--train-batch-size: here it is --set train.batch=... (images of a step"),
        ("--resolution=64", "--resolution: here it is --set data.side=... (pixels; or data.images.side in"),
        ("--output_dir x", "--output_dir: here it is --out (of dumo train"),
        ("--max_train_steps 9", "--set train.steps=... (of the optimizer)"),
        ("--num-train-epochs 3", "--set train.steps=... (steps: epochs times images over train.batch)"),
        ("--mixed_precision bf16", "--set train.precision=... (bf16, tf32 or fp32)"),
        ("--gradient_accumulation_steps 4", "--set train.micro_batch=... (rows of a pass, not a number"),
        ("--allow_tf32", "here it is --set train.precision=tf32"),
        ("--stps 4", "there is no option --stps: here it is --set train.steps=..."),
    ],
)
def test_a_foreign_option_is_answered_with_ours(words: str, said: str) -> None:
    done = call("train", "photos", *words.split())
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
