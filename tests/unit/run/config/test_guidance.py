"""Guidance as a user asks for it: in training or in sampling, and where it is refused."""

import pytest

from dumo.run.config.load import difference, load
from dumo.types import UserError

FREE = ["objective.drop=0.1"]  # digits, taught without guidance what no label is


def test_guidance_needs_classes() -> None:
    with pytest.raises(UserError, match="no classes"):
        load("moons", ["objective.guide.zeta=0.5"])


def test_sampling_may_be_guided_where_training_was_not() -> None:
    run = load("digits", [*FREE, "sample.guide.scale=1.5", "sample.guide.interval.high=0.8"])
    assert (run.sample.guide.scale, run.sample.guide.interval.high) == (1.5, 0.8)
    assert not list(difference(load("digits", FREE), run))  # free to change, once it is trained
    assert not load("moons").sample.guide.active


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("moons", [], "data 'moons' has no classes"),
        ("digits", ["objective.drop=0"], "objective.drop = 0 never"),
        ("digits-guided", [], r"sample.guide.scale = 2 .*objective.guide"),
        ("digits", [*FREE, "objective.guide.zeta=0.44"], r"objective.guide has guided in training, by 1.79"),
    ],
)
def test_sampling_is_not_guided_where_it_cannot_be(recipe: str, words: list[str], said: str) -> None:
    load(recipe, [*words, "sample.guide.scale=1"])
    with pytest.raises(UserError, match=said):
        load(recipe, [*words, "sample.guide.scale=2"])
