"""The recipes that ship with dumo, a YAML file per run.

A recipe has a description (`about`) and a `group`, one of `GROUPS`. It may have a `base` and then only contains changes
to it (ADR 0002); `dumo.config.source` merges the two.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from dumo.io.yaml import parse_yaml

FOLDER = files("dumo") / "recipes"
# The groups in the order in which `dumo recipes` lists them.
GROUPS = (
    "Start here",
    "Your own images",
    "A pretrained transformer",
    "A subject on a few-step LoRA",
    "A pretrained diffusion model",
    "Text to image, from scratch",
    "Compare objectives on digits, at equal cost",
    "More DuMo on digits",
    "Two moons",
    "CIFAR-10",
    "ImageNet, at a small size",
    "ImageNet, at the paper's size",
)


@cache
def names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))


def text(name: str) -> str:
    """Return the text of a recipe. Raises FileNotFoundError if there is none."""
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def tree(name: str) -> dict[str, Any]:
    """Return the plain values of a recipe, without its base. They are cached, so copy them before a change."""
    return parse_yaml(text(name))


def by_group() -> dict[str, list[str]]:
    """Return the names of the recipes of each group, sorted."""
    return {group: [name for name in names() if tree(name)["group"] == group] for group in GROUPS}


def rows() -> list[dict[str, str | None]]:
    """Return a row per recipe, by group: its name, description, group, and base if there is one."""
    recipe_rows: list[dict[str, str | None]] = []
    for group, group_names in by_group().items():
        for name in group_names:
            recipe = tree(name)
            recipe_rows.append({"name": name, "about": recipe["about"], "group": group, "base": recipe.get("base")})
    return recipe_rows
