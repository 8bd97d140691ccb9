"""Sampling noise: a stream of its own for every (seed, image, draw), drawn on the CPU in float32.

So an image is the same whatever batch, rank or device it is made in, and image 7 can be made alone. Draw 0 is the
noise a solver starts from; later draws are the fresh noise that it asks for.
"""

from collections.abc import Sequence

import torch

from dumo.flow.draw import stream
from dumo.types import Sample


def noise(seed: int, indices: Sequence[int], draw: int, shape: Sequence[int]) -> Sample:
    """N(0, I) of shape (len(indices), *shape), a row per image index, in float32 on the CPU."""
    streams = (stream(seed, "image", i, draw) for i in indices)
    return torch.stack([torch.randn(tuple(shape), generator=g, dtype=torch.float32) for g in streams])
