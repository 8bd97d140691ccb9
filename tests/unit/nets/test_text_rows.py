"""Laws of rows of text by number, whatever store they come from."""

from collections.abc import Sequence

import pytest
import torch

from dumo.encoders.textcache import StoredRow
from dumo.nets.text_rows import RandomStore, Rows, TextSizes, using_step_texts
from rows_given import given_rows


def test_a_caption_edits_its_own_image() -> None:
    source = torch.randn(4, 2, 3, 3, dtype=torch.float16)
    c = torch.tensor([2, 0, 2])
    for on_device in (True, False):
        found = given_rows(torch.zeros(4, 5, 8), source=source, on_device=on_device).sources(c)
        assert found is not None
        assert torch.equal(found, source[c].float())
    assert given_rows(torch.zeros(4, 5, 8)).sources(c) is None


def read_words(texts: Sequence[str]) -> list[StoredRow]:
    """A token of ones for each word."""
    return [{"tokens": torch.ones(len(text.split()), 4)} for text in texts]


@pytest.mark.parametrize("on_device", [True, False])
def test_rows_are_as_short_again_once_a_long_prompt_is_forgotten(on_device: bool) -> None:
    mask = torch.ones(3, 2, dtype=torch.bool)
    rows = given_rows(torch.ones(3, 2, 4), mask, read=read_words, on_device=on_device)
    first = rows.append(["a", "a long prompt of six words", "one of four words"])
    assert rows(torch.tensor([first]))[0].shape == (1, 6, 4)
    rows.keep(first, [first, first + 2])
    assert rows(torch.arange(5))[0].shape == (5, 4, 4)
    assert rows.lengths(torch.arange(5)) == (2, 2, 2, 1, 4)
    assert rows.lengths_differ
    rows.keep(first, [])
    assert rows(torch.arange(3))[0].shape == (3, 2, 4)


def test_a_prompt_edits_its_own_image() -> None:
    source = torch.zeros(3, 2, 3, 3)
    editing = given_rows(torch.ones(3, 2, 4), source=source, read=read_words)
    first = editing.append(["two words"], source[:1] + 1)
    edited = editing.sources(torch.tensor([first, 0]))
    assert edited is not None
    assert edited[0].eq(1).all()
    assert edited[1].eq(0).all()


def test_random_rows_are_the_same_for_the_same_number_and_have_the_largest_sizes() -> None:
    sizes = TextSizes(20, 6, 3, has_mask=True, dtype=torch.float16)
    rows = Rows(sizes, 1000, (2, 4, 4))
    assert rows.lengths(torch.tensor([3])) is None, "memory is counted before rows are loaded"
    rows.hold(RandomStore(sizes, (2, 4, 4)), on_device=False)
    c = torch.tensor([999, 3, 1000, 3])
    tokens, mask, pooled = rows(c)
    assert tokens.shape == (4, 20, 6)
    assert torch.equal(tokens[1], tokens[3])
    assert not torch.equal(tokens[0], tokens[1])
    assert mask is not None
    assert mask.sum(1).tolist() == [*(rows.lengths(c) or ())] == [8, 4, 9, 4]
    assert pooled is not None
    assert pooled.shape == (4, 3)
    assert rows.sources(c) is not None


@pytest.mark.parametrize("pooled", [True, False])
def test_passes_of_a_step_take_the_rows_that_were_read_ahead(pooled: bool) -> None:
    """Each row is read once, whatever passes look up; outside of the step, and with prompts, the store is read."""
    sizes = TextSizes(20, 6, 3 if pooled else 0, has_mask=True, dtype=torch.float16)
    rows = Rows(sizes, 1000, (2, 4, 4))
    store = CountedStore(RandomStore(sizes, (2, 4, 4)))
    rows.hold(store, on_device=False)
    c = torch.tensor([999, 3, 7, 3])
    passes = [c, torch.full_like(c, 1000), c[[2, 0]], torch.tensor([7, 1000])]
    wanted = [(*rows(some), rows.sources(some)) for some in passes]
    store.numbers.clear()
    texts = rows.read_step(c)
    assert store.numbers == [3, 7, 999, 1000]
    with using_step_texts([rows], texts):
        found = [(*rows(some), rows.sources(some)) for some in passes]
        assert len(store.numbers) == 4
        rows.append(["two words"], torch.zeros(1, 2, 4, 4))
        rows(c)
        assert len(store.numbers) == 8
        rows.keep(1001, [])
    rows(c)
    assert len(store.numbers) == 12
    for one, other in zip(found, wanted, strict=True):
        for x, y in zip(one, other, strict=True):
            assert (x is None) == (y is None)
            assert x is None or (y is not None and torch.equal(x, y) and x.dtype == y.dtype)


def test_rows_on_the_device_are_not_read_ahead() -> None:
    assert given_rows(torch.ones(3, 2, 4)).read_step(torch.tensor([0, 1])) is None
    short = given_rows(torch.ones(3, 2, 4), on_device=False)
    assert short.read_step(torch.tensor([0, 1])) is not None
    assert short.store is not None
    short.store.length = None
    assert short.read_step(torch.tensor([0, 1])) is None, "the length depends on the pass"


class CountedStore:
    """A store that notes the numbers of the rows that are read, and has prompts of ones."""

    def __init__(self, store: RandomStore) -> None:
        self.store, self.numbers = store, list[int]()
        self.length, self.lengths_differ, self.is_whole = store.length, store.lengths_differ, store.is_whole

    def row(self, number: int, device: torch.device) -> StoredRow:
        """A row of the store."""
        self.numbers.append(number)
        return self.store.row(number, device)

    def encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """A row for each prompt."""
        return [{"tokens": torch.ones(2, 6), "pooled": torch.ones(3)} for _ in texts]
