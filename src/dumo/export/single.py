"""One safetensors file: all weights of the exported model, under the model's own names."""

from pathlib import Path

import safetensors.torch

from dumo.export import card
from dumo.export.model import Exported
from dumo.io.weights import apart


def write(exported: Exported, out: Path, *, dtype: str = "float32") -> None:
    """Write the file `out`, with notes on what it is in its header."""
    model = exported.model(dtype)
    safetensors.torch.save_file(apart(model.state_dict()), out, metadata=card.notes(exported))
