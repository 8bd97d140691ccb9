"""What is said of a run before it trains: its source takes another theta^-, or its data have another deviation."""

import shlex

import pytest

from dumo.config.check_spec import advice
from dumo.config.load import load

HOP = "sample.solver.kind=hop"
CM = ["objective.kind=consistency", "objective.weighted=false", "objective.soft=null"]
AVERAGED = {
    "shortcut": ["objective.kind=shortcut", HOP],
    "rcgm": ["objective.kind=rcgm"],
    "twinflow": ["objective.kind=twinflow"],
    "consistency": CM,
}


def ways(line: str) -> list[str]:
    """The fields that a line says to set."""
    return shlex.split(line.rpartition(":  ")[2])


def test_a_size_far_from_the_pipelines_is_mentioned() -> None:
    assert not advice(load("sd3-lora"))
    assert not advice(load("cifar10-latents", ["pipeline=sd3-small", "net={kind: diffusers, texts: {kind: codes}}"]))
    (line,) = advice(load("sd3-lora", ["data.images.side=256"]))
    assert "1024 x 1024 pixels, but this run uses 256 x 256" in line
    assert ways(line) == ["data.images.side=1024"]
    assert not advice(load("sd3-lora", ways(line)))


def test_a_diffusion_at_two_thirds_of_its_size_is_mentioned() -> None:
    """As Stable Diffusion 2.1, of 768 pixels, would be at the 512 of sd15-lora."""
    assert not advice(load("sd15-lora"))
    (line,) = advice(load("sd15-lora", ["data.images.side=768"]))
    assert "512 x 512 pixels, but this run uses 768 x 768" in line
    assert not advice(load("sd3-lora", ["data.images.side=768"]))


@pytest.mark.parametrize("kind", AVERAGED)
def test_an_average_that_the_source_takes_is_missed_until_it_is_set(kind: str) -> None:
    (line,) = advice(load("digits", AVERAGED[kind]))
    assert f"objective '{kind}'" in line
    assert "train.ref: self" in line
    assert "\n" not in line
    follows = load("digits", [*AVERAGED[kind], *ways(line)])
    assert follows.train.ref == follows.objective.needs.ref
    assert not advice(follows)


@pytest.mark.parametrize(
    ("sets", "sd"),
    [
        ([], 0.1),
        (["objective.kind=rcgm", "objective.order=1"], 0.5),
        (["objective.kind=ucgm"], 0.5),
        (["objective.kind=consistency"], None),
    ],
)
def test_of_others_nothing_is_said(sets: list[str], sd: float | None) -> None:
    assert not advice(load("digits", sets), sd=sd)


@pytest.mark.parametrize(
    ("recipe", "sets", "who"),
    [
        ("digits-ict", ["path.sd=1"], "objective 'consistency' and net.precondition 'edm'"),
        ("digits-ict", ["path.sd=1", "net.precondition=none"], "objective 'consistency' assume"),
        ("digits-sct", [], "objective 'sct'"),
        ("digits", ["net.precondition=edm"], "of net.precondition 'edm'"),
    ],
)
def test_constants_for_deviation_1_on_other_data(recipe: str, sets: list[str], who: str) -> None:
    run = load(recipe, sets)
    (line,) = advice(run, sd=0.75)
    assert who in line
    assert ways(line) == ["path.sd=0.75"]
    assert not advice(load(recipe, [*sets, *ways(line)]), sd=0.75)
    assert not any(advice(run, sd) for sd in (None, 0.0, 0.85, 1.0, 1.15))
    assert ways(advice(run, sd=1.25)[0]) == ["path.sd=1.2"]
    (again,) = advice(load(recipe, [*sets, "path.sd=0.5"]), sd=0.75)
    assert "1.5 in units of path.sd = 0.5" in again
