"""Packaged recipes, one complete YAML file per run, the results that came of some of them, and published ones.

Imports no torch.
"""

import json
from importlib.resources import files
from typing import Any, cast

import yaml

HERE = files("dumo.recipes")


def names() -> list[str]:
    """Every recipe's name, in order."""
    return sorted(file.name.removesuffix(".yaml") for file in HERE.iterdir() if file.name.endswith(".yaml"))


def text(name: str) -> str:
    """The text of a recipe. Raises KeyError where there is none."""
    if name not in names():
        raise KeyError(name)
    return (HERE / f"{name}.yaml").read_text(encoding="utf-8")


def about(name: str) -> str:
    """The line in which a recipe says what it is."""
    return cast(dict[str, str], yaml.safe_load(text(name)))["about"]


def results(name: str) -> dict[str, Any] | None:
    """Results shipped with the package: what `dumo reproduce NAME` wrote, with its origin; None if none were."""
    file = HERE / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def published(name: str) -> dict[str, Any]:
    """What papers report of a figure or table of `dumo reproduce`, and what is known of our own numbers."""
    return yaml.safe_load((HERE / "published" / f"{name}.yaml").read_text(encoding="utf-8"))
