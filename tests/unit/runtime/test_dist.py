"""One rank without torch.distributed, and the GPU of each of several ranks."""

import pytest
import torch

from dumo.runtime import dist
from dumo.runtime.device import choose_device


def test_one_rank() -> None:
    x = torch.tensor([1.0, 2.0])
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.mean(x), x)


def test_before_ranks_meet_each_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run takes is compared with that GPU's memory, before anything is sent."""
    chosen: list[int] = []
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("auto") == torch.device("cuda")
    assert chosen == [2]
