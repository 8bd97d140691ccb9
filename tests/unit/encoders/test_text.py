"""What an encoder of transformers makes of texts: each by itself, cut where it is too long, never from a pickle.

A table holds it of each caption, and is the same however often its making was interrupted.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import encoders
from dumo.encoders.text import TextEncoder
from dumo.encoders.texttable import encode, open_table
from dumo.encoders.tokens import ByteTokenizer, load_tokenizer
from dumo.types import UserError
from unit.encoders.toy import contents

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
    with pytest.warns(UserWarning, match="captions are cut") as warned:
        encode(CAPTIONS, spec, tmp_path / "table", batch=1)
    assert [str(warning.message) for warning in warned] == [
        "4 of 7 captions are cut at 10 tokens: raise net.texts.encoder.length"
    ]


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


# --- a table

CAPTIONS = ("a red car", "a blue car", "cat", "h\u00e9 \u2028 \x85 x", 'a "quoted" text', "photo of a cat", "seven")
ROWS, BATCH = 3, 2


@pytest.fixture(scope="module")
def spec(t5: Path) -> TextEncoder:
    return TextEncoder(source=str(t5), length=24, dtype="float32")


@pytest.fixture(scope="module")
def whole(spec: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table made in one go."""
    out = tmp_path_factory.mktemp("tables") / "whole"
    assert encode(CAPTIONS, spec, out, shard_rows=ROWS, batch=BATCH).missing == 0
    return out


def test_every_row_is_what_the_encoder_makes_of_its_caption_and_the_last_of_nothing(
    spec: TextEncoder, whole: Path
) -> None:
    table, read = open_table(whole), spec.open()
    assert table.captions == CAPTIONS
    tokens, mask, pooled = table.read_rows()
    assert pooled is None
    for row, text in enumerate((*CAPTIONS, "")):
        alone = read([text])
        n = alone.tokens.shape[1]
        assert mask[row].tolist() == [True] * n + [False] * (24 - n)
        assert torch.allclose(tokens[row, :n], alone.tokens[0], atol=1e-6)
        assert not tokens[row, n:].any()
    assert torch.equal(table.read_rows([7, 2])[0], tokens[[7, 2]])


def test_damage_is_found_and_made_anew(spec: TextEncoder, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode(CAPTIONS, spec, out, shard_rows=ROWS, batch=BATCH)
    shard = out / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors has changed: its SHA-256 is another"):
        open_table(out).read_rows()
    (out / "captions.jsonl").write_text('"another"\n')
    with pytest.raises(UserError, match="holds other captions"):
        _ = open_table(out).captions
    done = encode(CAPTIONS, spec, out, shard_rows=ROWS, batch=BATCH)
    assert (done.made, len(done.damaged)) == (1, 1)
    assert contents(out) == contents(whole)


def test_another_encoder_or_other_captions_are_refused(spec: TextEncoder, whole: Path, tmp_path: Path) -> None:
    other = spec.model_copy(update={"source": str(encoders.t5(tmp_path / "other", seed=1))})
    with pytest.raises(UserError, match="holds another table:\n  sha256: "):
        encode(CAPTIONS, other, whole, shard_rows=ROWS)
    with pytest.raises(UserError, match="rows: 8 there, 3 now"):
        encode(CAPTIONS[:2], spec, whole, shard_rows=ROWS)
    with pytest.raises(UserError, match=r"encoder\.template: {} there, so: {} now"):
        encode(CAPTIONS, spec.model_copy(update={"template": "so: {}"}), whole, shard_rows=ROWS)
    with pytest.raises(UserError, match="there are no captions"):
        encode((), spec, tmp_path / "none")
    with pytest.raises(UserError, match="holds no texts"):
        open_table(tmp_path)


def test_tokens_alone_are_numbers(tmp_path: Path) -> None:
    encode(CAPTIONS, ByteTokenizer(length=40), tmp_path / "ids", shard_rows=ROWS)
    ids, mask, _ = open_table(tmp_path / "ids").read_rows()
    assert ids[2, :4].tolist() == [ord("c") + 3, ord("a") + 3, ord("t") + 3, 1]  # ByT5: 3 special tokens, then bytes
    assert mask.sum(1).tolist() == [len(text.encode()) + 1 for text in (*CAPTIONS, "")]


def test_the_identity_is_of_what_is_encoded_not_of_where_it_lies(
    spec: TextEncoder, whole: Path, tmp_path: Path
) -> None:
    moved = spec.model_copy(update={"source": str(encoders.t5(tmp_path / "moved"))})
    assert encode(CAPTIONS, moved, whole, shard_rows=ROWS).made == 0
    encode(CAPTIONS, moved, tmp_path / "again", shard_rows=ROWS + 1)
    encode((*CAPTIONS[::-1],), spec, tmp_path / "turned", shard_rows=ROWS)
    one, again, turned = (open_table(f).index.identity for f in (whole, tmp_path / "again", tmp_path / "turned"))
    assert one == again != turned


def test_another_tokenizer_of_the_same_vocabulary_is_another_encoder(tmp_path: Path) -> None:
    spec = TextEncoder(source=str(encoders.clip(tmp_path / "clip")), length=12)
    encode(CAPTIONS, spec, tmp_path / "table")
    index = open_table(tmp_path / "table").index
    index.require_encoder(spec.open(), spec.source)

    file = tmp_path / "clip" / "tokenizer" / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="holds another table:\n  tokenizer: "):
        encode(CAPTIONS, spec, tmp_path / "table")
    with pytest.raises(UserError, match=r"the tokenizer of .*text_encoder has the hash "):
        index.require_encoder(spec.open(), spec.source)


def test_a_table_that_notes_no_tokenizer_is_read_and_resumed(spec: TextEncoder, whole: Path, tmp_path: Path) -> None:
    """As before it was noted; and a run that noted the identity of such a table takes one that is made now."""
    new = open_table(whole)
    old_index = new.index.without_tokenizer()
    assert old_index.identity != new.index.identity
    new.require(spec, len(CAPTIONS), new.index.identity)
    new.require(spec, len(CAPTIONS), old_index.identity)
    with pytest.raises(UserError, match="is another table than that of this run"):
        new.require(spec, len(CAPTIONS), "0123456789abcdef")

    old = shutil.copytree(whole, tmp_path / "old")
    stored = old_index.model_copy(update={"inputs": old_index.inputs_digest()})
    (old / "index.json").write_text(stored.model_dump_json(by_alias=True))
    open_table(old).index.require_encoder(spec.open(), spec.source)
    assert encode(CAPTIONS, spec, old, shard_rows=ROWS).made == 0
    assert open_table(old).index.tokenizer is None
