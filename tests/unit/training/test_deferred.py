"""Weights that are not made yet, and get others before they are."""

import torch

from dumo.training.deferred import Deferred


def test_what_was_made_of_a_tensor_keeps_its_numbers() -> None:
    """As a frozen copy of a layer whose trained weights are read later."""
    made = Deferred()
    with made:
        x = torch.empty(3).fill_(1)
        y = torch.empty(3).copy_(x)
    made.put(x, lambda: torch.full((3,), 7.0))
    assert made.made(y).tolist() == [1, 1, 1]
    assert made.made(x).tolist() == [7, 7, 7]
    with made:
        x.mul_(2)
    assert made.made(x).tolist() == [14, 14, 14]
