"""An editor marks what `load` refuses, and nothing that it takes."""

import json

import pytest
from jsonschema import Draft202012Validator

from dumo.config import recipe_files
from dumo.config.load import dump, load
from dumo.io.yaml import parse_yaml
from e2e.shell import call

SCHEMA = Draft202012Validator(json.loads(call("recipes", "--schema").out))


@pytest.mark.parametrize("name", recipe_files.names())
def test_recipes_are_valid(name: str) -> None:
    SCHEMA.validate(parse_yaml(recipe_files.text(name)))


def test_a_run_is_valid_whole_and_short() -> None:
    SCHEMA.validate(parse_yaml(dump(load("digits"))))
    SCHEMA.validate(parse_yaml(dump(load("digits"), short=True)))


@pytest.mark.parametrize(
    "text",
    ["train: {stps: 3}", "train: {steps: many}", "net: {kind: dot}", "objective: meanflow", "trian: {}", "base: 3"],
)
def test_mistakes_are_marked(text: str) -> None:
    assert [*SCHEMA.iter_errors(parse_yaml(text))]
