"""Captions in the place of classes: numbered as they say, drawn evenly, and never one that is held out."""

from pathlib import Path

import torch

from dumo.config.load import load
from dumo.data import Digits
from dumo.data.cache import dump_captions, read_captions
from dumo.data.caption import Templates
from dumo.data.toy import DIGIT_NAMES
from dumo.encoders.caption_ids import Captions

WORDS = Templates(templates=("a handwritten {}", "{n}", "the digit {n}, {}"), held=("{}!", "no. {n}"))


def test_numbers_are_those_that_the_module_says() -> None:
    told = WORDS.all_captions(DIGIT_NAMES)
    assert len(told) == WORDS.num_captions(10) == 50
    for k, name in enumerate(DIGIT_NAMES):
        assert told.texts[3 * k : 3 * k + 3] == (f"a handwritten {name}", str(k), f"the digit {k}, {name}")
        assert told.texts[30 + 2 * k : 32 + 2 * k] == (f"{name}!", f"no. {k}")


def test_a_class_has_its_captions_in_turn() -> None:
    labels = torch.tensor([7, 7, 2, 7, 7, 2])
    texts = WORDS.all_captions(DIGIT_NAMES).texts
    seen = [texts[c] for c in WORDS.captions_in_turn(labels, 10)]
    assert seen == ["a handwritten seven", "7", "a handwritten two", "the digit 7, seven", "a handwritten seven", "2"]
    assert [texts[c] for c in WORDS.captions_in_turn(labels, 10, held_out=True)][:3] == ["seven!", "no. 7", "two!"]


def test_training_draws_all_that_are_seen_evenly_and_no_other() -> None:
    spec = Digits(captions=WORDS)
    source, plain = spec.open(), Digits().open()
    assert (spec.classes, spec.labels, Digits().classes) == (50, 10, 10)
    counts = torch.zeros(50)
    for step in range(60):
        (x, c), (same, label) = source.batch(step, 500, 3), plain.batch(step, 500, 3)
        assert torch.equal(x, same)
        assert torch.equal(c // 3, label)  # an image's captions are of its own class
        counts += c.bincount(minlength=50)
    assert not counts[30:].any()
    # 30,000 draws, 1,000 a caption: six standard deviations of a multinomial's count
    assert (counts[:30] - 1000).abs().max() < 6 * 1000**0.5


def test_a_batch_is_its_parts_whoever_makes_them() -> None:
    source = Digits(captions=WORDS).open()
    whole = source.batch(5, 12, 1)[1]
    parts = [source.batch(5, 12, 1, slice(k, None, 3))[1] for k in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(), whole)
    assert not torch.equal(whole, source.batch(5, 12, 2)[1])


def test_other_words_are_other_data_and_none_are_not_written() -> None:
    words = (None, WORDS, Templates(templates=("{}",)))
    assert len({Digits(captions=captions).open().fingerprint() for captions in words}) == 3
    assert Digits().model_dump() == {"kind": "digits"}
    assert "captions" not in load("cifar10-latents").data.images.model_dump()  # pyright: ignore
    assert Digits.model_validate(Digits(captions=WORDS).model_dump(mode="json")) == Digits(captions=WORDS)


# --- those of each image

WRITTEN = [["a cat", "an animal"], ["a dog", "an animal"], [], ["  "], [" a cat ", ""]]


def test_a_text_has_one_number_and_blanks_count_where_there_is_no_text() -> None:
    captions = Captions.from_images(WRITTEN)
    assert captions.texts == ("a cat", "an animal", "a dog")
    assert captions.ids.tolist() == [0, 1, 2, 1, 3, 3, 0]
    assert captions.counts.tolist() == [2, 2, 1, 1, 1]
    assert captions.first_of(torch.tensor([1, 2, 3, 4, 0])).tolist() == [2, 3, 3, 0, 0]


def test_a_cache_gives_the_numbers_of_the_images_captions(tmp_path: Path) -> None:
    captions = Captions.from_images(WRITTEN)
    (tmp_path / "captions.jsonl").write_bytes(dump_captions(captions))
    cached = read_captions(tmp_path / "captions.jsonl")
    assert torch.equal(cached.ids, captions.ids)
    assert torch.equal(cached.ends, captions.ends)


def test_an_image_gets_each_of_its_captions_equally_often_and_no_other() -> None:
    captions, n = Captions.from_images(WRITTEN), 4000
    drawn = captions.draw(torch.ones(n, dtype=torch.long), 0, 7, batch=n)
    assert set(drawn.tolist()) == {1, 2}
    assert abs((drawn == 1).double().mean() - 0.5) < 0.03  # 4 standard deviations


def test_a_rank_draws_what_the_whole_batch_would() -> None:
    captions, images = Captions.from_images(WRITTEN), torch.tensor([0, 1, 2, 3, 4, 0, 1, 0])
    whole = captions.draw(images, 3, 5, batch=8)
    assert captions.draw(images[3:6], 3, 5, batch=8, rows=slice(3, 6)).equal(whole[3:6])
    others = [captions.draw(images, 3, step, batch=8) for step in range(20)]
    assert not all(other.equal(whole) for other in others)


def test_the_digest_is_of_the_texts_in_their_order() -> None:
    first, again, turned = (
        Captions.from_images([["a"], ["b"]]),
        Captions.from_images([["a", "b"]]),
        Captions.from_images([["b"], ["a"]]),
    )
    assert first.digest() == again.digest() != turned.digest()
