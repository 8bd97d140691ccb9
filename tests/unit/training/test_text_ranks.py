"""A net that reads texts is trained on two ranks as on one, and its encoder with it."""

from pathlib import Path

import pytest
import safetensors.torch

from forked import main_of
from meeting import outputs
from unit.training.text_ranks import LAYOUTS, WAYS, everything, trained, written

PATIENCE = 300  # seconds, on a busy machine


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    programs = [main_of("unit.training.text_ranks", rank, tmp_path, cwd=tmp_path) for rank in (0, 1)]
    outputs(programs, PATIENCE)
    learned = written(tmp_path / "texts")
    for way in WAYS:
        one = everything(trained(way, learned, 1, reshard=False, rows=4))  # in passes of as many rows as a rank has
        for share, reshard in LAYOUTS:
            two = safetensors.torch.load_file(tmp_path / f"{way}-{share}-{reshard}.safetensors")
            assert one.keys() == two.keys()
            for name, x in one.items():
                limit = 1e-5 if name.startswith("optimizer") else 1e-6  # moments are of gradients, that cancel
                assert (two[name] - x).norm() < limit * x.norm() + 1e-9, (way, share, reshard, name)
