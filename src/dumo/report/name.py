"""File names in a run's folder that list the differences from the run's config: restart-nfe1-seed3.

Files of different settings therefore do not overwrite each other.
"""

import re
from typing import Any

from dumo.config.spec import Sampling
from dumo.io import digest
from dumo.io.tensor_files import sha256, title
from dumo.run.trained import TrainedRun
from dumo.run.weights import sampled_part

MAX_VALUE_LENGTH = 40

# Values of a config's fields, by names such as sample.seed and solver.m.
Fields = dict[str, Any]


def sampling_fields(spec: Sampling) -> Fields:
    """Return the fields that decide the samples of a given number of passes."""
    tree = spec.model_dump(mode="json", exclude={"nfe"})
    specs = {name: tree.pop(name) for name in ("solver", "guide", "knobs")}
    return flatten({**specs, "sample": tree})


def flatten(tree: dict[str, Fields]) -> Fields:
    """Return the fields of several specs, by name, in one mapping: {"solver": {"m": 1}} as {"solver.m": 1}."""
    return {f"{spec}.{name}": value for spec, fields in tree.items() for name, value in fields.items()}


def changed_parts(trained: TrainedRun, before: Fields, after: Fields) -> list[str]:
    """Return the parts of a name: changed fields, and the weights if they are not the run's default."""
    parts = [name_part(field, value) for field, value in after.items() if before.get(field) != value]
    default_weights = trained.run_folder.exported_weights
    if trained.checkpoint:
        default_weights = trained.checkpoint.path / sampled_part(trained.spec.train)
    if default_weights is None or not trained.file.samefile(default_weights):
        parts.append(f"{title(trained.file)}-{sha256(trained.file)[:6]}")
    return parts


def name_part(field: str, value: object, content: bytes | None = None) -> str:
    """A field and its value as a part of a name: seed3, heun, labels3-5. A long value is cut, and ends in a hash.

    If `content` is given, the name ends in its hash.
    """
    name = "" if field.endswith(".kind") else field.split(".")[-1]
    text = re.sub(r"[^\w.]+", "-", str(value)).strip("-")
    if isinstance(value, int | float) and value < 0:
        # The substitution above removed the sign.
        text = f"-{text}"
    if content is None and len(text) > MAX_VALUE_LENGTH:
        content = text.encode()
    if content is not None:
        text = f"{text[: MAX_VALUE_LENGTH - 7]}-{digest.of_bytes(content)[:6]}"
    return name + text
