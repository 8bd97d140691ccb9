"""Random numbers by key, drawn on the CPU: the same on every device and machine, and in any process at any time.

`stream` and `keyed` are for training. A generator per (seed, step, name) gives what is a few numbers per row: every
rank draws the whole batch's. What is shaped like the data is drawn row by row, each at a place of its own in the stream
of (seed, step, name): a rank draws its own rows, whatever the batch and the number of ranks.

`noise` is for sampling, a stream of its own for every (seed, image, draw). So an image is the same whatever batch, rank
or device it is made in, and image 7 can be made alone. Draw 0 is the noise a solver starts from; later draws are the
fresh noise that it asks for.

`keyed` and `noise` give float32 from Philox (Salmon et al. 2011), whose key is 128 bits of a hash. torch's own CPU
generator keeps 32 bits of a seed: among 50,000 images two would now and then be twins.
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import prod

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Generator, Tensor

from dumo.types import Cond, Sample

WORD = 0xFFFFFFFF  # the largest number of 32 bits


def stream(*key: int | str) -> Generator:
    """A CPU generator seeded by a hash of the key.

    torch keeps 32 bits of a seed on the CPU, so a few of a million steps share one: harmless between steps that are far
    apart, but nothing to number images by (see `noise`).
    """
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()  # a seed is a signed 64-bit number
    return Generator().manual_seed(int.from_bytes(digest))


def share_of_rows(seed: int, step: int, name: str, batch: int, share: float) -> Bool[Tensor, " batch"]:
    """Pick a share of a step's batch rows, to a row, at random places that are a function of seed, step and name."""
    is_picked = torch.zeros(batch, dtype=torch.bool)
    places = torch.randperm(batch, generator=stream(seed, step, name))
    is_picked[places[: round(share * batch)]] = True
    return is_picked


def random_batch(key: str, rows: int, shape: Sequence[int], classes: int) -> tuple[Sample, Cond]:
    """A random batch in place of data, on the CPU: normal numbers (rows, *shape) and classes (rows,), 0 if none."""
    x = torch.randn(rows, *shape, generator=stream(key, "x"))
    c = torch.randint(max(classes, 1), (rows,), generator=stream(key, "c"))
    return x, c


def keyed(*key: int | str, rows: Sequence[int], shape: Sequence[int]) -> Sample:
    """N(0, I) of shape (len(rows), *shape), in float32 on the CPU: a row is a function of the key and its number alone.

    Philox numbers its blocks by 256 bits, of which a row's number, in [0, 2^64), is the highest 64: so rows are 2^192
    blocks apart.
    """
    values = np.empty((len(rows), prod(shape)), np.float32)
    generator = _philox_generator("/".join(map(str, key)))
    start = generator.bit_generator.state  # nothing is drawn yet: it holds no block and no half of a number
    for row, number in zip(values, rows, strict=True):
        start["state"]["counter"][3] = number
        generator.bit_generator.state = start  # 2 us, a new generator 8 us
        generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(values).view(len(rows), *shape)


def signs(*key: int | str, rows: Sequence[int], shape: Sequence[int]) -> Sample:
    """1 or -1, equally likely, of shape (len(rows), *shape); a row depends on the key and its number alone."""
    return torch.where(keyed(*key, rows=rows, shape=shape) < 0, -1.0, 1.0)


def bits(*key: int | str, begin: int, count: int, device: torch.device) -> Int64[Tensor, " count"]:
    """Whole numbers in [0, 2^32), drawn on a device: number `begin` and on of the key's, by any who draw some of them.

    By Philox of two words in ten rounds, in whole numbers alone: the same on every device. The key is 64 bits.
    """
    digest = int.from_bytes(blake2b("/".join(map(str, key)).encode(), digest_size=8).digest())
    index = torch.arange(begin, begin + count, device=device)
    return philox(index & WORD, (index >> 32) ^ (digest >> 32), digest & WORD)[0]


def philox(low: Tensor, high: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Philox2x32-10 (Salmon et al. 2011) of counters (high, low) of 32 bits each, in int64."""
    for _ in range(10):
        product = low * 0xD256D193  # its 64 bits, as a number with a sign
        low, high = ((product >> 32) & WORD) ^ key ^ high, product & WORD
        key = (key + 0x9E3779B9) & WORD
    return low, high


def noise(seed: int, indices: Sequence[int], draw: int, shape: Sequence[int]) -> Sample:
    """N(0, I) of shape (len(indices), *shape), a row per image index, in float32 on the CPU."""
    rows = [_philox_generator(f"{seed}/{i}/{draw}").standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def _philox_generator(key: str) -> np.random.Generator:
    digest = blake2b(key.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))
