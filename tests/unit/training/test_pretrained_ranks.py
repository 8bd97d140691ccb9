"""A pretrained flow transformer is tuned on two ranks as on one, in full and by adapters."""

from pathlib import Path

import pytest
import safetensors.torch

from forked import main_of
from meeting import outputs
from transformers_saved import saved
from unit.training.pretrained_ranks import LAYOUTS, WAYS, everything, tuned

PATIENCE = 300  # seconds, on a busy machine


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    source = saved(tmp_path, "sd3").source
    programs = [main_of("unit.training.pretrained_ranks", rank, tmp_path, source, cwd=tmp_path) for rank in (0, 1)]
    outputs(programs, PATIENCE)
    for way in WAYS:
        one = everything(tuned(source, way, 1, reshard=False, rows=4))  # in passes of as many rows as a rank has
        for share, reshard in LAYOUTS:
            two = safetensors.torch.load_file(tmp_path / f"{way}-{share}-{reshard}.safetensors")
            assert one.keys() == two.keys()
            apart = {name: ((two[name] - x).norm() / x.norm().clamp_min(1e-9)).item() for name, x in one.items()}
            assert max(apart.values()) < 1e-6, (way, share, reshard, max(apart, key=apart.__getitem__))
