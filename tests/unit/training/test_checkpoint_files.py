"""A checkpoint whose files are not as listed is named, passed over and replaced, of one process or of several ranks."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dumo.io import digest, tensor_files
from dumo.training import checkpoint
from dumo.training.checkpoint import STATE_FILE, Checkpoint, Checkpoints
from dumo.training.settings import Train
from dumo.training.state import begin
from dumo.types import UserError
from unit.training.by_path import fault, latest, restore, save
from unit.training.sharded import split
from unit.training.toy import AVERAGES, Small, same, tensors, trained

SPEC = Train(steps=3, batch=12, ema=AVERAGES)
NAMES = ("ema-0.9", "ema-0.99", "net", "optimizer")
RANKS = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of one process, and the same of several ranks. Not to be written to."""
    folder, state = tmp_path_factory.mktemp("saved"), trained(SPEC)
    for state.step in (2, 3):
        save(folder / "one", state, 2)
    shutil.copytree(folder / "one", folder / "ranks")
    for step in (2, 3):
        split(folder / f"ranks/step-0000000{step}", RANKS)
    return folder


@pytest.fixture(params=["one", "ranks"])
def folder(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> Path:
    """Two steps, as one process or several ranks wrote them."""
    return shutil.copytree(saved / request.param, tmp_path / request.param)


def members(checkpoint: Path, name: str) -> list[Path]:
    """The files of a part of a checkpoint."""
    return sorted((checkpoint / name).iterdir())


def flip(file: Path) -> None:
    """One bit in the middle of the numbers."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[(start + len(data)) // 2] ^= 1
    file.write_bytes(data)
    assert tensor_files.read_metadata(file)  # it still opens


def cut(file: Path) -> None:
    """All but the last byte."""
    file.write_bytes(file.read_bytes()[:-1])


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "is missing"),
    "cut": (cut, "bytes, not"),
    "flipped": (flip, "SHA-256"),
}


PLACES = [("one", 0), *(("ranks", which) for which in range(RANKS))]


@pytest.mark.parametrize(("layout", "which"), PLACES)
@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_named_and_the_one_before_is_taken(
    saved: Path, tmp_path: Path, name: str, harm: str, layout: str, which: int
) -> None:
    folder = shutil.copytree(saved / layout, tmp_path / "checkpoints")
    before, last = folder / "step-00000002", folder / "step-00000003"
    file = members(last, name)[which]
    do, said = HARMS[harm]
    do(file)
    wrong = fault(last)
    assert wrong.startswith(str(file))
    assert said in wrong
    with pytest.warns(UserWarning, match="using the previous checkpoint step-00000002") as caught:
        assert latest(folder) == before
    assert [str(file) in str(w.message) for w in caught] == [True]
    members(before, "net")[0].unlink()
    with pytest.raises(UserError, match=r"has no complete checkpoint.* train from the start") as refused:
        latest(folder)
    assert str(file) in str(refused.value)
    assert str(before / "net") in str(refused.value)


@pytest.mark.parametrize("name", ["00003.safetensors", "._net.safetensors"])
def test_a_stray_file_is_named(folder: Path, name: str) -> None:
    """As a rank's of another save, which would be read along, hidden or not."""
    last = folder / "step-00000003"
    some = members(last, "net")[0]
    stray = shutil.copy(some, some.with_name(name))
    assert fault(last) == f"{stray} is not listed in state.json"
    with pytest.warns(UserWarning, match="previous checkpoint step-00000002"):
        assert latest(folder) == folder / "step-00000002"
    stray.rename(stray.with_name(".nfs0001"))  # what a file system leaves of a file that is open elsewhere
    assert latest(folder) == last


def test_what_will_not_be_read_need_only_have_its_size(folder: Path) -> None:
    last = folder / "step-00000003"
    file = members(last, "optimizer")[-1]
    flip(file)
    assert fault(last, {"ema-0.99"}) is None
    assert latest(folder, {"ema-0.99"}) == last
    assert str(fault(last, {"net", "optimizer"})).startswith(str(file))
    cut(file)
    assert str(fault(last, {"ema-0.99"})).startswith(str(file))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"facts": {"step": 3}}', '{"facts": {"step": 3, "images": 1}, "files": {"a": {}}}']
)
def test_a_list_that_is_damaged(folder: Path, text: str) -> None:
    last = folder / "step-00000003/state.json"
    last.write_text(text)
    with pytest.warns(UserWarning, match="state.json is missing or damaged.*previous checkpoint step-00000002"):
        assert latest(folder) == folder / "step-00000002"


def test_the_list_names_every_file_but_itself(folder: Path) -> None:
    last = folder / "step-00000003"
    about = json.loads((last / "state.json").read_text())
    files = {path.relative_to(last).as_posix(): path for path in last.rglob("*") if path.is_file()}
    assert about["files"].keys() | {"state.json"} == files.keys()
    assert about["facts"]["versions"]["torch"] == torch.__version__
    assert about["facts"]["ranks"] == (RANKS if folder.name == "ranks" else 1)
    for name, said in about["files"].items():
        assert said == {"bytes": files[name].stat().st_size, "sha256": digest.of_file(files[name])}


