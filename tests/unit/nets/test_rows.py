"""Laws of rows of text by number."""

from collections.abc import Sequence

import pytest
import torch

from dumo.nets.rows import Rows, TextRows
from dumo.types import UserError


def test_a_caption_edits_its_own_image() -> None:
    source = torch.randn(4, 2, 3, 3, dtype=torch.float16)
    rows = Rows(torch.zeros(4, 5, 8), None, None, source=source)
    c = torch.tensor([2, 0, 2])
    found = rows.sources(c)
    assert found is not None
    assert torch.equal(found, source[c].float())
    assert Rows(torch.zeros(4, 5, 8), None, None).sources(c) is None


def read_words(texts: Sequence[str]) -> TextRows:
    """A token of ones for each word, padded to the longest text."""
    lengths = torch.tensor([len(text.split()) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return mask[..., None].float().expand(-1, -1, 4), mask, None


def test_rows_are_as_short_again_once_a_long_prompt_is_forgotten() -> None:
    rows = Rows(torch.ones(3, 2, 4), torch.ones(3, 2, dtype=torch.bool), None, lambda _: read_words)
    first = rows.append(["a", "a long prompt of six words", "one of four words"])
    assert rows(torch.tensor([first]))[0].shape == (1, 6, 4)
    rows.keep(first, [first, first + 2])
    assert rows.length == 4
    assert rows(torch.arange(5))[0].shape == (5, 4, 4)
    assert rows.lengths(torch.arange(5)) == (2, 2, 2, 1, 4)
    rows.keep(first, [])
    assert rows(torch.arange(3))[0].shape == (3, 2, 4)


def test_every_prompt_edits_an_image_or_none_does() -> None:
    source = torch.zeros(3, 2, 3, 3)
    editing = Rows(torch.ones(3, 2, 4), None, None, lambda _: read_words, source)
    with pytest.raises(UserError, match="give an image for each prompt"):
        editing.append(["a"])
    first = editing.append(["a"], source[:1] + 1)
    edited = editing.sources(torch.tensor([first]))
    assert edited is not None
    assert edited.eq(1).all()
    with pytest.raises(UserError, match="leave the images out"):
        Rows(torch.ones(3, 2, 4), None, None, lambda _: read_words).append(["a"], source[:1])


def test_without_a_mask_of_a_prompt_all_its_tokens_are_there() -> None:
    def read_unmasked(texts: Sequence[str]) -> TextRows:
        tokens, _, _ = read_words(texts)
        return tokens, None, None

    rows = Rows(torch.ones(3, 2, 4), torch.ones(3, 2, dtype=torch.bool), None, lambda _: read_unmasked)
    first = rows.append(["three words here"])
    assert rows.lengths(torch.tensor([0, first])) == (2, 3)
