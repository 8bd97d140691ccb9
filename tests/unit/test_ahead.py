"""Values made ahead are those of the steps that are asked for, errors included, and no thread stays."""

import threading

import pytest

from dumo.ahead import Ahead


def test_values_are_those_of_the_steps_and_the_next_is_made_before_it_is_asked_for() -> None:
    made, there = list[int](), threading.Semaphore(0)

    def make(step: int) -> int:
        made.append(step)
        there.release()
        return step * step

    with Ahead(make, last=6) as ahead:
        assert ahead(2) == 4
        assert all(there.acquire(timeout=60) for _ in range(2))
        assert made == [2, 3]  # before it was asked for
        assert [ahead(3), ahead(4), ahead(1), ahead(2), ahead(5), ahead(6)] == [9, 16, 1, 4, 25, 36]
    assert max(made) == 6
    assert made.count(6) == 1  # nothing is made ahead for the last step, or beyond
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_an_error_is_raised_where_its_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise KeyError("here")
        return step

    with Ahead(make, last=9) as ahead:
        assert ahead(0) == 0
        with pytest.raises(KeyError, match="here"):
            ahead(1)
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]
