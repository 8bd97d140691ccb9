"""Random numbers by key, drawn on the CPU: the same on every device and machine, whoever draws them and when.

`stream` is for training, a generator per (seed, step, name). `noise` is for sampling, a stream of its own for every
(seed, image, draw), in float32. Its streams are Philox's, whose key is 128 bits of a hash. torch's own CPU generator
keeps 32 bits of a seed: among 50,000 images two would now and then be twins.

So an image is the same whatever batch, rank or device it is made in, and image 7 can be made alone. Draw 0 is the
noise a solver starts from; later draws are the fresh noise that it asks for.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Generator

from dumo.types import Cond, Sample


def stream(*key: int | str) -> Generator:
    """A CPU generator seeded by a hash of the key.

    torch keeps 32 bits of a seed on the CPU, so a few of a million steps share one: harmless between steps that are far
    apart, but nothing to number images by (see `noise`).
    """
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()  # a seed is a signed 64-bit number
    return Generator().manual_seed(int.from_bytes(digest))


def random_batch(key: str, rows: int, shape: Sequence[int], classes: int) -> tuple[Sample, Cond]:
    """What stands for a batch of data, on the CPU: normal numbers (rows, *shape), and classes, all 0 of none."""
    x = torch.randn(rows, *shape, generator=stream(key, "x"))
    return x, torch.randint(max(classes, 1), (rows,), generator=stream(key, "c"))


def noise(seed: int, indices: Sequence[int], draw: int, shape: Sequence[int]) -> Sample:
    """N(0, I) of shape (len(indices), *shape), a row per image index, in float32 on the CPU."""
    rows = [_stream(f"{seed}/{i}/{draw}").standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def _stream(key: str) -> np.random.Generator:
    digest = blake2b(key.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))
