"""What is said of a run before it trains: by dumo show --check, and where its source does otherwise; on stderr."""

from pathlib import Path

import pytest

from e2e.shell import TINY, call, refused

BROKEN = ["objective.slope.kind=central", "objective.slope.h=1.0e-7"]  # rounding over rounding


@pytest.mark.parametrize(("name", "words", "ok"), [("moons", BROKEN, False), ("moons-flow-matching", [], True)])
def test_a_slope_is_sound_or_broken(name: str, words: list[str], ok: bool, here: Path) -> None:
    done = call("show", name, "--check", *words, "--json")
    assert done.code == (0 if ok else 1)
    found = done.json["check"]
    assert found["ok"] is ok
    assert {"dumo", "torch", "python"} <= found["environment"].keys()
    assert [(line["name"], line["state"]) for line in found["findings"]] == [("slope", "ok" if ok else "failing")]
    assert len(found["examination"]["errors"]) == (0 if ok else 2)
    said = call("show", name, "--check", *words)
    assert said.code == done.code
    assert ("failing  slope: slope 'central'" in said.out) is not ok
    assert ("fix: train with objective.slope.kind=dual" in said.out) is not ok
    assert list(here.iterdir()) == []


def test_train_refuses_a_slope_that_is_no_derivative(here: Path) -> None:
    named = ("slope 'central'", "precision fp32", "time_scale 10", "%", "limit 5 %", "objective.slope.kind=dual")
    refused("train", "digits", *TINY, *BROKEN, named=named)


SHORTCUT = ["objective.kind=shortcut", "sample.solver.kind=hop"]


@pytest.mark.slow
def test_it_is_said_by_what_looks_at_a_run(tmp_path: Path) -> None:
    for words in ((), ("--cost", "--json"), ("--check", "--json")):
        done = call("show", "digits", *words, *TINY, *SHORTCUT)
        assert done.code == 0
        assert "train.ref=0.999" in done.err
        assert "train.ref=0.999" not in done.out
    followed = call("show", "digits", *TINY, *SHORTCUT, "train.ref=0.999")
    assert (followed.code, followed.err) == (0, "")
