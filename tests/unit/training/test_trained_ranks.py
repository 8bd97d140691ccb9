"""A net is the same trained on two ranks as on one: with frozen weights, with texts, and models of others."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dumo.io import tensor_files
from dumo.training.state import begin
from forked import main_of
from meeting import outputs
from tiers import tiered
from unit.training.adapted import Adapted
from unit.training.by_path import latest, restore
from unit.training.toy import tensors
from unit.training.trained_ranks import CASES, trained

PATIENCE = 300  # seconds, on a busy machine

IN_CI = ("frozen",)  # weights of which some are


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What two ranks leave that trained a case."""

    @cache
    def of(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        outputs([main_of("unit.training.trained_ranks", rank, name, folder, cwd=folder) for rank in (0, 1)], PATIENCE)
        return folder

    return of


@pytest.mark.parametrize("name", tiered(CASES, ci=IN_CI))
def test_two_ranks_equal_one_process(name: str, met: Callable[[str], Path]) -> None:
    folder = met(name)
    one = tensors(trained(CASES[name], folder / "one", 1, reshard=False, ranks=2))
    for share, reshard in CASES[name].layouts:
        two = safetensors.torch.load_file(folder / f"{share}-{reshard}.safetensors")
        assert one.keys() == two.keys()
        for key, x in one.items():
            if not x.is_floating_point():
                # Its moments differ, as below, and so do the codes of some.
                assert torch.equal(two[key], x) or name == "sd3-mapped-full-half", (share, reshard, key)
                continue
            limit = 1e-12 if x.dtype == torch.float64 else 1e-6
            limit = 0.05 if name == "sd3-mapped-full-half" else limit  # its gradients are of 8 bits, and cancel
            limit *= 10 if key.startswith("optimizer") else 1  # moments are of gradients, that cancel
            assert (two[key].double() - x.double()).norm() < limit * x.double().norm() + 1e-9, (share, reshard, key)


@pytest.mark.slow
def test_one_process_goes_on_from_adapters_of_two_ranks(met: Callable[[str], Path]) -> None:
    folder = met("frozen")
    for share, reshard in CASES["frozen"].layouts:
        last = latest(folder / f"{share}-{reshard}")
        assert not any("base" in name for name in tensor_files.header(last / "net"))
        state = begin(Adapted(seed=1), CASES["frozen"].spec)
        restore(last, state)
        again, two = tensors(state), safetensors.torch.load_file(folder / f"{share}-{reshard}.safetensors")
        assert all(torch.equal(again[name], x) for name, x in two.items()), (share, reshard)
