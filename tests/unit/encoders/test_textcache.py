"""A cache of encoded texts: rows by encoder and text, whoever made them, however often that was interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import encoders
from dumo.encoders import textcache
from dumo.encoders.textcache import fill_cache, find_identity, find_rows, identity_of, is_filled, open_tables
from dumo.encoders.transformers_text import Embeddings, EncoderModel, TextEncoder
from dumo.runtime.signals import Stopped
from dumo.types import UserError
from unit.encoders.toy import contents

CAPTIONS = ("a red car", "a blue car", "cat", "h\u00e9 \u2028 \x85 x", 'a "quoted" text', "photo of a cat", "seven", "")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three texts to a shard, two to a batch."""
    monkeypatch.setattr(textcache, "SHARD_ROWS", 3)
    monkeypatch.setattr(textcache, "BATCH_SIZE", 2)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(source=str(encoders.t5(tmp_path_factory.mktemp("encoders") / "t5")), length=24, dtype="float32")


@pytest.fixture
def whole(spec: TextEncoder, tmp_path: Path) -> Path:
    """The folder of the encoder, filled in one go."""
    folder = tmp_path / "whole" / identity_of(spec)
    result = fill_cache(folder, CAPTIONS, spec)
    assert (result.made, result.damaged, result.missing) == (3, (), 0)
    return folder


def test_every_row_is_what_the_encoder_makes_of_its_caption(spec: TextEncoder, whole: Path) -> None:
    read = spec.open()
    tables = open_tables(whole)
    for text, (table, row) in zip(CAPTIONS, find_rows(tables, CAPTIONS).tolist(), strict=True):
        assert torch.allclose(tables[table].row(row)["tokens"], read([text]).tokens[0], atol=1e-6)
    assert find_rows(tables, ["a dog", "cat"]).tolist() == [[-1, -1], [0, 2]]


def test_captions_that_come_later_are_encoded_alone(spec: TextEncoder, whole: Path) -> None:
    before = contents(whole)
    assert fill_cache(whole, CAPTIONS[::-1], spec).made == 0
    assert not is_filled(whole, ("a dog", *CAPTIONS), deep=False)
    assert fill_cache(whole, ("a dog", *CAPTIONS, "a fox"), spec).made == 1
    after = contents(whole)
    assert before.items() <= after.items()
    assert [len(table.texts) for table in sorted(open_tables(whole), key=lambda table: len(table.texts))] == [2, 8]
    assert is_filled(whole, ("a dog", *CAPTIONS, "a fox"), deep=True)


def test_ranks_and_stops_leave_the_same_bytes(
    spec: TextEncoder, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ranks" / whole.name
    encode = EncoderModel.__call__
    calls = 0

    def stop_at_the_fourth(model: EncoderModel, texts: list[str]) -> Embeddings:
        nonlocal calls
        calls += 1
        if calls == 4:  # after the empty text and both batches of the first shard
            raise Stopped(15, "stopped")
        return encode(model, texts)

    with monkeypatch.context() as patch:
        patch.setattr(EncoderModel, "__call__", stop_at_the_fourth)
        with pytest.raises(Stopped):
            fill_cache(out, CAPTIONS, spec, rank=0, world=2)
    assert not is_filled(out, CAPTIONS, deep=False)
    assert fill_cache(out, CAPTIONS, spec, rank=0, world=2).made == 1  # of shards 0 and 2
    assert fill_cache(out, CAPTIONS, spec, rank=1, world=2).missing == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_shard_is_named_and_made_again(spec: TextEncoder, whole: Path, how: str) -> None:
    before = contents(whole)
    (shard,) = whole.glob("*/shard-00001.safetensors")
    if how == "changed":
        shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
        assert is_filled(whole, CAPTIONS, deep=False), "its size is the same"
    else:
        shard.unlink()
        assert not is_filled(whole, CAPTIONS, deep=False)
    assert not is_filled(whole, CAPTIONS, deep=True)
    result = fill_cache(whole, CAPTIONS[:2], spec, deep=True)  # whatever is asked for
    assert result.made == len(result.damaged) == 1
    assert "shard-00001.safetensors" in result.damaged[0]
    assert contents(whole) == before


def test_texts_that_are_not_those_of_the_rows_are_refused(spec: TextEncoder, whole: Path) -> None:
    (file,) = whole.glob("*/texts.jsonl")
    file.write_text(file.read_text().replace("red", "green"))
    with pytest.raises(UserError, match="the texts in "):
        fill_cache(whole, CAPTIONS, spec)
    shutil.rmtree(file.parent)
    assert fill_cache(whole, CAPTIONS, spec).made == 3


def test_another_encoder_has_another_folder(spec: TextEncoder, whole: Path, tmp_path: Path) -> None:
    assert whole.name.startswith("t5-")
    moved = spec.model_copy(update={"source": str(encoders.t5(tmp_path / "moved"))})
    other = spec.model_copy(update={"source": str(encoders.t5(tmp_path / "other", seed=1))})
    prompted = spec.model_copy(update={"template": "so: {}"})
    assert identity_of(moved) == whole.name
    assert len({identity_of(spec), identity_of(other), identity_of(prompted), identity_of(spec, "an autoencoder")}) == 4

    clip = TextEncoder(source=str(encoders.clip(tmp_path / "clip")), length=12)
    before = identity_of(clip)
    file = tmp_path / "clip" / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    assert identity_of(clip) != before


def test_a_machine_without_the_encoder_finds_the_only_one_of_its_fields(spec: TextEncoder, whole: Path) -> None:
    lost = spec.model_copy(update={"source": "nowhere"})
    assert find_identity(whole.parent, lost) == whole.name
    assert find_identity(whole.parent, lost.model_copy(update={"length": 25})) is None
    other = spec.model_copy(update={"source": str(encoders.t5(whole.parent.parent / "other", seed=1))})
    fill_cache(whole.parent / identity_of(other), ["a"], other)
    assert find_identity(whole.parent, lost) is None, "which of two is not known"


def test_captions_that_are_cut_are_counted(spec: TextEncoder, tmp_path: Path) -> None:
    short = spec.model_copy(update={"length": 10})
    with pytest.warns(UserWarning, match="captions are cut") as warned:
        fill_cache(tmp_path / "cut", CAPTIONS, short)
    assert [str(warning.message) for warning in warned] == [
        "4 captions are cut at 10 tokens: raise net.texts.encoder.length"
    ]
