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
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_two_ranks_equal_one_process(name: str, tmp_path: Path) -> None:
    """Of blocks of one kind, and of two."""
    source = saved(tmp_path, name).source
    programs = [main_of("unit.training.pretrained_ranks", rank, tmp_path, source, cwd=tmp_path) for rank in (0, 1)]
    outputs(programs, PATIENCE)
    for way in WAYS:
        one = everything(tuned(source, way, 1, reshard=False, rows=4))  # in passes of as many rows as a rank has
        for share, reshard in LAYOUTS:
            two = safetensors.torch.load_file(tmp_path / f"{way}-{share}-{reshard}.safetensors")
            assert one.keys() == two.keys()
            for name, x in one.items():
                limit = 1e-5 if name.startswith("optimizer") else 1e-6  # moments are of gradients, that cancel
                assert (two[name] - x).norm() < limit * x.norm() + 1e-9, (way, share, reshard, name)
