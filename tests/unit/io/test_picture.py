"""Which number is which colour, where each image lies, what files hold, and that none is ever found half written."""

import resource
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dumo.io.picture import (
    labelled_grid,
    scatter,
    sheet,
    to_rows,
    write_adm,
    write_picture,
    write_points,
    write_singles,
)
from dumo.runtime.random import stream

PIXELS = to_rows(2 * torch.rand(3, 1, 32, 32, generator=stream("archive")) - 1)
POINTS = torch.randn(2_000, 2, generator=stream("points"))
C = torch.tensor([4, 0, 9])


def test_every_colour_comes_back_in_its_channel_and_place() -> None:
    """k / 127.5 - 1 is the middle of colour k's interval: all 256 are told apart, grey is equal in all channels."""
    colours = torch.randint(256, (2, 3, 4, 5), generator=stream("colours"), dtype=torch.uint8)
    assert torch.equal(to_rows(colours / 127.5 - 1), colours.permute(0, 2, 3, 1))
    grey = torch.arange(256).to(torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(to_rows(grey.permute(0, 3, 1, 2) / 127.5 - 1), grey.expand(-1, -1, -1, 3))


def test_rounds_to_the_nearest_colour_and_clamps() -> None:
    x = torch.tensor([-9.0, -1.001, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1 - 0.51 / 127.5, 1 - 0.49 / 127.5, 1.3, 9.0])
    assert to_rows(x.view(1, 1, 2, 4))[..., 0].flatten().tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


def test_sheet_shows_every_pixel_of_every_image_in_its_place() -> None:
    pixels = to_rows(2 * torch.rand(5, 3, 4, 6, generator=stream("sheet")) - 1)
    page = np.asarray(sheet(pixels, columns=3, scale=2, gap=1))
    assert page.shape == (2 * 8 + 1, 3 * 12 + 2, 3)
    seen = np.zeros(page.shape[:2], bool)
    for i in range(5):
        top, left = i // 3 * 9, i % 3 * 13
        for h in range(8):
            for w in range(12):
                assert (page[top + h, left + w] == pixels[i, h // 2, w // 2].numpy()).all()
                seen[top + h, left + w] = True
    assert (page[~seen] == 255).all()  # gaps, and the missing sixth


def test_pictures_of_two_sizes_are_shown_whole() -> None:
    small, large = (Image.new("RGB", (side, side), "red") for side in (40, 80))
    page = np.asarray(labelled_grid([small, large], 1, ["small", "large"]))
    assert (page == (255, 0, 0)).all(-1).sum() == 40**2 + 80**2


@pytest.mark.parametrize(("size", "scale"), [(8, 8), (28, 3), (64, 1), (256, 1)])
def test_small_images_are_enlarged(size: int, scale: int) -> None:
    page = sheet(torch.zeros(1, size, size, 3, dtype=torch.uint8), columns=1)
    assert page.size == (size * scale, size * scale)


def test_scatter_has_grey_truth_below_red_samples_in_panels() -> None:
    """Samples of the first panel lie on the left, those of the second far outside; the frame is the truth's."""
    truth = torch.rand(500, 2, generator=stream("truth"))
    left = torch.stack([0.3 * truth[:, 0], truth[:, 1]], 1)
    page = np.asarray(scatter(truth, {"left": left, "gone": left + 100})).astype(int)
    height, width, _ = page.shape
    assert width == pytest.approx(2 * 450, abs=1)
    assert height > 450
    red = (page[..., 0] > 200) & (page[..., 1:].max(-1) < 80)
    grey = (np.ptp(page, axis=-1) == 0) & (page[..., 0] > 150) & (page[..., 0] < 230)
    first, second = slice(0, width // 2), slice(width // 2, width)
    assert red[:, first].sum() > 500
    assert red[:, second].sum() == 0
    assert grey[:, first].sum() > 500
    assert grey[:, second].sum() > grey[:, first].sum()
    assert np.nonzero(red)[1].max() < 0.5 * width / 2
    deep = torch.cat([truth, torch.zeros(500, 1)], 1)
    assert scatter(deep, {"": deep}).tobytes() == scatter(truth, {"": truth}).tobytes()


def test_titles_stand_above_columns_or_pictures() -> None:
    """Black letters on white; below and between them each pixel of a picture is as it was."""
    pixels = to_rows(2 * torch.rand(5, 3, 4, 6, generator=stream("titles")) - 1)
    cells = [sheet(image, 1) for image in pixels.split(1)]
    plain = np.asarray(sheet(pixels, columns=3, gap=2))
    page = np.asarray(labelled_grid(cells, 3, ["cats", "", "a name too long for one line " * 3], gap=2))
    head = len(page) - len(plain)
    assert (page[head:] == plain).all()
    dark = [(page[:head, 98 * k : 98 * k + 96] < 100).any() for k in range(3)]
    assert dark == [True, False, True]
    assert (page[:head, 96:98] == 255).all()  # the gaps stay free

    each = np.asarray(labelled_grid(cells, 3, ["a", "b", "$c", "d", "e"], gap=2))
    line = (len(each) - len(plain)) // 2
    assert (each[line : line + 64] == plain[:64]).all()
    assert (each[line + 66 : line + 66 + line, :290] < 100).any()

    named = np.asarray(labelled_grid(cells, 3, row_names=["first", "second"], gap=2))
    left = named.shape[1] - plain.shape[1]
    assert (named[:, left:] == plain).all()
    assert (named[:64, :left] < 100).any()


@contextmanager
def full_disk(at: int = 512) -> Generator[None, None, None]:
    """No file grows beyond `at` bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_hold_what_they_were_given(tmp_path: Path) -> None:
    """In the layout of ADM, points in their precision, single images numbered and lossless."""
    write_adm(tmp_path / "images.npz", PIXELS, C.int())
    write_points(tmp_path / "points.npz", POINTS, torch.zeros(len(POINTS), dtype=torch.int64))
    for name, x, c in (("images", PIXELS, C), ("points", POINTS, torch.zeros(len(POINTS)))):
        with np.load(tmp_path / f"{name}.npz", allow_pickle=False) as made:
            assert set(made) == {"arr_0", "arr_1"}
            assert (made["arr_0"].dtype, made["arr_1"].dtype) == (x.numpy().dtype, np.int64)
            assert (made["arr_0"] == x.numpy()).all()
            assert made["arr_1"].tolist() == c.tolist()
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
