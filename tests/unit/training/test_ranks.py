"""What ranks save, any number of ranks loads, one included, bit for bit; what fails on one rank fails on all."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dumo.io import tensor_files
from forked import main_of
from meeting import outputs
from unit.training.by_path import fault, latest, restore, save
from unit.training.ranks import SHARES, built, moved, same
from unit.training.toy import tensors

pytestmark = pytest.mark.slow

PATIENCE = 240  # seconds, on a busy machine; alone they take 15


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved by each share, and one process; all have loaded it, on two, three and four ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    one = moved(built(0))
    save(folder / "one", one, 1)
    safetensors.torch.save_file(tensors(one), folder / "one.safetensors")
    processes = [main_of("unit.training.ranks", folder, rank, cwd=folder) for rank in range(max(SHARES))]
    for rank, (out, _) in enumerate(outputs(processes, PATIENCE)):
        assert out.splitlines() == [f"{world} agree" for world in SHARES if rank < world]
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["share-1", "share-2", "one"])
def test_one_process_loads_what_ranks_saved(saved: Path, kind: str) -> None:
    state = built(1)
    found = latest(saved / kind)
    restore(found, state)
    same(state, saved / f"{kind}.safetensors")
    assert {memory["step"].item() for memory in state.optimizer.state.values()} == {2}


@pytest.mark.parametrize("share", SHARES[2])
def test_layout(saved: Path, share: int) -> None:
    last = saved / f"share-{share}/step-00000002"
    assert {path.name for path in last.iterdir()} == {
        "net",
        "ema-0.99",
        "ema-0.9",
        "optimizer",
        "state.json",
        "run.yaml",
    }
    about = json.loads((last / "state.json").read_text())
    assert tuple(about["facts"][name] for name in ("step", "images", "ranks")) == (2, 24, 2)
    files = {path.relative_to(last).as_posix() for path in last.rglob("*.safetensors")}
    assert about["files"].keys() == files | {"run.yaml"}
    assert files == {
        f"{name}/0000{rank}.safetensors" for name in ("net", "ema-0.99", "ema-0.9", "optimizer") for rank in (0, 1)
    }
    assert {path.suffix for path in last.rglob("*") if path.is_file()} == {
        ".safetensors",
        ".json",
        ".yaml",
    }  # no pickles
    assert fault(last) is None


def test_a_milestone_is_one_file(saved: Path) -> None:
    for share in SHARES[2]:
        found = tensor_files.load(saved / f"milestones-{share}/step-00000002.safetensors")
        whole = safetensors.torch.load_file(saved / f"share-{share}.safetensors")
        first = {name.removeprefix("0.99."): x for name, x in whole.items() if name.startswith("0.99.")}
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], x) for name, x in first.items())
