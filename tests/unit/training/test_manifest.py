"""A checkpoint that is not as its list says is named, passed over, and replaced, in files or in shards."""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dumo.io import digest, weights
from dumo.training import checkpoint, manifest
from dumo.training.checkpoint import part_path
from dumo.training.manifest import Checkpoints
from dumo.training.spec import Train
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
    """Two steps as files, the same as shards. Not to be written to."""
    folder, state = tmp_path_factory.mktemp("saved"), trained(SPEC)
    for state.step in (2, 3):
        save(folder / "files", state, 2)
    shutil.copytree(folder / "files", folder / "shards")
    for step in (2, 3):
        split(folder / f"shards/step-0000000{step}", RANKS)
    return folder


@pytest.fixture(params=["files", "shards"])
def folder(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> Path:
    """Two steps in one of the layouts."""
    return shutil.copytree(saved / request.param, tmp_path / request.param)


def members(checkpoint: Path, name: str) -> list[Path]:
    """The files of a part of a checkpoint."""
    place = part_path(checkpoint, name)
    return sorted(place.iterdir()) if place.is_dir() else [place]


def flip(file: Path) -> None:
    """One bit in the middle of the numbers."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[(start + len(data)) // 2] ^= 1
    file.write_bytes(data)
    assert weights.read_metadata(file)  # it still opens


def cut(file: Path) -> None:
    """All but the last byte."""
    file.write_bytes(file.read_bytes()[:-1])


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "is missing"),
    "cut": (cut, "bytes, not"),
    "flipped": (flip, "SHA-256"),
}


PLACES = [("files", 0), *(("shards", which) for which in range(RANKS))]


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
    with pytest.warns(UserWarning, match="step-00000002, before it, is taken") as caught:
        assert latest(folder) == before
    assert [str(file) in str(w.message) for w in caught] == [True]
    members(before, "net")[0].unlink()
    with pytest.raises(UserError, match=r"has no whole checkpoint.* train from the start") as refused:
        latest(folder)
    assert str(file) in str(refused.value)
    assert str(before / "net") in str(refused.value)


@pytest.mark.parametrize("name", ["shard-00004-model-00001-of-00001.safetensors", "._net.safetensors", "notes.txt"])
def test_a_stray_file_is_named(folder: Path, name: str) -> None:
    """As a shard of another save, which would be read along, hidden or not."""
    last = folder / "step-00000003"
    some = members(last, "net")[0]
    stray = shutil.copy(some, some.with_name(name))
    assert fault(last) == f"{stray} is not listed in state.json"
    with pytest.warns(UserWarning, match="step-00000002, before it"):
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
    "text", ["", "{", "[]", '{"step": 3}', '{"step": 3, "images": 1}', '{"step": 3, "images": 1, "files": {"a": {}}}']
)
def test_a_list_that_is_damaged(folder: Path, text: str) -> None:
    last = folder / "step-00000003/state.json"
    last.write_text(text)
    with pytest.warns(UserWarning, match="state.json is missing or damaged.*step-00000002, before"):
        assert latest(folder) == folder / "step-00000002"


def test_the_list_names_every_file_but_itself(folder: Path) -> None:
    last = folder / "step-00000003"
    about = json.loads((last / "state.json").read_text())
    files = {path.relative_to(last).as_posix(): path for path in last.rglob("*") if path.is_file()}
    assert about["files"].keys() | {"state.json"} == files.keys()
    assert about["versions"]["torch"] == torch.__version__
    assert about["ranks"] == (RANKS if folder.name == "shards" else 1)
    for name, said in about["files"].items():
        assert said == {"bytes": files[name].stat().st_size, "sha256": digest.of_file(files[name])}


def test_a_damaged_step_is_replaced(folder: Path) -> None:
    last = folder / "step-00000003"
    flip(members(last, "net")[0])
    state = trained(SPEC)  # of one process, whoever wrote what stands
    assert save(folder, state, 2) == last
    assert fault(last) is None
    assert {path.name for path in last.iterdir()} == {"state.json", *(f"{name}.safetensors" for name in NAMES)}
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
    assert [*Checkpoints(folder).by_step()] == [4]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_step_does_not_count_as_kept(folder: Path, harm: str) -> None:
    HARMS[harm][0](members(folder / "step-00000003", "net")[0])
    state = trained(SPEC)
    for state.step, stand in ((4, (2, 3, 4)), (5, (4, 5))):
        save(folder, state, 2)
        assert [path.name for path in sorted(folder.iterdir())] == [f"step-0000000{n}" for n in stand]


def test_the_last_good_one_is_found_while_another_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the thread that saves, after the folder was listed."""
    walk = os.walk

    def walk_late(place: Path, onerror: Callable[[OSError], None]) -> object:
        if place.name == "step-00000003":
            manifest.remove(place)
        return walk(place, onerror=onerror)

    monkeypatch.setattr(os, "walk", walk_late)
    assert Checkpoints(folder).last_good(3) == 2


def test_a_checkpoint_is_read_to_the_end_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To count those that are kept: at every save, all would be too many."""
    read: list[Path] = []
    real = digest.of_file
    monkeypatch.setattr("dumo.io.digest.of_file", lambda file: read.append(file) or real(file))
    state, checkpoints = trained(SPEC), Checkpoints(folder)
    for state.step in (4, 5):
        checkpoint.save_copy(checkpoints, checkpoint.copy(state, checkpoint.CheckpointNotes(), {}), 3)
    assert len(read) == len(set(read))
    assert {file.relative_to(folder).parts[0] for file in read} == {
        "step-00000002",
        "step-00000003",
        ".step-00000004.tmp",
        ".step-00000005.tmp",
    }


def test_shards_are_read_on_one_process_bit_for_bit(saved: Path) -> None:
    new = begin(Small(1), SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(saved / "shards/step-00000003", new)
    assert same(tensors(new), tensors(trained(SPEC)))
    assert (new.step, new.images) == (3, 36)


def test_weights_in_shards_are_those_of_the_file(saved: Path) -> None:
    whole, shards = (part_path(saved / kind / "step-00000003", "ema-0.99") for kind in ("files", "shards"))
    assert (whole.is_file(), shards.is_dir()) == (True, True)
    assert same(weights.load(whole), weights.load(shards))
    assert weights.sha256(whole) == weights.sha256(shards)
    assert weights.title(whole) == weights.title(shards) == "ema-0.99"
    assert {name: x.shape for name, x in weights.outline(whole).items()} == {
        name: x.shape for name, x in weights.outline(shards).items()
    }


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_folder_that_lacks_a_shard_is_refused_without_a_list(saved: Path, tmp_path: Path, which: int) -> None:
    """Weights that were copied away from their checkpoint."""
    folder = shutil.copytree(saved / "shards/step-00000003/net", tmp_path / "net")
    assert weights.load(folder)
    with pytest.raises(UserError, match="holds no shards"):
        weights.load(tmp_path)
    some = sorted(folder.iterdir())[which]
    cut(some)
    with pytest.raises(UserError, match="net has a damaged shard"):
        weights.load(folder)
    some.unlink()
    with pytest.raises(UserError, match="net") as refused:
        weights.compare(folder, weights.load(folder), Small().state_dict(), "the run", "resume")
    assert ("lacks a part of" in str(refused.value)) == (which != 2)  # without the last, tensors are shorter


def test_shards_take_a_new_torch(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = begin(Small(1), SPEC)
    before = tensors(new)
    monkeypatch.setattr("torch.__version__", "2.12.1+cpu")
    with pytest.raises(UserError, match=r"^weights in shards.* here is 2\.12\.1\+cpu: .*pip install 'torch>=2\.13'$"):
        restore(saved / "shards/step-00000003", new)
    assert same(tensors(new), before)
    restore(saved / "files/step-00000003", new)


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained(SPEC)
    save(tmp_path / "a", state, 1)
    needed = sum(x.nbytes for x in tensors(state).values())
    free = [needed - 1]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": free[0]}))
    state.step = 4
    for folder, stands in ((tmp_path / "a", "step-00000003"), (tmp_path / "b", "no checkpoint")):
        with pytest.raises(UserError) as refused:
            save(folder, state, 1)
        assert str(refused.value) == (
            f"{folder}: the checkpoint takes {needed / 1e9:.3g} GB and the disk has {free[0] / 1e9:.3g} GB free, "
            f"so the checkpoint of step 4 was not written; {stands} still stands. Free some space and start again."
        )
    (tmp_path / "a/step-00000004").mkdir()  # damaged, and to be replaced
    with pytest.raises(UserError, match="step-00000003 still stands"):
        save(tmp_path / "a", state, 1)
    (tmp_path / "a/step-00000004").rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["step-00000003"]
    free[0] = needed
    assert save(tmp_path / "a", state, 1).is_dir()


def test_a_file_where_a_folder_is_wanted_is_named(tmp_path: Path) -> None:
    """It is no disk that is missing."""
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "checkpoints", file / "run" / "checkpoints"):
        with pytest.raises(UserError, match=f": {file} is a file, and a folder is wanted there"):
            manifest.paths_by_step(folder)
