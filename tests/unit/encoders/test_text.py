"""What an encoder of transformers makes of texts: each by itself, cut where it is too long, never from a pickle."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import encoders
from dumo.encoders.text import Encoder
from dumo.encoders.tokens import Tokenizer
from dumo.types import UserError

TEXTS = ["a red car", "", "a blue car of a cat"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder."""
    return encoders.t5(tmp_path_factory.mktemp("encoders") / "t5")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has its tokenizer beside it, as in a pipeline."""
    return encoders.clip(tmp_path_factory.mktemp("encoders") / "clip")


def test_a_text_is_the_same_alone_and_among_longer_ones(t5: Path) -> None:
    read = Encoder(source=str(t5)).open()
    found = read(TEXTS)
    for i, text in enumerate(TEXTS):
        alone = read([text])
        n = int(found.mask[i].sum())
        assert n == len(text.encode()) + 1
        assert torch.allclose(found.tokens[i, :n], alone.tokens[0], atol=1e-6)


@torch.no_grad()
def test_it_is_what_transformers_gives(t5: Path, clip: Path) -> None:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    ids, mask = Tokenizer(length=30).open()(TEXTS, whole=False)
    wanted = T5EncoderModel.from_pretrained(t5)(ids, attention_mask=mask.long()).last_hidden_state
    assert torch.equal(Encoder(source=str(t5)).open()(TEXTS).tokens, wanted)

    spec = Encoder(source=str(clip), pooled=True, layer=-2, pad=True, length=12)
    ids, _ = spec.cutter()(TEXTS)
    stock = CLIPTextModelWithProjection.from_pretrained(clip)(ids, output_hidden_states=True)
    found = spec.open()(TEXTS)
    assert torch.equal(found.tokens, stock.hidden_states[-2])
    assert found.pooled is not None
    assert torch.equal(found.pooled, stock.text_embeds)
    assert found.mask.all()


def test_the_first_tokens_of_a_template_are_left_out(t5: Path) -> None:
    whole = Encoder(source=str(t5), template="say: {}!").open()(TEXTS)
    rest = Encoder(source=str(t5), template="say: {}!", skip=5).open()(TEXTS)
    assert torch.equal(rest.tokens, whole.tokens[:, 5:])
    assert rest.mask.sum(1).tolist() == [len(text) + 2 for text in TEXTS]
    with pytest.raises(UserError, match="skip=7 leaves nothing"):
        Encoder(source=str(t5), template="say: {}!", skip=7).open()(TEXTS)


def test_a_long_text_is_cut_with_a_warning(t5: Path) -> None:
    read = Encoder(source=str(t5), length=10).open()
    with pytest.warns(UserWarning, match="'a blue car of a cat': more than 10 tokens, and cut there"):
        assert int(read(TEXTS).mask[2].sum()) == 10


def test_the_hash_is_of_the_weights(t5: Path, tmp_path: Path) -> None:
    assert Encoder(source=str(encoders.t5(tmp_path / "same"))).sha256() == Encoder(source=str(t5)).sha256()
    assert Encoder(source=str(encoders.t5(tmp_path / "other", seed=1))).sha256() != Encoder(source=str(t5)).sha256()


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("model.safetensors", Path.unlink, "has no weights"),
        ("model.safetensors", lambda file: file.rename(file.with_name("pytorch_model.bin")), "reads no pickle"),
        ("model.safetensors", lambda file: os.truncate(file, file.stat().st_size - 10), "is damaged"),
        ("tokenizer_config.json", Path.unlink, "holds no tokenizer"),
        ("config.json", Path.unlink, "has no config.json"),
    ],
)
def test_what_is_no_encoder_is_refused(tmp_path: Path, file: str, damage: Callable[[Path], object], says: str) -> None:
    damage(encoders.t5(tmp_path / "t5") / file)
    with pytest.raises(UserError, match=says):
        Encoder(source=str(tmp_path / "t5")).open()


def test_what_an_encoder_lacks_is_refused(t5: Path) -> None:
    with pytest.raises(UserError, match="makes no embedding of a whole text"):
        Encoder(source=str(t5), pooled=True).open()(TEXTS)
    with pytest.raises(UserError, match="the encoder has 2 layers"):
        Encoder(source=str(t5), layer=-4).open()(TEXTS)
    with pytest.raises(UserError, match="is no folder"):
        Encoder(source=str(t5 / "nowhere")).open()
    with pytest.raises(ValueError, match=r"holds \{\} once"):
        Encoder(source=str(t5), template="a text")
