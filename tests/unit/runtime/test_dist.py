"""One rank without torch.distributed; what is no number of ranks, and no device."""

import pytest
import torch

from dumo.runtime import dist
from dumo.runtime.device import choose_device
from dumo.types import UserError


def test_one_rank() -> None:
    x = torch.tensor([1.0, 2.0])
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.mean(x), x)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x is no whole number from 1 to 1,000,000"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no"),
        ({"WORLD_SIZE": "1000000000"}, "WORLD_SIZE=1000000000 is no"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is no whole number from 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is no whole number from 0 to 1"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5 is no"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "٢"}, "LOCAL_WORLD_SIZE=٢ is no"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no whole number from 1 to 65,535"),
    ],
)
def test_odd_numbers_of_ranks_are_refused(told: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said), dist.join():
        pass


@pytest.mark.parametrize("name", ["hpu", "xla", "privateuseone", "cpu:x", ""])
def test_devices_that_are_not_here_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not available: use auto or cpu"):
        choose_device(name)


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
    with pytest.raises(UserError, match="device 'cuda:1' is one for all 3 ranks: use auto"):
        choose_device("cuda:1")
