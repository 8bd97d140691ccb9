"""Rows of a step: epochs are permutations laid end to end, and a step number is all that is needed to go on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dumo.io import data_source as epoch
from dumo.io.data_source import rows_of
from unit.data.spy import spied


def laid_out(steps: int, batch: int, size: int, seed: int = 0) -> Tensor:
    return torch.cat([rows_of(step, batch, size=size, seed=seed) for step in range(steps)])


@pytest.mark.parametrize(("batch", "size"), [(5, 20), (7, 20), (20, 20), (1, 3), (50, 20), (33, 10), (64, 1)])
def test_each_epoch_is_a_permutation(batch: int, size: int) -> None:
    """Whether or not batches fit: rows cross from one epoch into the next, none twice, none missing."""
    epochs = 6
    rows = laid_out(-(-epochs * size // batch), batch, size)[: epochs * size].view(epochs, size)
    assert torch.equal(rows.sort(1).values, torch.arange(size).expand(epochs, size))


def test_epochs_are_in_their_own_order_keyed_by_the_seed() -> None:
    rows = laid_out(4, 100, 100).view(4, 100)
    for i in range(4):
        assert not torch.equal(rows[i], torch.arange(100))
        assert all((rows[i] == rows[j]).sum() < 15 for j in range(i))
    assert torch.equal(rows_of(3, 100, size=100, seed=0), rows[3])
    assert not torch.equal(rows_of(3, 100, size=100, seed=1), rows[3])


def test_steps_have_no_memory() -> None:
    """From any step on, alone and backwards, rows are those of a run in one go: of a line without an end."""
    whole = laid_out(10, 7, 20).view(10, 7)
    for step in reversed(range(10)):
        assert torch.equal(rows_of(step, 7, size=20, seed=0), whole[step])
    assert torch.equal(laid_out(7, 10, 20), whole.flatten())  # seven batches of 10 are ten of 7


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of the orders made from here on."""
    epoch._permutation.cache_clear()
    yield spied(monkeypatch, torch, "randperm", lambda n: n)
    epoch._permutation.cache_clear()


def test_an_order_is_made_once_an_epoch(made: list[int]) -> None:
    """Whoever asks: steps in a row, ahead across the end of an epoch, and threads at once."""
    steps = [step + ahead for step in range(20) for ahead in range(3)]  # 5 steps an epoch
    for step in steps:
        rows_of(step, 20, size=100, seed=0)
    assert made == [100] * 5
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda _: rows_of(0, 20, size=2_000_000, seed=0), range(8)))
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert made == [100] * 5 + [2_000_000]


def test_few_orders_are_kept(made: list[int]) -> None:
    """They are as large as the data."""
    for step in range(20):
        rows_of(step, 100, size=100, seed=0)
    assert len(made) == 20
    assert epoch._permutation.cache_info().currsize == epoch.CACHED_ORDERS == 2


def test_what_is_given_is_not_the_order_that_is_kept(made: list[int]) -> None:
    rows_of(0, 10, size=10, seed=0).zero_()
    assert rows_of(0, 10, size=10, seed=0).any()
