"""dumo doctor, and what train says where the slope is no derivative."""

from pathlib import Path

import pytest

from e2e.shell import TINY, call, refused, sets

BROKEN = sets("objective.slope.kind=central", "objective.slope.h=1.0e-7")  # rounding over rounding
STATES = {"ok", "warning", "failing"}


@pytest.mark.slow
def test_a_sound_machine(here: Path) -> None:
    done = call("doctor")  # the recipe digits
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert {line.split()[0] for line in lines if not line.startswith(" ")} <= STATES
    assert not any(line.startswith("failing") for line in lines)
    for name in ("versions", "device", "attention", "dtypes", "triton", "torch.compile", "disk", "self-test"):
        assert any(f" {name}: " in line for line in lines), name
    assert "limit 5 %" in lines[-1]
    assert list(here.iterdir()) == []


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("name", "words", "ok"), [("moons", BROKEN, False), ("moons-flow-matching", [], True)])
def test_a_slope_is_sound_or_broken(name: str, words: list[str], ok: bool, here: Path) -> None:
    done = call("doctor", name, *words, "--json")
    assert done.code == (0 if ok else 1)
    found = done.json
    assert found["ok"] is ok
    assert {line["state"] for line in found["findings"]} <= STATES
    assert [line["state"] for line in found["findings"] if line["name"] == "self-test"] == ["ok" if ok else "failing"]
    assert len(found["examination"]["errors"]) == (0 if ok else 2)
    said = call("doctor", name, *words).out
    assert ("failing  self-test: slope 'central'" in said) is not ok
    assert ("way out: train with objective.slope.kind=dual" in said) is not ok


def test_train_refuses_a_slope_that_is_no_derivative(here: Path) -> None:
    named = ("slope 'central'", "precision fp32", "time_scale 10", "%", "limit 5 %", "objective.slope.kind=dual")
    refused("train", "digits", *TINY, *BROKEN, named=named)
