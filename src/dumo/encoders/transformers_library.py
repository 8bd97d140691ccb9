"""Import transformers, load its models from folders, and silence its output.

- `import_transformers` imports the library, or raises an error with the command to install it.
- `load_model` loads a model from a folder by its class name.
- `quietly` silences transformers or diffusers inside a block.

Nothing here downloads a model, reads a pickle or runs code that comes with weights.
"""

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dumo.encoders.part import TRANSFORMERS, require_weights
from dumo.runtime import require
from dumo.types import UserError

CONFIG = "config.json"  # the name of a model's settings in its folder


def import_transformers(field: str) -> Any:  # noqa: ANN401, a module
    """Import transformers, which a `field` of run.yaml needs. Raises UserError as `require`."""
    return require("transformers", "text", field)


def load_model(folder: Path, class_name: str, field: str, hint: str) -> Any:  # noqa: ANN401, a transformers model
    """Load a transformers model of this class from a folder, in evaluation mode, in float32, on the CPU.

    Raises UserError for a pickle, for damaged weights, and if a weight is missing, because transformers would
    initialize it at random. The message names the field and ends with the hint.
    """
    transformers = import_transformers(field)
    part_weights = require_weights(folder, TRANSFORMERS, field, hint)
    part_weights.require_undamaged()
    with quietly():
        model_class = getattr(transformers, class_name)
        model, info = part_weights.build_model(model_class, trust_remote_code=False, dtype=torch.float32)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{field}: the weights of {folder} do not fit {CONFIG}: {missing[0]} is missing; {hint}")
    return model.eval()


@contextmanager
def quietly(library: str = "transformers") -> Generator[None, None, None]:
    """Disable the progress bars and warnings of transformers or diffusers inside the block.

    The settings are global, so other threads are silenced as well.
    """
    logging = import_module(f"{library}.utils.logging")
    level = logging.get_verbosity()
    has_progress_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_progress_bar:
            logging.enable_progress_bar()
