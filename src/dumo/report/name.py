"""Names of files in a run's folder that say what is not as the run's own spec has it: restart-nfe1-seed3.

So what is asked in one way does not write over what was asked in another.
"""

import re
from typing import Any

from dumo.config.tree import Sampling
from dumo.io import digest
from dumo.io.weights import sha256, title
from dumo.run.weights import RunFolder, sampled_part
from dumo.training.checkpoint import part

LONG = 40  # characters of a value in a name
Fields = dict[str, Any]  # of a spec, one level deep: sample.seed, solver.m


def sampling(spec: Sampling) -> Fields:
    """What of a spec decides samples of a number of passes."""
    tree = spec.model_dump(mode="json", exclude={"nfe"})
    nested = {part: tree.pop(part) for part in ("solver", "guide", "knobs")}
    return flat({**nested, "sample": tree})


def flat(tree: dict[str, Fields]) -> Fields:
    """Fields of several parts as one."""
    return {f"{part}.{name}": value for part, fields in tree.items() for name, value in fields.items()}


def changes(opened: RunFolder, before: Fields, after: Fields) -> list[str]:
    """The fields that differ, and weights other than those the run shows, as parts of a name."""
    parts = [word(field, value) for field, value in after.items() if before.get(field) != value]
    if opened.file.resolve() != part(opened.checkpoint.path, sampled_part(opened.run.train)).resolve():
        parts.append(f"{title(opened.file)}-{sha256(opened.file)[:6]}")
    return parts


def word(field: str, value: object) -> str:
    """A field and its value as a part of a name: seed3, heun, labels3-5. What is long ends in a part of its hash."""
    name = "" if field.endswith(".kind") else field.split(".")[-1]
    text = re.sub(r"[^\w.]+", "-", str(value)).strip("-")
    return name + (text if len(text) <= LONG else f"{text[: LONG - 7]}-{digest.of_bytes(text.encode())[:6]}")
