"""Rows of a table are the same wherever they lie, and prompts stand behind them."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import encoders
from dumo.encoders.text import Encoder
from dumo.encoders.texttable import encode
from dumo.nets.rows import Texts
from dumo.nets.table import TextTable
from dumo.types import UserError

CAPTIONS = ("a red car", "a blue car", "cat")
NEW = ["a photo of a red cat", "seven"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TextTable:
    """A table that is made."""
    place = tmp_path_factory.mktemp("texts")
    encoder = Encoder(source=str(encoders.t5(place / "t5")), length=24)
    encode(CAPTIONS, encoder, place / "table", shard_rows=2)
    return TextTable(root=str(place / "table"), encoder=encoder, width=encoders.WIDTH)


def mapped(spec: TextTable) -> Texts:
    """Its rows, looked up on disk."""
    return spec.model_copy(update={"memory": 0.0}).build(len(CAPTIONS))


def test_rows_in_memory_and_on_disk_are_the_same_before_and_after_prompts(spec: TextTable) -> None:
    c = torch.tensor([2, 0, 3, 3, 1])
    held, looked_up = spec.build(len(CAPTIONS)), mapped(spec)
    before = held(c)
    for one, other in zip(before, looked_up(c), strict=True):
        assert one is other is None or torch.equal(one, other)
    assert held.append(NEW) == looked_up.append(NEW) == len(CAPTIONS) + 1
    for one, old in zip(held(c), before, strict=True):
        assert one is old is None or torch.equal(one, old)
    behind = torch.tensor([5, 0, 4])
    for one, other in zip(held(behind), looked_up(behind), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_a_caption_as_a_prompt_is_the_row_that_it_has(spec: TextTable) -> None:
    texts = spec.build(len(CAPTIONS))
    first = texts.append(CAPTIONS)
    tokens, mask, _ = texts(torch.arange(first + 3))
    assert mask is not None
    assert torch.equal(mask[first:], mask[:3])
    assert torch.allclose(tokens[first:], tokens[:3], atol=1e-3)  # the batch moves the last bits of half precision


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_rows_follow_the_net_in_type_and_are_in_no_checkpoint(spec: TextTable, memory: float) -> None:
    net = nn.Sequential(spec.model_copy(update={"memory": memory}).build(len(CAPTIONS))).double()
    assert not net.state_dict()
    assert net(torch.tensor([1]))[0].dtype == torch.float64


def test_a_net_is_outlined_without_any_file(spec: TextTable) -> None:
    nowhere = spec.model_copy(update={"root": "nowhere"})
    with torch.device("meta"):
        texts = nowhere.build(100)
    assert (texts.width, texts.length, texts.pooled_width, texts.masked) == (encoders.WIDTH, 24, 0, True)
    with pytest.raises(UserError, match="make it, dumo encode"):
        nowhere.build(3)


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_a_shard_that_was_overwritten_is_refused(spec: TextTable, tmp_path: Path, memory: float) -> None:
    """In memory or looked up on disk; before that a net can be copied."""
    place = tmp_path / "table"
    shutil.copytree(spec.folder, place)
    moved = spec.model_copy(update={"root": str(place), "memory": memory})
    copy.deepcopy(moved.build(len(CAPTIONS)))
    shard = place / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors has changed: its SHA-256 is another"):
        moved.build(len(CAPTIONS))


def test_a_table_of_something_else_is_refused(spec: TextTable, tmp_path: Path) -> None:
    def refused(match: str, classes: int = 3, **fields: object) -> None:
        with pytest.raises(UserError, match=match):
            spec.model_copy(update=fields).build(classes)

    refused("holds 3 captions, and the data have 4", classes=4)
    refused(r"set net\.texts\.width=16", width=8)
    refused(r"encoder\.length: 24 there, 8 asked", encoder=spec.encoder.model_copy(update={"length": 8}))
    refused("another table than that of this run", identity="0123456789abcdef")
    other = spec.encoder.model_copy(update={"source": str(encoders.t5(tmp_path / "other", seed=1))})
    texts = spec.model_copy(update={"encoder": other}).build(3)  # who wrote them is asked when there is more to write
    with pytest.raises(UserError, match="name the folder of that encoder"):
        texts.append(NEW)
    with pytest.raises(ValueError, match="set both, or neither"):
        TextTable(root="x", encoder=spec.encoder, width=8, pooled=4)


def test_a_run_keeps_to_the_table_that_was_there(spec: TextTable) -> None:
    again = TextTable.model_validate(spec.model_dump() | {"identity": None}).found()
    assert again.identity is not None
    assert TextTable(root="nowhere", encoder=spec.encoder, width=16).identity is None
