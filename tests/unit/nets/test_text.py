"""Texts: rows of a table, wherever they lie, with prompts behind them; and an encoder that is trained along."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import encoders
from dumo.encoders.text import TextEncoder
from dumo.encoders.texttable import encode
from dumo.encoders.tokens import ByteTokenizer
from dumo.flow import dropout
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets.dit import DiT, Transformer
from dumo.nets.rows import Texts
from dumo.nets.table import TextTable
from dumo.nets.text import LearnedTexts, TokenTexts
from dumo.nets.textblock import TextEmbedder
from dumo.types import Frozen, Needs, UserError
from unit.nets.given import drawn, points

CAPTIONS = ("a red car", "a blue car", "cat")
NEW = ["a photo of a red cat", "seven"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TextTable:
    """A table that is made."""
    place = tmp_path_factory.mktemp("texts")
    encoder = TextEncoder(source=str(encoders.t5(place / "t5")), length=24)
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


def test_the_layer_of_tokens_starts_as_xavier_draws_it(spec: TextTable) -> None:
    token = TextEmbedder(spec.build(len(CAPTIONS)), 256).token
    assert token.weight.std().item() == pytest.approx((2 / (encoders.WIDTH + 256)) ** 0.5, rel=0.1)
    assert not token.bias.any()


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_prompts_that_are_forgotten_leave_the_others_as_they_are(spec: TextTable, memory: float) -> None:
    texts = spec.model_copy(update={"memory": memory}).build(len(CAPTIONS))
    texts.forget(1)
    first = texts.append(["seven", *NEW])
    texts.prompts = {"red": first + 1, "seven": first, "last": first + 2}
    before = texts(torch.tensor([0, 3, first, first + 2]))
    texts.forget(2)
    assert texts.prompts == {"seven": first, "last": first + 1}
    after = texts(torch.tensor([0, 3, first, first + 1]))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with pytest.raises(IndexError):
        texts(torch.tensor([first + 2]))


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
    assert (texts.width, texts.length, texts.pooled_width, texts.has_mask) == (encoders.WIDTH, 24, 0, True)
    with pytest.raises(UserError, match="dumo encode"):
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
    again = TextTable.model_validate(spec.model_dump() | {"identity": None}).with_identity()
    assert again.identity is not None
    assert TextTable(root="nowhere", encoder=spec.encoder, width=16).identity is None


# --- an encoder that is trained along with the net

WORDS = ("a seven", "a three", "4")
SHAPE, VU = (1, 4, 4), Needs(heads=("v", "u"))


def learned(folder: Path, length: int = 9) -> LearnedTexts:
    """A tiny encoder over the bytes of WORDS."""
    tokenizer = ByteTokenizer(length=length)
    encode(WORDS, tokenizer, folder)
    return LearnedTexts(root=str(folder), tokenizer=tokenizer, width=8, depth=2)


def built(texts: LearnedTexts) -> Transformer:
    """A net of it."""
    return drawn(DiT(patch=2, width=8, depth=2, attention=2, texts=texts), VU, SHAPE, len(WORDS))


def encoder_of(net: Transformer) -> TokenTexts:
    """The captions' part of a net."""
    assert net.text is not None
    assert isinstance(net.text.texts, TokenTexts)
    return net.text.texts


def test_it_learns_with_the_net_and_its_captions_rest(tmp_path: Path) -> None:
    """Every parameter gets a gradient, d/dt is exact, and no pass draws a number."""
    net, (x, c, t) = built(learned(tmp_path)), points(4, SHAPE, len(WORDS))
    state = torch.get_rng_state()
    torch.stack([head.square().sum() for head in net(x, c, t=t)]).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    for toward in (None, w):
        exact, found = (s(net, Frozen(net), x, c, toward=toward, t=t)[1](w) for s in (JvpSlope(), DualSlope()))
        assert all(((a - b).norm() / b.norm()).item() < 1e-6 for a, b in zip(found, exact, strict=True))


def test_room_behind_a_caption_is_nothing(tmp_path: Path) -> None:
    x, c, t = points(4, SHAPE, len(WORDS))
    one, other = (built(learned(tmp_path / str(length), length))(x, c, t=t) for length in (9, 32))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_prompts_stand_behind_all_captions(tmp_path: Path) -> None:
    """A prompt that is a caption is read as that caption, and none as the empty one."""
    net, (x, c, t) = built(learned(tmp_path)), points(4, SHAPE, len(WORDS))
    before = net(x, c, t=t)
    assert encoder_of(net).append(["a nine", "4"]) == 4
    assert encoder_of(net).append([""]) == 6
    assert all(torch.equal(a, b) for a, b in zip(net(x, c, t=t), before, strict=True))
    x, t = x[:1].expand(2, -1, -1, -1), t[:1].expand(2)
    for one, other in ((5, 2), (6, 3)):
        (a, b), _ = net(x, torch.tensor([one, other]), t=t)
        assert torch.equal(a, b)


def test_a_hidden_word_tells_nothing_and_the_end_stays(tmp_path: Path) -> None:
    """Whatever stands there; a share `drop` is hidden, each row's by its key, and none without keys or in sampling."""
    net, (x, c, t) = built(learned(tmp_path).model_copy(update={"drop": 0.4})), points(4, SHAPE, len(WORDS))
    texts, keys = encoder_of(net), dropout.keys(0, 0, 4)
    with dropout.using(keys):
        mask, one = texts(c)[1], net(x, c, t=t)
        assert not torch.equal(mask, texts.mask)
        with dropout.rows([2, 0]):
            assert torch.equal(texts(c[[2, 0]])[1], mask[[2, 0]])
        ids, other = texts.ids, texts.ids.where((texts.ids == 35) | mask, 200)
        texts.ids = other
        assert all(torch.equal(a, b) for a, b in zip(net(x, c, t=t), one, strict=True))
        texts.ids = ids
    many = torch.zeros(2000, dtype=torch.long)  # "a seven", and its end
    with dropout.using(dropout.keys(0, 1, len(many))):
        there = texts(many)[1]
        assert there.mean(0, dtype=torch.float) == pytest.approx([0.6] * 7 + [1, 0], abs=0.05)
        first, second = there[:, :1], there[:, 1:7]
        assert torch.equal(second, second[:, :1].expand_as(second))  # a space goes with the word behind it
        assert not torch.equal(first.expand_as(second), second)
        net.eval()
        assert torch.equal(texts(many)[1], texts.mask[many])
    net.train()
    with dropout.off():
        assert torch.equal(texts(many)[1], texts.mask[many])


def test_a_checkpoint_has_the_encoder_and_not_the_captions(tmp_path: Path) -> None:
    texts = learned(tmp_path)
    net = built(texts)
    with torch.device("meta"):
        outline = texts.model_copy(update={"root": "nowhere"}).build(3)
    names = {name.removeprefix("text.texts.") for name in net.state_dict() if name.startswith("text.texts.")}
    assert names == set(outline.state_dict()) == {name for name, _ in outline.named_parameters()}
    assert outline(torch.zeros(2, dtype=torch.long, device="meta"))[0].shape == (2, 9, 8)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    texts = learned(tmp_path)
    for update, says in (
        ({"tokenizer": ByteTokenizer(length=10)}, "encoded otherwise"),
        ({"root": str(tmp_path / "none")}, "dumo encode"),
    ):
        with pytest.raises(UserError, match=says):
            texts.model_copy(update=update).build(3)
    with pytest.raises(UserError, match="3 captions, and the data have 4"):
        texts.build(4)
