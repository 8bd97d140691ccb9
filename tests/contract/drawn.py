"""How many random numbers a piece of code draws: few for every row of the batch, or as many as a sample has."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dumo.runtime import random


@dataclass
class Drawn:
    """What was counted."""

    scalars: int = 0  # by torch's generators
    rows: list[int] = field(default_factory=list[int])  # drawn by `keyed`, by their number in the batch
    shaped: int = 0  # numbers in these rows


class _Torch(TorchDispatchMode):
    """Counts the elements of what an operation with a generator gives."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.drawn = drawn

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(out, Tensor):
            self.drawn.scalars += out.numel()
        return out


class _Rows:
    """A generator of numpy's that says what it is asked for."""

    def __init__(self, generator: np.random.Generator, drawn: Drawn) -> None:
        self.bit_generator, self.generator, self.drawn = generator.bit_generator, generator, drawn

    def standard_normal(self, out: np.ndarray, dtype: type) -> None:
        number = int(self.bit_generator.state["state"]["counter"][3])
        self.drawn.rows.append(number)
        self.drawn.shaped += out.size
        self.generator.standard_normal(out=out, dtype=dtype)


@contextmanager
def counting() -> Generator[Drawn]:
    """Count what is drawn inside, in this thread."""
    drawn, opened = Drawn(), random._philox_generator
    with patch.object(random, "_philox_generator", lambda key: _Rows(opened(key), drawn)), _Torch(drawn):
        yield drawn
