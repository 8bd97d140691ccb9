"""Captions are numbered by their texts, drawn by key, and none is a number too."""

import torch

from dumo.encoders.caption import Captions

WRITTEN = [["a cat", "an animal"], ["a dog", "an animal"], [], ["  "], [" a cat "]]


def test_a_text_has_one_number_and_nothing_or_blanks_are_no_caption() -> None:
    captions = Captions.of(WRITTEN)
    assert captions.texts == ("a cat", "an animal", "a dog")
    assert captions.ids.tolist() == [0, 1, 2, 1, 3, 3, 0]
    assert captions.counts.tolist() == [2, 2, 1, 1, 1]
    assert captions.first(torch.tensor([1, 2, 3, 4, 0])).tolist() == [2, 3, 3, 0, 0]


def test_an_image_gets_each_of_its_captions_equally_often_and_no_other() -> None:
    captions, n = Captions.of(WRITTEN), 4000
    drawn = captions.drawn(torch.ones(n, dtype=torch.long), 0, 7, batch=n)
    assert set(drawn.tolist()) == {1, 2}
    assert abs((drawn == 1).double().mean() - 0.5) < 0.03  # 4 standard deviations


def test_a_rank_draws_what_the_whole_batch_would() -> None:
    captions, images = Captions.of(WRITTEN), torch.tensor([0, 1, 2, 3, 4, 0, 1, 0])
    whole = captions.drawn(images, 3, 5, batch=8)
    assert captions.drawn(images[3:6], 3, 5, batch=8, rows=slice(3, 6)).equal(whole[3:6])
    others = [captions.drawn(images, 3, step, batch=8) for step in range(20)]
    assert not all(other.equal(whole) for other in others)


def test_the_digest_is_of_the_texts_in_their_order() -> None:
    first, again, turned = Captions.of([["a"], ["b"]]), Captions.of([["a", "b"]]), Captions.of([["b"], ["a"]])
    assert first.digest() == again.digest() != turned.digest()
