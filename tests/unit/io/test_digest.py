"""Digests of texts and numbers."""

import torch

from dumo.io import digest


def test_texts_that_are_parted_elsewhere_are_others() -> None:
    parted = [("a\nb", "c"), ("a", "b\nc"), ("a\nb\nc",), ("a", "b", "c"), ("1:a",), ("a", ""), ("", "a")]
    assert len({digest.short(*texts) for texts in parted}) == len(parted)


def test_numbers_of_another_shape_or_type_are_others() -> None:
    x = torch.zeros(2, 3)
    same = [x, x.T, x.flatten(), x.double(), x.long(), x.half(), x.bfloat16()]
    assert len({digest.of_tensor(one) for one in same}) == len(same)
