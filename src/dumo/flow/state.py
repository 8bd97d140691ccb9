"""`FlowState`: what a flow keeps in addition to its network's weights.

It is stored as the bytes of a JSON text, so any file of tensors can hold it: `to_tensor` writes, `from_tensor` reads.
"""

import json
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dumo.flow.slope import Slope

_NUM_BYTES = 512  # ours: the same for every state, for a checkpoint is read into a tensor of its shape


@dataclass(frozen=True)
class FlowState:
    """Where a training stands, and what it found out about its data and network."""

    step: int
    seed: int
    rows: int  # of a rank's batch
    shape: tuple[int, ...] | None  # of a row
    slope: Slope | None  # where the objective names none

    def to_tensor(self) -> Tensor:
        """The state as a uint8 tensor of shape (512,), its text filled up with spaces."""
        fields = {
            "step": self.step,
            "seed": self.seed,
            "rows": self.rows,
            "shape": self.shape,
            "slope": self.slope and self.slope.model_dump(),
        }
        text = json.dumps(fields).encode()
        return torch.tensor(list(text.ljust(_NUM_BYTES)), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, state: Tensor) -> "FlowState":
        """Read what `to_tensor` returned."""
        fields = json.loads(bytes(state.tolist()))
        shape = fields["shape"]
        slope = fields["slope"]
        return cls(
            step=fields["step"],
            seed=fields["seed"],
            rows=fields["rows"],
            shape=None if shape is None else tuple(shape),
            slope=None if slope is None else TypeAdapter[Slope](Slope).validate_python(slope),
        )
