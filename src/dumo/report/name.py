"""Names of files in a run's folder that say what differs from the run's own spec: restart-nfe1-seed3.

So the files of different settings do not overwrite one another.

`changes` compares two sets of fields, as `sampling` or `flat` make them, and returns the parts of a name. `word` writes
one field as a part.
"""

import re
from typing import Any

from dumo.config.parts import Sampling
from dumo.io import digest
from dumo.io.weights import sha256, title
from dumo.run.weights import RunFolder, sampled_part
from dumo.training.checkpoint import part_path

MAX_VALUE_LENGTH = 40  # characters of a value in a name: ours
Fields = dict[str, Any]  # values of a spec's fields, by names such as sample.seed and solver.m


def sampling(spec: Sampling) -> Fields:
    """The fields that decide the samples of a given number of passes."""
    tree = spec.model_dump(mode="json", exclude={"nfe"})
    nested = {part: tree.pop(part) for part in ("solver", "guide", "knobs")}
    return flat({**nested, "sample": tree})


def flat(tree: dict[str, Fields]) -> Fields:
    """The fields of several parts, by name, in one mapping: {"solver": {"m": 1}} as {"solver.m": 1}."""
    return {f"{part}.{name}": value for part, fields in tree.items() for name, value in fields.items()}


def changes(opened: RunFolder, before: Fields, after: Fields) -> list[str]:
    """The parts of a name: fields whose value changed, and the weights if they are not those that the run shows."""
    parts = [word(field, value) for field, value in after.items() if before.get(field) != value]
    if opened.file.resolve() != part_path(opened.checkpoint.path, sampled_part(opened.run.train)).resolve():
        parts.append(f"{title(opened.file)}-{sha256(opened.file)[:6]}")
    return parts


def word(field: str, value: object) -> str:
    """A field and its value as a part of a name: seed3, heun, labels3-5. A long value is cut, and ends in a hash."""
    name = "" if field.endswith(".kind") else field.split(".")[-1]
    text = re.sub(r"[^\w.]+", "-", str(value)).strip("-")
    if len(text) > MAX_VALUE_LENGTH:
        text = f"{text[: MAX_VALUE_LENGTH - 7]}-{digest.of_bytes(text.encode())[:6]}"
    return name + text
