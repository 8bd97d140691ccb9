"""What an encoder of transformers makes of texts: each by itself, cut where it is too long, never from a pickle.

A table holds it of each caption, and is the same however often its making was interrupted.
"""

import json
from pathlib import Path

import pytest
import torch

import encoders
from dumo.encoders.tokens import ByteTokenizer, load_tokenizer
from dumo.encoders.transformers_text import TextEncoder

TEXTS = ["a red car", "", "a blue car of a cat"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder."""
    return encoders.t5(tmp_path_factory.mktemp("encoders") / "t5")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has its tokenizer beside it, as in a pipeline."""
    return encoders.clip(tmp_path_factory.mktemp("encoders") / "clip")


@torch.no_grad()
def test_it_is_what_transformers_gives(t5: Path, clip: Path) -> None:
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    ids, mask = ByteTokenizer(length=30).open()(TEXTS, fills_length=False)
    wanted = T5EncoderModel.from_pretrained(t5)(ids, attention_mask=mask.long()).last_hidden_state
    assert torch.equal(TextEncoder(source=str(t5)).open()(TEXTS).tokens, wanted)

    spec = TextEncoder(source=str(clip), pooled=True, layer=-2, pad=True, length=12)
    encoder = spec.open()
    ids, _ = encoder.tokenizer(TEXTS)
    stock = CLIPTextModelWithProjection.from_pretrained(clip)(ids, output_hidden_states=True)
    found = encoder(TEXTS)
    assert torch.equal(found.tokens, stock.hidden_states[-2])
    assert found.pooled is not None
    assert torch.equal(found.pooled, stock.text_embeds)
    assert found.mask.all()


def test_the_first_tokens_of_a_template_are_left_out(t5: Path) -> None:
    whole = TextEncoder(source=str(t5), template="say: {}!").open()(TEXTS)
    rest = TextEncoder(source=str(t5), template="say: {}!", skip=5).open()(TEXTS)
    assert torch.equal(rest.tokens, whole.tokens[:, 5:])
    assert rest.mask.sum(1).tolist() == [len(text) + 2 for text in TEXTS]


def test_a_tokenizer_without_special_tokens_has_words_around_a_text(tmp_path: Path) -> None:
    folder = encoders.clip(tmp_path / "clip")
    file = folder.with_name("tokenizer") / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["post_processor"] = None
    file.write_text(json.dumps(settings))
    around = TextEncoder(source=str(folder), length=12, template="photo of {} cat", skip=2).open()(TEXTS)
    assert around.mask.sum(1).tolist() == [4, 1, 7]


def test_long_texts_are_cut_and_a_table_says_once_how_many(t5: Path, tmp_path: Path) -> None:
    spec = TextEncoder(source=str(t5), length=10)
    embeddings = spec.open()(TEXTS)
    assert int(embeddings.mask[2].sum()) == 10
    assert embeddings.cut_texts == (TEXTS[2],)


def test_tokens_before_a_text_are_counted_by_words_of_the_vocabulary(tmp_path: Path) -> None:
    """Where letters are unknown to it: they would all have the same tokens, to the end."""
    import tokenizers
    import transformers

    vocabulary = {"[UNK]": 0, "[END]": 1, "猫": 2, "狗": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$0 [END]", special_tokens=[("[END]", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]")
    fast.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, 8).count_tokens_before_text() == 0


def test_the_bytes_of_a_text_are_its_tokens() -> None:
    ids, mask = ByteTokenizer(length=40).open()(["cat", ""])
    assert ids[0, :4].tolist() == [ord("c") + 3, ord("a") + 3, ord("t") + 3, 1]  # ByT5: 3 special tokens, then bytes
    assert mask.sum(1).tolist() == [4, 1]
