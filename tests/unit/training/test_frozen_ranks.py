"""A net of which adapters are trained is the same on two ranks, and goes on from their checkpoint on one."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from dumo.io import weights
from dumo.training.checkpoint import latest, part, restore
from dumo.training.state import begin
from forked import main_of
from meeting import outputs
from unit.training.adapted import Adapted
from unit.training.frozen_ranks import LAYOUTS, SPEC, everything, trained

PATIENCE = 240  # seconds, on a busy machine


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    outputs([main_of("unit.training.frozen_ranks", rank, tmp_path, cwd=tmp_path) for rank in (0, 1)], PATIENCE)
    one = everything(trained(1, reshard=False))
    for share, reshard in LAYOUTS:
        two = safetensors.torch.load_file(tmp_path / f"{share}-{reshard}.safetensors")
        assert one.keys() == two.keys()
        for name, x in one.items():
            assert torch.allclose(two[name], x, rtol=1e-6, atol=1e-9), (share, reshard, name)

        last = latest(tmp_path / f"{share}-{reshard}")
        assert last is not None
        assert not any("base" in name for name in weights.outline(part(last, "net")))
        state = begin(Adapted(seed=1), SPEC)
        restore(last, state)
        again = everything(state)
        assert all(torch.equal(again[name], x) for name, x in two.items()), (share, reshard)
