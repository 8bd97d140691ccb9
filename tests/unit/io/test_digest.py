"""Digests of texts and numbers."""

from pathlib import Path

import safetensors.torch
import torch

from dumo.io import digest, shards, weights


def test_texts_that_are_parted_elsewhere_are_others() -> None:
    parted = [("a\nb", "c"), ("a", "b\nc"), ("a\nb\nc",), ("a", "b", "c"), ("1:a",), ("a", ""), ("", "a")]
    assert len({digest.short(*texts) for texts in parted}) == len(parted)


def test_numbers_of_another_shape_or_type_are_others() -> None:
    x = torch.zeros(2, 3)
    same = [x, x.T, x.flatten(), x.double(), x.long(), x.half(), x.bfloat16()]
    assert len({digest.of_tensor(one) for one in same}) == len(same)


def test_shards_have_the_digest_of_one_file(tmp_path: Path) -> None:
    """Whatever the types, the sizes and the names."""
    types = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.uint8, torch.float16)
    made = {f'{i} "é\n\x7f\u2028\\': torch.randn(i, 3).to(dtype) for i, dtype in enumerate(types, 1)}
    made |= {"a number": torch.tensor(2.5), "wide": torch.randn(2, 2, 70), "2": torch.ones(5)}
    shards.write(tmp_path / "net", made, {name: (0,) * x.ndim for name, x in made.items()})
    safetensors.torch.save_file(made, tmp_path / "net.safetensors", {"format": "pt"})
    assert weights.sha256(tmp_path / "net") == digest.of_file(tmp_path / "net.safetensors")
