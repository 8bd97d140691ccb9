"""The recipes that dumo ships, a YAML file per run, and the results that were published with some of them.

`names` lists them and `text` gives one; `GROUPS` has them by purpose. A recipe may name a `base` and what it changes of
it (ADR 0002): `dumo.config.source` reads it so. Imports no torch.
"""

import json
from importlib.resources import files
from typing import Any

import yaml

FOLDER = files("dumo") / "recipes"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C library's, ten times as quick, where there is one
_GROUP_TEXT = {  # by purpose, in the order in which `dumo recipes` lists them
    "Start here": "digits moons",
    "Your own images": "my-images my-images-64 my-images-256 my-images-buckets",
    "A pretrained transformer": "sd3-lora sana flux-lora z-image qwen-image-lora qwen-image",
    "A subject on a few-step LoRA": "personal",
    "A pretrained diffusion": "sd15-lora sdxl-lora sdxl pixart",
    "By words": "digits-words cifar10-latents-words text-256 text-512 text-1024",
    "Compare objectives on digits, at equal cost": """
        digits-flow-matching digits-meanflow digits-imf digits-split-meanflow digits-alpha-flow digits-soflow
        digits-shortcut digits-imm digits-tvm digits-lsd digits-lsd-two-heads digits-facm digits-rcgm digits-twinflow
        digits-ucgm digits-fm-plus
        digits-cm digits-ict digits-ect digits-tcm digits-sct digits-cmt digits-ayf digits-dmf digits-pi-flow
        digits-three-heads digits-three-heads-shortcut digits-likelihood digits-match digits-critic digits-drift
        digits-tbsm digits-freeflow""",
    "More of DuMo on digits": "digits-guided dumo-best",
    "Two moons, where everything can be seen": "moons-flow-matching moons-meanflow moons-guided",
    "CIFAR-10": """
        cifar10-latents cifar10-latents-flow-matching cifar10-latents-meanflow dumo-best-latents
        cifar10-overnight cifar10-small cifar10-routed cifar10 cifar10-meanflow""",
    "ImageNet, in small": "imagenet-sample",
    "ImageNet, at the paper's size": """
        imagenet256-xl2 imagenet256-xl2-432 imagenet256-xl2-meanflow imagenet256-xl2-dual imagenet256-xl2-modern
        imagenet256-xl2-routed imagenet256-xl2-three-heads imagenet256-xl2-three-heads-shortcut
        imagenet256-b2 imagenet256-b2-meanflow
        imagenet512-xl4 imagenet512-xl4-meanflow imagenet512-xl4-dual
        imagenet512-xl1-dcae imagenet512-xl1-dcae-dual""",
}
GROUPS = {purpose: tuple(text_names.split()) for purpose, text_names in _GROUP_TEXT.items()}


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
    return _line(name, "about") or ""


def base(name: str) -> str | None:
    """The name of the recipe that this one changes; None: it stands alone."""
    return _line(name, "base")


def rows() -> list[dict[str, str | None]]:
    """A row for each recipe, by purpose: its name, what it is, its purpose (`group`), and its base, if it has one."""
    recipe_rows: list[dict[str, str | None]] = []
    for group, group_names in GROUPS.items():
        for name in group_names:
            recipe_rows.append({"name": name, "about": about(name), "group": group, "base": base(name)})
    return recipe_rows


def _line(name: str, key: str) -> str | None:
    """The value of a top-level key that stands on one line, without parsing the whole recipe; None: there is none."""
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
