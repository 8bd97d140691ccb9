"""Keyed random numbers, which are the same on every device and machine and in any process.

For training, the key is (seed, step, name):

- `stream` gives a generator. A few numbers per row are drawn by it: every rank draws those of the whole batch.
  `random_row_mask` picks rows so.
- `keyed_normal` draws what is shaped like the data, and `keyed_signs` signs, row by row, each at a place of its own in
  the stream: a rank draws its own rows alone, whatever the batch and the number of ranks.
- `random_uint32` draws whole numbers on a device, from any place in the stream.

For sampling, `noise` has a stream for every (seed, image, draw). So an image is the same whatever batch, rank or device
it is made in, and image 7 can be made alone. Draw 0 is the noise a solver starts from; later draws are the fresh noise
that it asks for.

For networks that draw by themselves, `seeded_generators` sets the generators that torch draws from by default, and
`generator_states` shows whether something has drawn from them.

For tests and trials, `random_batch` stands in for data.

Two generators of the Philox family (Salmon et al. 2011) compute them. `keyed_normal` and `noise` give float32 from that
of numpy, Philox4x64, on the CPU, whose key is 128 bits of a hash. `random_uint32` takes Philox2x32 (`philox`), which
torch's operations can compute on any device. torch's own CPU generator keeps 32 bits of a seed: among 50,000 images,
some would sometimes have the seed of another.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from math import prod

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dumo.types import Cond, Sample

_MASK_32 = 0xFFFFFFFF  # the largest number of 32 bits
# Of Philox2x32 (Salmon et al. 2011, and its code, Random123)
_PHILOX_MULTIPLIER = 0xD256D193
_PHILOX_KEY_STEP = 0x9E3779B9  # 2^32 / golden ratio
_PHILOX_ROUNDS = 10


def stream(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the key.

    torch keeps 32 bits of a seed on the CPU, so a few of a million steps share one. That is harmless between steps that
    are far apart; images, whose noise must be distinct, have `noise`.
    """
    digest = blake2b(
        "/".join(map(str, key)).encode(), digest_size=7
    ).digest()  # 7 bytes: a seed is a signed 64-bit number
    return torch.Generator().manual_seed(int.from_bytes(digest))


def random_row_mask(seed: int, step: int, name: str, batch: int, share: float) -> Bool[Tensor, " batch"]:
    """Return a mask (batch,) of randomly chosen rows of a step's batch: a fraction `share`, rounded to a row.

    The mask depends on seed, step, name and batch.
    """
    is_picked = torch.zeros(batch, dtype=torch.bool)
    places = torch.randperm(batch, generator=stream(seed, step, name))
    is_picked[places[: round(share * batch)]] = True
    return is_picked


@contextmanager
def seeded_generators(key: int | None, device: torch.device) -> Generator[None, None, None]:
    """Seed torch's CPU and GPU generators with this key (None means 0) inside the block, then restore them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key or 0)
        if device.type == "cuda":
            with torch.cuda.device(device):  # `manual_seed` seeds the current GPU
                torch.cuda.manual_seed(key or 0)
        yield


def generator_states(device: torch.device) -> bytes:
    """Return the states of torch's generators, on the CPU and on a device, as bytes to compare."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return b"".join(state.numpy().tobytes() for state in states)


def random_batch(key: str, rows: int, shape: Sequence[int], classes: int) -> tuple[Sample, Cond]:
    """Return a random batch in place of data, on the CPU: normal numbers x (rows, *shape), and classes c (rows,).

    c is all zero if there are no classes.
    """
    x = torch.randn(rows, *shape, generator=stream(key, "x"))
    c = torch.randint(max(classes, 1), (rows,), generator=stream(key, "c"))
    return x, c


def keyed_normal(*key: int | str, rows: Sequence[int], shape: Sequence[int]) -> Sample:
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


def keyed_signs(*key: int | str, rows: Sequence[int], shape: Sequence[int]) -> Sample:
    """1 or -1, equally likely, of shape (len(rows), *shape); a row depends on the key and its number alone."""
    return torch.where(keyed_normal(*key, rows=rows, shape=shape) < 0, -1.0, 1.0)


def random_uint32(*key: int | str, begin: int, count: int, device: torch.device) -> Int64[Tensor, " count"]:
    """Random whole numbers in [0, 2^32), (count,), drawn on a device: those from place `begin` on in the key's stream.

    A number depends on the key and its place alone, so several ranks may draw parts of one stream. It is computed in
    whole numbers, so it is the same on every device. The key is 64 bits of a hash.
    """
    digest = int.from_bytes(blake2b("/".join(map(str, key)).encode(), digest_size=8).digest())
    index = torch.arange(begin, begin + count, device=device)
    return philox(index & _MASK_32, (index >> 32) ^ (digest >> 32), digest & _MASK_32)[0]


def philox(low: Tensor, high: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Philox2x32-10 of counters (high, low): 64 random bits for each, as two numbers of 32 bits.

    All are tensors of int64 that hold numbers of 32 bits. `key`: 32 bits.
    """
    for _ in range(_PHILOX_ROUNDS):
        product = low * _PHILOX_MULTIPLIER  # 64 bits; torch's int64 takes the first as a sign
        product_low = product & _MASK_32
        product_high = (product >> 32) & _MASK_32
        low = product_high ^ key ^ high
        high = product_low
        key = (key + _PHILOX_KEY_STEP) & _MASK_32
    return low, high


def noise(seed: int, indices: Sequence[int], draw: int, shape: Sequence[int]) -> Sample:
    """N(0, I) of shape (len(indices), *shape), in float32 on the CPU: the draw of this number for each image."""
    rows = [_philox_generator(f"{seed}/{i}/{draw}").standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))


def _philox_generator(key: str) -> np.random.Generator:
    """Return a Philox generator whose key is a hash of this text, at the beginning of its stream."""
    digest = blake2b(key.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))
