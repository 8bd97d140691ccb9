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
def test_a_broken_slope_fails(here: Path) -> None:
    done = call("doctor", "digits", *TINY, *BROKEN)
    assert done.code == 1, done
    assert "failing  self-test: slope 'central'" in done.out
    assert "way out: train with objective.slope.kind=dual" in done.out


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("name", "words", "ok"), [("moons", BROKEN, False), ("moons-flow-matching", [], True)])
def test_one_object(name: str, words: list[str], ok: bool, here: Path) -> None:
    done = call("doctor", name, *words, "--json")
    assert done.code == (0 if ok else 1)
    found = done.json
    assert found["ok"] is ok
    assert {line["state"] for line in found["findings"]} <= STATES
    assert [line["state"] for line in found["findings"] if line["name"] == "self-test"] == ["ok" if ok else "failing"]
    assert len(found["examination"]["errors"]) == (0 if ok else 2)


def test_what_is_wrong_is_refused(here: Path) -> None:
    refused("doctor", "digist", named=("digist", "'digits'"))
    refused("doctor", "digits", "--device", "gpu", named=("'gpu'",))
    refused("doctor", "digits", *sets("train.precision=bf16", "objective.slope.kind=central"), named=("fp32",))


def test_train_refuses_a_slope_that_is_no_derivative(here: Path) -> None:
    named = ("slope 'central'", "precision fp32", "time_scale 10", "%", "limit 5 %", "objective.slope.kind=dual")
    refused("train", "digits", *TINY, *BROKEN, named=named)
