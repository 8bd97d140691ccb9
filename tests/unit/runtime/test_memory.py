"""What is more than there is memory is refused before it is made."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dumo.config.load import load
from dumo.run.weights import build
from dumo.runtime.device import require_memory, total_memory
from dumo.types import UserError
from trained import train

CPU = torch.device("cpu")


def test_memory_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dumo.runtime.device.CONTAINER_LIMITS", ())
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:")]
    assert total_memory(CPU) == 1024 * int(line.split()[1])


@pytest.mark.parametrize(("limit", "bytes_"), [("2000000000\n", 2_000_000_000), ("max\n", None), (f"{2**63}", None)])
def test_a_container_has_what_it_may_take(
    limit: str, bytes_: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr("dumo.runtime.device.CONTAINER_LIMITS", ())
    whole = total_memory(CPU)
    monkeypatch.setattr("dumo.runtime.device.CONTAINER_LIMITS", (tmp_path / "missing", tmp_path / "memory.max"))
    assert total_memory(CPU) == (bytes_ or whole)


def test_as_much_as_there_is_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dumo.runtime.device.total_memory", lambda device: 2_000_000_000)
    require_memory(2_000_000_000, "the net takes", "take another")
    require_memory(3_000_000_000, "the net takes", "take another", "meta")
    with pytest.raises(UserError, match=r"^the net takes 2\.1 GB of memory, but cpu has 2\.0 GB: take another$"):
        require_memory(2_100_000_000, "the net takes", "take another")


def test_a_net_is_counted_before_it_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = load("moons", ["net.width=32"])
    net = build(run)
    trained = sum(p.nbytes for p in net.parameters())
    size = trained + sum(x.nbytes for x in net.buffers())
    rows = 2 * run.train.batch * 2 * 4
    monkeypatch.setattr("dumo.runtime.device.total_memory", lambda device: size)
    build(run)
    monkeypatch.setattr("dumo.runtime.device.total_memory", lambda device: size - 1)
    monkeypatch.setattr(nn.Module, "to", lambda *_: pytest.fail("it was made"))
    with pytest.raises(UserError, match="the net takes"):
        build(run)
    monkeypatch.setattr(
        "dumo.runtime.device.total_memory", lambda device: size + (3 + len(run.train.ema)) * trained + rows - 1
    )
    with pytest.raises(UserError, match=r"averages and a batch need .*net.width.*train.batch"):
        train(run, tmp_path / "run")
    assert not any(tmp_path.iterdir())
