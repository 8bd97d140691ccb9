"""Weights that are not made yet, and get others before they are."""

import pytest
import torch

from dumo.io.deferred import Deferred


def test_what_was_made_of_a_tensor_keeps_its_numbers() -> None:
    """As a frozen copy of a layer whose trained weights are read later."""
    made = Deferred()
    with made:
        x = torch.empty(3).fill_(1)
        y = torch.empty(3).copy_(x)
    made.replace(x, lambda: torch.full((3,), 7.0))
    assert made.materialize(y).tolist() == [1, 1, 1]
    assert made.materialize(x).tolist() == [7, 7, 7]
    with made:
        x.mul_(2)
    assert made.materialize(x).tolist() == [14, 14, 14]


def test_what_has_several_outputs_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a weight's codes and scales."""
    made, done = Deferred(), list[object]()
    with made:
        values, places = torch.empty(2, 3).fill_(1).sort(dim=1)
    run = Deferred._run
    monkeypatch.setattr(Deferred, "_run", lambda self, note, there: (done.append(note.func), run(self, note, there))[1])
    assert made.materialize(values).tolist() == [[1, 1, 1]] * 2
    assert sorted(made.materialize(places)[0].tolist()) == [0, 1, 2]
    assert done.count(torch.ops.aten.sort.default) == 1
