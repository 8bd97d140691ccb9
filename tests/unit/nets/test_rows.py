"""Laws of rows of text by number."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import encoders
from dumo.encoders.text import EncoderModel, TextEncoder
from dumo.encoders.texttable import encode
from dumo.nets.rows import Rows, TextRows
from dumo.nets.table import TextTable


def test_a_caption_edits_its_own_image() -> None:
    source = torch.randn(4, 2, 3, 3, dtype=torch.float16)
    rows = Rows(torch.zeros(4, 5, 8), None, None, source=source)
    c = torch.tensor([2, 0, 2])
    found = rows.sources(c)
    assert found is not None
    assert torch.equal(found, source[c].float())
    assert Rows(torch.zeros(4, 5, 8), None, None).sources(c) is None


def read_words(texts: Sequence[str], device: torch.device) -> TextRows:
    """A token of ones for each word, padded to the longest text."""
    lengths = torch.tensor([len(text.split()) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return mask[..., None].float().expand(-1, -1, 4), mask, None


def test_rows_are_as_short_again_once_a_long_prompt_is_forgotten() -> None:
    rows = Rows(torch.ones(3, 2, 4), torch.ones(3, 2, dtype=torch.bool), None, read_words)
    first = rows.append(["a", "a long prompt of six words", "one of four words"])
    assert rows(torch.tensor([first]))[0].shape == (1, 6, 4)
    rows.keep(first, [first, first + 2])
    assert rows.length == 4
    assert rows(torch.arange(5))[0].shape == (5, 4, 4)
    assert rows.lengths(torch.arange(5)) == (2, 2, 2, 1, 4)
    rows.keep(first, [])
    assert rows(torch.arange(3))[0].shape == (3, 2, 4)


def test_a_prompt_edits_its_own_image() -> None:
    source = torch.zeros(3, 2, 3, 3)
    editing = Rows(torch.ones(3, 2, 4), None, None, read_words, source)
    first = editing.append(["a"], source[:1] + 1)
    edited = editing.sources(torch.tensor([first]))
    assert edited is not None
    assert edited.eq(1).all()


def test_without_a_mask_of_a_prompt_all_its_tokens_are_there() -> None:
    def read_unmasked(texts: Sequence[str], device: torch.device) -> TextRows:
        tokens, _, _ = read_words(texts, device)
        return tokens, None, None

    rows = Rows(torch.ones(3, 2, 4), torch.ones(3, 2, dtype=torch.bool), None, read_unmasked)
    first = rows.append(["three words here"])
    assert rows.lengths(torch.tensor([0, first])) == (2, 3)


@pytest.mark.parametrize("memory", [4, 0], ids=["in memory", "on the disk"])
def test_prompts_are_encoded_some_at_a_time_by_an_encoder_that_stays_open(
    memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = TextEncoder(source=str(encoders.t5(tmp_path / "t5")), length=24, dtype="float32")
    encode(["a red car", "a cat"], encoder, tmp_path / "texts")
    spec = TextTable(root=str(tmp_path / "texts"), encoder=encoder, width=encoders.WIDTH, memory=memory)
    rows = spec.build(2)
    batch_sizes: list[int] = []
    open_encoder = TextEncoder.open

    def open_counted(spec: TextEncoder, device: torch.device | str = "cpu") -> EncoderModel:
        opened = open_encoder(spec, device)

        def count(module: torch.nn.Module, args: object, inputs: dict[str, Any]) -> None:
            batch_sizes.append(len(inputs["input_ids"]))

        opened.model.register_forward_pre_hook(count, with_kwargs=True)
        batch_sizes.append(0)
        return opened

    monkeypatch.setattr(TextEncoder, "open", open_counted)
    prompts = [f"{n} red cats" for n in range(100)]
    first = rows.append(prompts)
    assert batch_sizes == [0, 32, 32, 32, 4]
    again = [copy.deepcopy(rows).append([prompts[0]]), *(rows.append([prompt]) for prompt in prompts[::33])]
    assert batch_sizes[5:] == [1] * 5  # without opening it again
    for number, prompt_number in zip(range(first, first + 100, 33), again[1:], strict=True):
        torch.testing.assert_close(rows(torch.tensor([number]))[0], rows(torch.tensor([prompt_number]))[0])