def test_a_damaged_step_is_replaced(folder: Path) -> None:
    last = folder / "step-00000003"
    flip(members(last, "net")[0])
    state = trained(SPEC)  # of one process, whoever wrote what stands
    assert save(folder, state, 2) == last
    assert fault(last) is None
    assert {path.name for path in last.iterdir()} == {STATE_FILE, "run.yaml", *NAMES}
    assert [file.name for name in NAMES for file in members(last, name)] == ["00000.safetensors"] * len(NAMES)
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000002", "step-00000003"]


def test_an_old_step_that_is_held_open_is_out_of_sight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps a file that a process has mapped, and with it the folder."""
    remove_folder = os.rmdir

    def rmdir(path: str | Path, *, dir_fd: int | None = None) -> None:
        if Path(path).name.startswith(".step-"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove_folder(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", rmdir)
    state = trained(SPEC)
    state.step = 4
    save(folder, state, 1)
    assert Checkpoints(folder).steps() == [4]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_step_does_not_count_as_kept(folder: Path, harm: str) -> None:
    """Not a changed bit either, which was found when the run was resumed."""
    HARMS[harm][0](members(folder / "step-00000003", "net")[0])
    state, checkpoints = trained(SPEC), Checkpoints(folder)
    with pytest.warns(UserWarning, match="previous checkpoint step-00000002"):
        assert checkpoints.latest()
    for state.step, stand in ((4, (2, 3, 4)), (5, (4, 5))):
        checkpoints.save(state, keep=2)
        checkpoints.wait()
        assert [path.name for path in sorted(folder.iterdir())] == [f"step-0000000{n}" for n in stand]


def test_the_last_good_one_is_found_while_another_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the thread that saves, after the folder was listed."""
    read = Checkpoints.read

    def read_late(checkpoints: Checkpoints, step: int) -> Checkpoint:
        found = read(checkpoints, step)
        if step == 3:
            checkpoint.remove(checkpoints.path(step))
        return found

    monkeypatch.setattr(Checkpoints, "read", read_late)
    assert Checkpoints(folder).last_good(3) == 2


@pytest.mark.filterwarnings("error")
def test_what_ranks_wrote_is_read_on_one_process_bit_for_bit(saved: Path) -> None:
    new = begin(Small(1), SPEC)
    restore(saved / "ranks/step-00000003", new)
    assert same(tensors(new), tensors(trained(SPEC)))
    assert (new.step, new.images) == (3, 36)


def test_weights_of_ranks_are_those_of_one_process(saved: Path) -> None:
    one, ranks = (saved / kind / "step-00000003/ema-0.99" for kind in ("one", "ranks"))
    assert same(tensor_files.load(one), tensor_files.load(ranks))
    assert tensor_files.title(one) == tensor_files.title(ranks) == "ema-0.99"
    assert {name: x.shape for name, x in tensor_files.header(one).items()} == {
        name: x.shape for name, x in tensor_files.header(ranks).items()
    }
    for place in (one, ranks):
        assert tensor_files.sha256(place) == Checkpoint.read(place.parent).sha256(place.name)
    assert tensor_files.sha256(one) == digest.of_file(one / "00000.safetensors")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_part_that_lacks_a_file_is_refused_without_a_list(saved: Path, tmp_path: Path, which: int) -> None:
    """Weights that were copied away from their checkpoint."""
    folder = shutil.copytree(saved / "ranks/step-00000003/net", tmp_path / "net")
    assert tensor_files.load(folder)
    some = sorted(folder.iterdir())[which]
    cut(some)
    with pytest.raises(UserError, match="net has a damaged file"):
        tensor_files.load(folder)
    some.unlink()
    with pytest.raises(UserError, match="net") as refused:
        tensor_files.compare(folder, tensor_files.load(folder), Small().state_dict(), "the run", "resume")
    assert ("has a shard of" in str(refused.value)) == (which != 2)  # without the last, tensors are shorter


@pytest.mark.parametrize("offset", [0, 2, "2", None])
def test_parts_of_a_tensor_must_fill_it(offset: object, tmp_path: Path) -> None:
    """Their sizes sum up to the whole, and torch would read what was in memory before."""
    for rank, start in enumerate((0, offset, 4)):
        about = json.dumps({"a": {"saved_offsets": [start]}})
        save_file({"a": torch.ones(2)}, tmp_path / f"{rank:05d}.safetensors", {"DCP_SHARDING_INFO": about})
    if offset == 2:
        assert torch.equal(tensor_files.load(tmp_path)["a"], torch.ones(6))
        return
    with pytest.raises(UserError):
        tensor_files.load(tmp_path)
