"""An encoder of texts that is trained along with the net."""

from pathlib import Path

import pytest
import torch

from dumo.encoders.texttable import encode
from dumo.encoders.tokens import Tokenizer
from dumo.flow import dropout
from dumo.flow.slope import DualSlope, JvpSlope
from dumo.nets.dit import DiT, Transformer
from dumo.nets.text import Encoded, Learned
from dumo.types import Frozen, Needs, UserError
from unit.nets.given import drawn, points

CAPTIONS = ("a seven", "a three", "4")
SHAPE, VU = (1, 4, 4), Needs(heads=("v", "u"))


def spec(folder: Path, length: int = 9) -> Learned:
    """A tiny encoder over the bytes of CAPTIONS."""
    tokenizer = Tokenizer(length=length)
    encode(CAPTIONS, tokenizer, folder)
    return Learned(root=str(folder), tokenizer=tokenizer, width=8, depth=2)


def built(texts: Learned) -> Transformer:
    """A net of it."""
    return drawn(DiT(patch=2, width=8, depth=2, attention=2, texts=texts), VU, SHAPE, len(CAPTIONS))


def encoder_of(net: Transformer) -> Encoded:
    """The captions' part of a net."""
    assert net.text is not None
    assert isinstance(net.text.texts, Encoded)
    return net.text.texts


def test_it_learns_with_the_net_and_its_captions_rest(tmp_path: Path) -> None:
    """Every parameter gets a gradient, d/dt is exact, and no pass draws a number."""
    net, (x, c, t) = built(spec(tmp_path)), points(4, SHAPE, len(CAPTIONS))
    state = torch.get_rng_state()
    torch.stack([head.square().sum() for head in net(x, c, t=t)]).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    for toward in (None, w):
        exact, found = (s(net, Frozen(net), x, c, toward=toward, t=t)[1](w) for s in (JvpSlope(), DualSlope()))
        assert all(((a - b).norm() / b.norm()).item() < 1e-6 for a, b in zip(found, exact, strict=True))


def test_room_behind_a_caption_is_nothing(tmp_path: Path) -> None:
    x, c, t = points(4, SHAPE, len(CAPTIONS))
    one, other = (built(spec(tmp_path / str(length), length))(x, c, t=t) for length in (9, 32))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_prompts_stand_behind_all_captions(tmp_path: Path) -> None:
    """A prompt that is a caption is read as that caption, and none as the empty one."""
    net, (x, c, t) = built(spec(tmp_path)), points(4, SHAPE, len(CAPTIONS))
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
    net, (x, c, t) = built(spec(tmp_path).model_copy(update={"drop": 0.4})), points(4, SHAPE, len(CAPTIONS))
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
    texts = spec(tmp_path)
    net = built(texts)
    with torch.device("meta"):
        outline = texts.model_copy(update={"root": "nowhere"}).build(3)
    names = {name.removeprefix("text.texts.") for name in net.state_dict() if name.startswith("text.texts.")}
    assert names == set(outline.state_dict()) == {name for name, _ in outline.named_parameters()}
    assert outline(torch.zeros(2, dtype=torch.long, device="meta"))[0].shape == (2, 9, 8)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    texts = spec(tmp_path)
    for update, says in (
        ({"tokenizer": Tokenizer(length=10)}, "encoded otherwise"),
        ({"root": str(tmp_path / "none")}, "dumo encode"),
    ):
        with pytest.raises(UserError, match=says):
            texts.model_copy(update=update).build(3)
    with pytest.raises(UserError, match="3 captions, and the data have 4"):
        texts.build(4)
