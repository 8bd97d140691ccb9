"""What files, weights and pictures refuse."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dumo.io import file, guard, tensor_files
from dumo.io.picture import to_rows
from dumo.io.read import read_json, read_text, user_path
from dumo.types import UserError


def of_bytes(name: str, content: bytes, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Read a file of these bytes."""

    def case(folder: Path) -> None:
        (folder / name).write_bytes(content)
        read(folder / name)

    return case


def pickle(folder: Path) -> None:
    """Weights in a pickle."""
    torch.save({"w": torch.ones(2)}, folder / "w.pth")
    tensor_files.load(folder / "w.pth")


def weights_of_another_net(_: Path) -> None:
    """Weights of another shape."""
    tensor_files.compare(Path("w"), {"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "the net", "take others")


def a_part_without_a_file(folder: Path) -> None:
    """A folder of the files of three ranks, without that of the second."""
    for rank in (0, 2):
        tensor_files.write_part(folder / f"{rank:05d}.safetensors", {"w": torch.ones(2)}, {"w": [2 * rank]})
    tensor_files.load(folder)


def moved_folder(folder: Path) -> None:
    """A run's folder that was renamed while it is trained, and another in its place."""
    run = folder / "run"
    run.mkdir()
    with guard.guard_path(run):
        run.rename(folder / "moved")
        run.mkdir()
        file.write(run / "log", b"row")


def locked_folder(folder: Path) -> None:
    """A folder that another process holds."""
    with guard.locked(folder / "lock"), guard.locked(folder / "lock", "the run is being trained"):
        pass


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a variable that is not set": (lambda _: user_path("$NOT_SET_HERE/a", "data.root"), "NOT_SET_HERE"),
    "an empty path": (lambda _: user_path("", "data.root"), "data.root"),
    "a text that is not UTF-8": (of_bytes("a.txt", b"a\xffb", read_text), "a.txt"),
    "a file that is not JSON": (of_bytes("a.json", b"{", read_json), "a.json"),
    "a pickle": (pickle, "w.pth"),
    "a damaged file of weights": (of_bytes("w.safetensors", b"x" * 30, tensor_files.load), "w.safetensors"),
    "weights of another net": (weights_of_another_net, "a is (2,)"),
    "a part without a file": (a_part_without_a_file, "has a shard of w"),
    "samples that are not finite": (lambda _: to_rows(torch.full((1, 1, 2, 2), torch.nan)), "not finite"),
    "a folder that was moved": (moved_folder, "run was removed, renamed or unmounted"),
    "a folder that another process holds": (locked_folder, "the run is being trained"),
}


@pytest.mark.parametrize(("case", "name"), REFUSALS.values(), ids=REFUSALS)
def test_it_is_refused(case: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        case(tmp_path)
    assert name in str(error.value)
