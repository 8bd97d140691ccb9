"""Laws of the files: what they hold, and that none is ever found half written."""

import resource
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dumo.io.picture import to_rows, write_adm, write_picture, write_points, write_singles
from dumo.runtime.random import stream

PIXELS = to_rows(2 * torch.rand(3, 1, 32, 32, generator=stream("archive")) - 1)
POINTS = torch.randn(2_000, 2, generator=stream("points"))
C = torch.tensor([4, 0, 9])


@contextmanager
def full_disk(at: int = 512) -> Generator[None, None, None]:
    """No file grows beyond `at` bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_npz_has_the_layout_of_adm(tmp_path: Path) -> None:
    write_adm(tmp_path / "samples.npz", PIXELS, C.int())
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as made:
        assert set(made) == {"arr_0", "arr_1"}
        x, c = made["arr_0"], made["arr_1"]
    assert (x.dtype, x.shape) == (np.uint8, (3, 32, 32, 3))
    assert (x == PIXELS.numpy()).all()
    assert (x[..., 0] == x[..., 2]).all()
    assert c.dtype == np.int64
    assert c.tolist() == [4, 0, 9]


def test_points_keep_their_precision(tmp_path: Path) -> None:
    write_points(tmp_path / "points.npz", POINTS, torch.zeros(len(POINTS), dtype=torch.int64))
    with np.load(tmp_path / "points.npz", allow_pickle=False) as made:
        assert made["arr_0"].dtype == np.float32
        assert (made["arr_0"] == POINTS.numpy()).all()
        assert made["arr_1"].shape == (2_000,)


def test_singles_are_numbered_and_lossless(tmp_path: Path) -> None:
    write_singles(tmp_path / "new" / "folder", PIXELS, first=8)
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [f.name for f in files] == ["000008.png", "000009.png", "000010.png"]
    for file, pixels in zip(files, PIXELS, strict=True):
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert (np.asarray(image) == pixels.numpy()).all()


WRITERS: list[Callable[[Path], None]] = [
    lambda path: write_picture(path, Image.fromarray(PIXELS[0].numpy())),
    lambda path: write_adm(path, PIXELS, C),
    lambda path: write_points(path, POINTS, torch.zeros(len(POINTS), dtype=torch.int64)),
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(path)
    assert [f.name for f in tmp_path.iterdir()] == ["old"]
    assert path.read_bytes() == b"old"
    write(path)
    assert len(path.read_bytes()) > 512
    assert [f.name for f in tmp_path.iterdir()] == ["old"]


def test_singles_written_before_the_disk_is_full_are_whole(tmp_path: Path) -> None:
    small = torch.zeros(2, 2, 2, 3, dtype=torch.uint8)
    write_singles(tmp_path, small)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_singles(tmp_path, PIXELS, first=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["000000.png", "000001.png"]
