"""The recipes that dumo ships, a YAML file per run, and the results that were published with some of them.

`names` lists them and `text` gives one. A line of each says what it is (`about`), another what it is for: its `group`,
one of `GROUPS`, by which `by_group` sorts them. A recipe may name a `base` and what it changes of it (ADR 0002):
`dumo.config.source` reads it so. Imports no torch.
"""

import json
import re
from importlib.resources import files
from typing import Any

import yaml

FOLDER = files("dumo") / "recipes"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C library's, ten times as quick, where there is one
GROUPS = (  # the groups that recipes name, by purpose, in the order in which `dumo recipes` lists them
    "Start here",
    "Your own images",
    "A pretrained transformer",
    "A subject on a few-step LoRA",
    "A pretrained diffusion",
    "By words",
    "Compare objectives on digits, at equal cost",
    "More of DuMo on digits",
    "Two moons, where everything can be seen",
    "CIFAR-10",
    "ImageNet, in small",
    "ImageNet, at the paper's size",
)


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))


def text(name: str) -> str:
    """The text of a recipe. Raises KeyError where there is none."""
    if name not in names():
        raise KeyError(name)
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def about(name: str) -> str:
    """The line in which a recipe says what it is; "" where it says nothing."""
    return _top_level_text(name, "about") or ""


def base(name: str) -> str | None:
    """The name of the recipe that this one changes; None: it stands alone."""
    return _top_level_text(name, "base")


def group_of(name: str) -> str:
    """A recipe's group, one of `GROUPS`."""
    return _top_level_text(name, "group") or ""


def by_group() -> dict[str, list[str]]:
    """The names of the recipes of each group, by their words; numbers by size, as in my-images-64, my-images-256."""
    names_by_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in sorted(names(), key=_sort_key):
        names_by_group[group_of(name)].append(name)
    return names_by_group


def _sort_key(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names word by word: numbers first, by size, then letters."""
    key: list[tuple[bool, int, str]] = []
    for word in re.findall(r"\d+|[^\d-]+", name):
        is_number = word.isdecimal()
        key.append((not is_number, int(word) if is_number else 0, word))
    return key


def rows() -> list[dict[str, str | None]]:
    """A row for each recipe, group by group: its name, what it is about, its group, and its base, if it has one."""
    recipe_rows: list[dict[str, str | None]] = []
    for group, group_names in by_group().items():
        for name in group_names:
            recipe_rows.append({"name": name, "about": about(name), "group": group, "base": base(name)})
    return recipe_rows


def _top_level_text(name: str, key: str) -> str | None:
    """The text of a recipe's top-level key, which stands on the key's line; None: there is none.

    The rest of the recipe is not parsed, so lists of recipes are quick.
    """
    for line in text(name).splitlines():
        if line.startswith(f"{key}: "):
            return parse_yaml(line)[key]
    return None


def parse_yaml(text: str) -> Any:  # noqa: ANN401, a YAML tree
    """Parse YAML that dumo ships, as plain values. For YAML that others write use `dumo.io.yaml`."""
    return yaml.load(text, _LOADER)


def results(name: str) -> dict[str, Any] | None:
    """The shipped results of a recipe, as `dumo reproduce NAME` wrote them, with their origin; None: there are none."""
    file = FOLDER / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
