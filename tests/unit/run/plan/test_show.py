"""What is shown of a run before it is run."""

import json

import pytest

from dumo.run.config.load import load
from dumo.run.config.spec import Run
from dumo.run.plan.plan import show


def tiny(name: str, *more: str) -> Run:
    """A recipe made small."""
    return load(name, ["net.width=16", "net.depth=1", *more])


@pytest.mark.parametrize(
    ("name", "overrides", "far"),
    [
        ("moons", ["objective.times.kind=uniform"], 0.1),
        ("moons", ["objective.times.kind=uniform", "objective.times.high=0.5"], 0.0),
        ("moons", ["objective.times.kind=beta", "objective.times.a=1", "objective.times.b=1"], 0.1),
        ("moons-meanflow", ["objective.times.velocity_ratio=0"], 0.01),  # both of two uniform times
        ("moons-meanflow", ["objective.times.velocity_ratio=0.5"], 0.005),
        ("moons-flow-matching", [], None),
    ],
)
def test_how_much_is_far(name: str, overrides: list[str], far: float | None) -> None:
    found = show(tiny(name, *overrides))["far"]
    assert found == far if far is None else found == pytest.approx(far, abs=1e-3)


@pytest.mark.parametrize(
    ("omega", "zeta", "scale"), [(1.0, 0.0, 1.0), (1.0, 0.5, 2.0), (0.2, 0.9, 2.0), (3.0, 0.0, 3.0)]
)
def test_effective_scale(omega: float, zeta: float, scale: float) -> None:
    run = tiny("digits", f"objective.guide.omega={omega}", f"objective.guide.zeta={zeta}")
    assert show(run)["guidance_scale"] == pytest.approx(scale)


def test_show_is_strict_json_and_complete() -> None:
    run = tiny("digits")
    facts = json.loads(json.dumps(show(run), allow_nan=False))
    assert Run.model_validate(facts["spec"]) == run
    assert facts["parameters"] == sum(p.numel() for p in run.build().parameters())
    assert show(run) == show(run)
