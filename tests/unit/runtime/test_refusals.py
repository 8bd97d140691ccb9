"""What the rank, the device and the packages of a process refuse."""

from collections.abc import Callable
from importlib import metadata

import pytest

from dumo import runtime
from dumo.runtime import dist
from dumo.runtime.device import choose_device, require_memory
from dumo.types import UserError


def old_package(patch: pytest.MonkeyPatch) -> None:
    """An optional package of a version that its extra does not allow."""
    patch.setattr(metadata, "requires", lambda name: ["numpy<99,>=98; extra == 'old'"])
    runtime.require("numpy", "old", "net")


def missing_package(patch: pytest.MonkeyPatch) -> None:
    """An optional package that is not installed."""
    patch.setattr(runtime, "installed_version", lambda name: None)
    runtime.require("transformers", "text", "net")


def one_gpu_for_all_ranks(patch: pytest.MonkeyPatch) -> None:
    """A GPU by its number on several ranks."""
    patch.setenv("WORLD_SIZE", "3")
    choose_device("cuda:1")


def several_processes(patch: pytest.MonkeyPatch) -> None:
    """Work that ranks do not share."""
    patch.setenv("WORLD_SIZE", "2")
    dist.require_one_process("dumo bench")


def old_torch(patch: pytest.MonkeyPatch) -> None:
    """Ranks under a torch whose sharded weights were not tried."""
    patch.setattr(dist.torch, "__version__", "2.11.0")
    dist.require_distributed_torch("work on 2 ranks")


REFUSALS: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], str]] = {
    "an optional package of another version": (old_package, "numpy<99,>=98"),
    "an optional package that is missing": (missing_package, "transformers"),
    "a GPU by its number on several ranks": (one_gpu_for_all_ranks, "cuda:1"),
    "a device that is not here": (lambda _: choose_device("hpu"), "hpu"),
    "an empty name of a device": (lambda _: choose_device(""), "device ''"),
    "a net above the memory": (
        lambda _: require_memory(10**16, "the net takes", "take a smaller net"),
        "the net takes",
    ),
    "several processes for work of one": (several_processes, "WORLD_SIZE is 2"),
    "ranks under an old torch": (old_torch, "2.11.0"),
}


@pytest.mark.parametrize(("case", "name"), REFUSALS.values(), ids=REFUSALS)
def test_it_is_refused(
    case: Callable[[pytest.MonkeyPatch], object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as error:
        case(monkeypatch)
    assert name in str(error.value)
