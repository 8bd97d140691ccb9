"""Weights are read of safetensors only, whole, and the ones that were meant."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dumo.io.tensor_files import compare, load, read_metadata
from dumo.types import UserError


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.ckpt", "w.bin", "w.PTH", "w.safetensors", "w"])
def test_no_pickle(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="safetensors"):
        load(tmp_path / name)


@pytest.mark.parametrize("size", [0x0280, 0x4B50])  # these headers begin with the bytes of a pickle, and of a zip
def test_weights_that_look_like_a_pickle_are_read(tmp_path: Path, size: int) -> None:
    path, values = tmp_path / "w.safetensors", torch.arange(3.0)
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).ljust(size)
    path.write_bytes(size.to_bytes(8, "little") + header.encode() + values.numpy().tobytes())
    assert path.read_bytes()[:2] in (b"\x80\x02", b"PK")
    assert torch.equal(load(path)["w"], values)


def test_a_name_of_pickles_is_refused_whatever_it_holds(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.bin")
    with pytest.raises(UserError, match="pickle files are not supported"):
        load(tmp_path / "w.bin")


def test_notes_are_read_without_tensors(tmp_path: Path) -> None:
    for told in ({"step": "3"}, None):
        save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors", told)
        assert read_metadata(tmp_path / "w.safetensors") == (told or {})


def test_the_first_difference_is_named_and_how_many_there_are() -> None:
    a, file = {"a": torch.zeros(2), "b": torch.zeros(1)}, Path("w")
    compare(file, a, {name: x.clone() for name, x in a.items()}, "the net", "take others")
    compare(file, a, {name: x.half() for name, x in a.items()}, "the net", "take others", dtypes=False)
    with pytest.raises(
        UserError, match=r"^w: a is \(2,\) float32 in the file, \(2,\) float16 in the net: take others$"
    ):
        compare(file, a, a | {"a": a["a"].half()}, "the net", "take others")
    with pytest.raises(UserError, match=r"^w: b is \(1,\) in the file, absent in it \(2 such names\): take others$"):
        compare(file, a, {"a": a["a"], "c": a["a"]}, "it", "take others", dtypes=False)
