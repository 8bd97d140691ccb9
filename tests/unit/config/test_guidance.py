"""Guidance as a user asks for it: by a preset's name, in training or in sampling, and where it is refused."""

import pytest

from dumo.config.load import difference, load, parse
from dumo.config.spec import Run
from dumo.flow.guide import Guide
from dumo.types import UserError

FREE = ["objective.drop=0.1"]  # digits, taught without guidance what no label is


def guide(run: Run) -> Guide:
    return run.objective.guide


@pytest.mark.parametrize("recipe", ["digits", "digits-meanflow"])
@pytest.mark.parametrize("preset", ["paper", "ucgm"])
def test_a_preset_stands_in_the_run_as_its_numbers(recipe: str, preset: str) -> None:
    run = load(recipe, [f"objective.guide={preset}", *FREE])
    assert guide(run) == Guide.model_validate(preset)
    tree = run.model_dump(mode="json")
    assert tree["objective"]["guide"] == {
        "omega": 1.0,
        "zeta": {"paper": 0.55, "ucgm": 0.44}[preset],
        "interval": {"low": 0.0, "high": {"paper": 1.0, "ucgm": 0.75}[preset]},
        "elsewhere": {"paper": "data", "ucgm": "average"}[preset],
        "fraction": 1.0,
        "fade": None,
    }
    again = parse(Run, tree)
    assert again == run
    assert not list(difference(run, again))


def test_a_preset_may_stand_in_a_file() -> None:
    tree = load("digits", FREE).model_dump(mode="json")
    tree["objective"]["guide"] = "ucgm"
    assert guide(parse(Run, tree)).elsewhere == "average"


def test_an_unknown_preset_is_named_with_the_valid_ones() -> None:
    with pytest.raises(UserError, match=r"^objective.guide: there is no preset 'ucmg'; valid: paper, ucgm, or"):
        load("digits", ["objective.guide=ucmg"])
    with pytest.raises(UserError, match=r"^objective.guide.elsewhere: .*'data' or 'average'"):
        load("digits", ["objective.guide.elsewhere=mean"])


def test_presets_need_classes() -> None:
    with pytest.raises(UserError, match="no classes"):
        load("moons", ["objective.guide=ucgm"])


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
        ("digits", [*FREE, "objective.guide=ucgm"], r"objective.guide has guided in training, by 1.79"),
    ],
)
def test_sampling_is_not_guided_where_it_cannot_be(recipe: str, words: list[str], said: str) -> None:
    load(recipe, [*words, "sample.guide.scale=1"])
    with pytest.raises(UserError, match=said):
        load(recipe, [*words, "sample.guide.scale=2"])
