"""Streams of training and of sampling are apart by every part of their key, and the same for the same key."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import blake2b

import numpy as np
import pytest
import torch
from torch import Tensor

from dumo.runtime.random import keyed_normal, noise, seeded_generators, stream


def first(*key: int | str, n: int = 4) -> Tensor:
    return torch.randn(n, generator=stream(*key))


def test_the_same_key_gives_the_same_bits() -> None:
    """Golden: a change of hash or generator would change every run that was ever made."""
    assert first(0, 1, "z").tolist() == pytest.approx([0.4115809, 0.5552365, -0.6663245, -0.6655926])
    assert noise(3, [40], 0, (4,))[0].tolist() == pytest.approx([0.6191697, -0.7492478, -0.5314404, -0.3555675])
    assert torch.equal(first("0", "1", "z"), first(0, 1, "z"))
    row = keyed_normal(0, 1, "z", rows=[40], shape=(4,))[0]
    assert row.tolist() == pytest.approx([0.0155846, -1.1879989, -1.1013219, -0.5257629])


@pytest.mark.parametrize(
    "other", [(1, 1, "z"), (0, 2, "z"), (0, 1, "t"), (0, 11, "z"), (0, "z", 1), (0, 1), (0, 1, "z", 0)]
)
def test_every_part_of_the_key_counts(other: tuple[int | str, ...]) -> None:
    assert not torch.isclose(first(0, 1, "z"), first(*other)).any()


def test_streams_are_uncorrelated() -> None:
    """Neighbouring steps, seeds and names: 60 streams of 4,000 numbers, no correlation above five sigma."""
    keys = [(seed, step, name) for seed in range(3) for step in range(10) for name in ("z", "times")]
    together = torch.corrcoef(torch.stack([first(*key, n=4000) for key in keys]))
    assert (together - torch.eye(len(keys))).abs().max() < 5 / 4000**0.5


@pytest.mark.nightly
def test_no_two_images_are_twins() -> None:
    """With streams keyed by 32 bits, as torch's are, images 7,875 and 22,435 of seed 9 would be."""
    rows = noise(9, range(50_000), 0, (2,))
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("number", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7, 1)])
def test_a_keyed_row_is_numpys_philox_at_its_place(number: int, shape: tuple[int, ...]) -> None:
    """Key, and counter with the row's number on top, as numpy itself is told of them; whatever was drawn before."""
    key = int.from_bytes(blake2b(b"3/5/z", digest_size=16).digest())
    theirs = np.random.Generator(np.random.Philox(key=key, counter=number << 192))
    wanted = torch.from_numpy(np.asarray(theirs.standard_normal(shape, dtype=np.float32)))
    for rows in ([number], [7, number]):  # of odd numbers the half of a block is left
        found = keyed_normal(3, 5, "z", rows=rows, shape=shape)
        assert found.shape == (len(rows), *shape)
        assert torch.equal(found[-1], wanted)


def keyed_rows(rows: Sequence[int], shape: tuple[int, ...], *key: int | str) -> Tensor:
    return keyed_normal(*(key or (0, 1, "z")), rows=rows, shape=shape)


def noise_rows(rows: Sequence[int], shape: tuple[int, ...], seed: int = 0, draw: int = 0) -> Tensor:
    return noise(seed, rows, draw, shape)


Rows = Callable[..., Tensor]
OTHERS: list[tuple[Rows, list[tuple[int | str, ...]]]] = [
    (keyed_rows, [(0, 2, "z"), (1, 1, "z"), (0, 1, "extra")]),
    (noise_rows, [(0, 1), (1, 0), (1, 1)]),
]


@pytest.mark.parametrize("made", [keyed_rows, noise_rows])
def test_rows_do_not_depend_on_the_others(made: Rows) -> None:
    whole = made(range(64), (3, 5))
    for size in (1, 7, 64):
        assert torch.equal(torch.cat([made(range(64)[i : i + size], (3, 5)) for i in range(0, 64, size)]), whole)
    assert torch.equal(made([40, 2], (3, 5)), whole[[40, 2]])
    assert keyed_normal(0, "z", rows=[], shape=(3, 5)).shape == (0, 3, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("made", "keys"), OTHERS)
def test_rows_are_normal_and_apart(made: Rows, keys: list[tuple[int | str, ...]]) -> None:
    """In value, from their neighbours, and from the rows of another step, seed, name or draw: no more than chance."""
    one, *others = (made(range(4000), (16,), *key) for key in ((), *keys))
    error = 4 / one.numel() ** 0.5
    assert abs(one.mean()) < error
    assert abs(one.var() - 1) < error * 2**0.5
    assert abs((one**4).mean() - 3) < error * 96**0.5
    for other in (*others, one.roll(1, 0), one.roll(1, 1), one.roll(1, 0).abs() - (2 / torch.pi) ** 0.5):
        assert abs((one * other).mean()) < error


def test_keyed_rows_are_in_single_precision_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        made = keyed_normal(0, rows=range(2), shape=(3,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gpu_is_seeded_where_another_one_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [torch.device("cuda:0")]
    seeded: list[tuple[int, torch.device]] = []

    @contextmanager
    def enter(device: torch.device) -> Generator[None]:
        current.append(device)
        yield
        current.pop()

    with torch.random.fork_rng([]):
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
        monkeypatch.setattr(torch.cuda, "device", enter)
        monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append((seed, current[-1])))
        with seeded_generators(3, torch.device("cuda:1")):
            pass
        monkeypatch.undo()
    assert seeded == [(3, torch.device("cuda:1"))]
