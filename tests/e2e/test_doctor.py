"""What is said of a run before it trains: by dumo doctor, and where its source does otherwise; on stderr."""

from pathlib import Path

import pytest

from e2e.shell import TINY, call, refused, sets

BROKEN = sets("objective.slope.kind=central", "objective.slope.h=1.0e-7")  # rounding over rounding
STATES = {"ok", "warning", "failing"}


@pytest.mark.nightly
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


SHORTCUT = sets("objective.kind=shortcut", "sample.solver.kind=hop")


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_it_is_said_by_what_looks_at_a_run(tmp_path: Path) -> None:
    for words in (("show",), ("dry", "--json"), ("doctor", "--json")):
        done = call(words[0], "digits", *words[1:], *TINY, *SHORTCUT)
        assert done.code == 0
        assert "--set train.ref=0.999" in done.err
        assert "train.ref=0.999" not in done.out
    followed = call("show", "digits", *TINY, *SHORTCUT, "--set", "train.ref=0.999")
    assert (followed.code, followed.err) == (0, "")
