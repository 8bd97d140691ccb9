"""What a flow keeps in addition to its network's weights, as the bytes of a text: any file of tensors can hold it."""

import json
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dumo.flow.slope import Slope

SIZE = 512  # bytes, always as many: a checkpoint is read into what has its shape


@dataclass(frozen=True)
class FlowState:
    """Where a training stands, and what it found out about its data and network."""

    step: int
    seed: int
    rows: int  # of a rank's batch
    shape: tuple[int, ...] | None  # of a row
    slope: Slope | None  # where the objective names none

    def to_tensor(self) -> Tensor:
        """As SIZE bytes."""
        fields = {
            "step": self.step,
            "seed": self.seed,
            "rows": self.rows,
            "shape": self.shape,
            "slope": self.slope and self.slope.model_dump(),
        }
        text = json.dumps(fields).encode()
        return torch.tensor(list(text.ljust(SIZE)), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, state: Tensor) -> "FlowState":
        """As `to_tensor` gave it."""
        fields = json.loads(bytes(state.tolist()))
        slope = fields["slope"]
        return cls(
            step=fields["step"],
            seed=fields["seed"],
            rows=fields["rows"],
            shape=tuple(fields["shape"]) if fields["shape"] is not None else None,
            slope=TypeAdapter[Slope](Slope).validate_python(slope) if slope is not None else None,
        )
