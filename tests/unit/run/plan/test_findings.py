"""Captions that an encoder does not tell apart are found before anything is trained on them."""

import torch
from dumo.run.plan.separability import measure

from dumo.runtime.random import keyed

CLASSES, EACH = 8, 5


def placed(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions of classes around a centre each, and their classes."""
    group = torch.arange(CLASSES).repeat_interleave(EACH)
    centres = keyed("centres", rows=range(CLASSES), shape=[16])
    return centres[group] + spread * keyed("around", rows=range(len(group)), shape=[16]), group


def test_captions_of_a_class_lie_together_or_not() -> None:
    near, far = measure(*placed(0.1)), measure(*placed(30.0))
    assert near.accuracy == 1
    assert not near.low
    assert far.accuracy is not None
    assert far.accuracy < 0.3
    assert far.low
    assert near.chance == far.chance == (EACH - 1) / (CLASSES * EACH - 1)


def test_what_all_embeddings_share_says_nothing() -> None:
    x, group = placed(0.3)
    moved = measure(5 * x.double() + 100, group)
    here = measure(x, group)
    assert moved.accuracy == here.accuracy
    assert abs(moved.gap - here.gap) < 1e-6


def test_one_caption_each_is_judged_by_the_gap_and_twins_always() -> None:
    x, _ = placed(1.0)
    found = measure(x, torch.arange(len(x)))
    assert found.accuracy is None
    assert not found.low
    x[3] = x[17]
    twins = measure(x)
    assert twins.twins == 2
    assert twins.low
    pairs = x.repeat_interleave(2, 0)
    pairs[1::2] += 0.01
    close = measure(pairs[:-2])
    assert close.gap < 0.01
    assert close.low
