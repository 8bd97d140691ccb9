"""A text encoder that is trained with its net: captions are tokens, without any file."""

from typing import Any

import pytest
import torch

from dumo.encoders.tokens import ByteTokenizer
from dumo.flow import dropout
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets.dit import DiT, Transformer
from dumo.nets.learned import LearnedTexts, TokenTexts
from dumo.types import Frozen, Needs, UserError
from rows_given import load_captions
from unit.nets.given import drawn, points

WORDS = ("a seven", "a three", "4")
SHAPE, VU = (1, 4, 4), Needs(heads=("v", "u"))


def learned(length: int = 9, **fields: Any) -> LearnedTexts:  # noqa: ANN401
    """A tiny encoder over the bytes of texts."""
    return LearnedTexts(tokenizer=ByteTokenizer(length=length), width=8, depth=2, **fields)


def built(texts: LearnedTexts) -> Transformer:
    """A net of it."""
    net = drawn(DiT(patch=2, width=8, depth=2, attention=2, texts=texts), VU, SHAPE, len(WORDS))
    load_captions(net, WORDS)
    return net


def encoder_of(net: Transformer) -> TokenTexts:
    """The captions' part of a net."""
    assert net.text is not None
    assert isinstance(net.text.texts, TokenTexts)
    return net.text.texts


def test_it_learns_with_the_net_and_its_captions_rest() -> None:
    """Every parameter gets a gradient, d/dt is exact, and no pass draws a number."""
    net, (x, c, t) = built(learned()), points(4, SHAPE, len(WORDS))
    state = torch.get_rng_state()
    torch.stack([head.square().sum() for head in net(x, c, t=t)]).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    for direction in (None, w):
        exact, found = (s(net, Frozen(net), x, c, direction=direction, t=t)[1](w) for s in (JvpSlope(), DualSlope()))
        assert all(((a - b).norm() / b.norm()).item() < 1e-6 for a, b in zip(found, exact, strict=True))


def test_room_behind_a_caption_is_nothing() -> None:
    x, c, t = points(4, SHAPE, len(WORDS))
    one, other = (built(learned(length))(x, c, t=t) for length in (9, 32))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_prompts_stand_behind_all_captions() -> None:
    """A prompt that is a caption is read as that caption, and none as the empty one."""
    net, (x, c, t) = built(learned()), points(4, SHAPE, len(WORDS))
    before = net(x, c, t=t)
    assert encoder_of(net).append(["a nine", "4"]) == 4
    assert encoder_of(net).append([""]) == 6
    assert all(torch.equal(a, b) for a, b in zip(net(x, c, t=t), before, strict=True))
    x, t = x[:1].expand(2, -1, -1, -1), t[:1].expand(2)
    for one, other in ((5, 2), (6, 3)):
        (a, b), _ = net(x, torch.tensor([one, other]), t=t)
        assert torch.equal(a, b)


def test_a_hidden_word_tells_nothing_and_the_end_stays() -> None:
    """Whatever stands there; a share `drop` is hidden, each row's by its key, and none without keys or in sampling."""
    net, (x, c, t) = built(learned(drop=0.4)), points(4, SHAPE, len(WORDS))
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


def test_a_checkpoint_has_the_encoder_and_not_the_captions() -> None:
    net = built(learned())
    with torch.device("meta"):
        outline = learned().build(3)
    names = {name.removeprefix("text.texts.") for name in net.state_dict() if name.startswith("text.texts.")}
    assert names == set(outline.state_dict()) == {name for name, _ in outline.named_parameters()}
    assert outline(torch.zeros(2, dtype=torch.long, device="meta"))[0].shape == (2, 9, 8)


def test_captions_that_are_not_here_are_refused_and_prompts_are_read() -> None:
    texts = learned().build(3)
    learned().load(texts, ())
    first = texts.append(["4"])
    assert texts(torch.tensor([3, first]))[0].shape == (2, 9, 8)
    with pytest.raises(UserError, match="captions are not on this machine"):
        texts(torch.tensor([first, 2]))


def test_captions_that_are_cut_are_counted() -> None:
    short = learned(length=4)
    with pytest.warns(UserWarning, match="2 captions are truncated to 4 tokens: increase net.texts.tokenizer.length"):
        short.load(short.build(3), WORDS)
