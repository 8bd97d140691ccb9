"""ADM's reference files: read as written, in batches, and refused by name where they are not what they should be."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dumo.evaluation import npz, reference
from dumo.evaluation.reference import read_adm
from dumo.io.picture import to_rows
from dumo.types import UserError

WIDE, NARROW, COUNT = 6, 4, 100
DRAWS = np.random.default_rng(0)
IMAGES = DRAWS.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "WIDTH", WIDE)
    monkeypatch.setattr(reference, "SPATIAL_WIDTH", NARROW)


def arrays() -> dict[str, np.ndarray]:
    """What such a file holds: means in float32, covariances in float64."""
    x, y = DRAWS.normal(size=(50, WIDE)), DRAWS.normal(size=(50, NARROW))
    moments = {"mu": x.mean(0).astype(np.float32), "sigma": np.cov(x.T)}
    return {"arr_0": IMAGES, **moments, "mu_s": y.mean(0).astype(np.float32), "sigma_s": np.cov(y.T)}


def written(path: Path, compress: bool = False, **changes: np.ndarray | None) -> Path:
    kept = {name: array for name, array in (arrays() | changes).items() if array is not None}
    (np.savez_compressed if compress else np.savez)(path, **kept)
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_is_read_as_written(tmp_path: Path, compress: bool) -> None:
    kept = arrays()
    file = read_adm(written(tmp_path / "a.npz", compress, **kept), count=COUNT)
    assert file.image_file.shape == IMAGES.shape
    for moments, suffix in ((file.pool, ""), (file.spatial, "_s")):
        assert moments.count == COUNT
        assert np.array_equal(moments.mean.numpy(), kept[f"mu{suffix}"])
        np.testing.assert_allclose(moments.covariance.numpy(), kept[f"sigma{suffix}"], rtol=1e-14)


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_images_come_in_order_channels_first(tmp_path: Path, batch: int) -> None:
    parts = list(read_adm(written(tmp_path / "a.npz"), count=COUNT).images(batch))
    assert [len(part) for part in parts[:-1]] == [batch] * (len(parts) - 1)
    assert np.array_equal(torch.cat(parts).permute(0, 2, 3, 1).numpy(), IMAGES)


@pytest.mark.parametrize("compress", [False, True])
def test_any_stretch_is_read(tmp_path: Path, compress: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards, back and again; with classes, which the file may lack."""
    monkeypatch.setattr(npz, "SKIP_BYTES", 100)
    labels = np.arange(10, dtype=np.int16)
    images = npz.NpzImages(written(tmp_path / "a.npz", compress, arr_1=labels))
    for rows in (slice(2, 4), slice(7, 9), slice(0, 3), slice(1, 10, 4), slice(10, 12), slice(None), slice(8, 20)):
        x, c = images.rows(rows)
        assert np.array_equal(to_rows(x).numpy(), IMAGES[rows])
        assert c.tolist() == labels[rows].tolist()
    x, c = images.rows(torch.tensor([1, 4, 8]))
    assert np.array_equal(to_rows(x).numpy(), IMAGES[[1, 4, 8]])
    assert c.tolist() == [1, 4, 8]
    assert npz.NpzImages(written(tmp_path / "b.npz")).rows(slice(3))[1].tolist() == [0, 0, 0]


def test_arrays_from_elsewhere_are_read_too(tmp_path: Path) -> None:
    """Of numpy's second format, in the other order of bytes."""
    path = written(tmp_path / "a.npz", arr_0=None, mu=np.arange(WIDE, dtype=">f8"))
    with zipfile.ZipFile(path, "a") as file, file.open("arr_0.npy", "w") as member:
        np.lib.format.write_array(member, IMAGES, version=(2, 0))
    read = read_adm(path, count=COUNT)
    assert read.pool.mean.tolist() == list(range(WIDE))
    assert np.array_equal(next(read.images(10)).permute(0, 2, 3, 1).numpy(), IMAGES)


@pytest.mark.parametrize(
    ("key", "wrong", "said"),
    [
        *((key, None, f"a.npz has no {key}, only ") for key in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")),
        ("mu", np.zeros(WIDE + 1), "mu is float64 of shape (7,), not finite floats of shape (6,)"),
        ("sigma", np.zeros((WIDE, 2)), "not finite floats of shape (6, 6)"),
        ("mu_s", np.full(NARROW, np.nan), "mu_s is float64 of shape (4,), not finite"),
        ("mu_s", np.zeros(NARROW, int), "mu_s is int64"),
        ("sigma_s", np.arange(NARROW**2.0).reshape(NARROW, NARROW), "sigma_s must be a symmetric covariance"),
        ("mu", np.array([object()] * WIDE), "mu is object of shape (6,), not finite"),
        ("arr_0", np.array([[object()]]), "arr_0 is object of shape (1, 1), not images"),
        ("arr_0", IMAGES.astype(float), "arr_0 is float64"),
        ("arr_0", IMAGES[0], "arr_0 is uint8 of shape (16, 16, 3), not images"),
        ("arr_0", IMAGES.transpose(0, 3, 1, 2), "arr_0 is uint8 of shape (10, 3, 16, 16), not images"),
        ("arr_0", np.asfortranarray(IMAGES), "not images"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, key: str, wrong: np.ndarray | None, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read_adm(written(tmp_path / "a.npz", **{key: wrong}), count=COUNT)


@pytest.mark.parametrize(
    ("shape", "more", "said"),
    [*((shape, 64, "") for shape in ((2**42,), (2**21, 2**21), (-1,))), ((WIDE,), 8 * WIDE + 1, ".* and more")],
)
def test_a_header_is_believed_in_nothing(tmp_path: Path, shape: tuple[int, ...], more: int, said: str) -> None:
    """Neither one that claims terabytes, nor one of fewer numbers than there are."""
    for key in ("mu", "sigma_s", "arr_0")[: 1 if said else 3]:
        path = written(tmp_path / f"{key}.npz", **{key: None})
        with zipfile.ZipFile(path, "a") as file, file.open(f"{key}.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": shape})
            member.write(bytes(more))
        with pytest.raises(UserError, match=rf"{key} is float64 of shape{said}"):
            read_adm(path, count=COUNT)


@pytest.mark.parametrize(("dtype", "c"), [(np.int64, -1), (np.int64, 2**62), (np.uint64, 2**64 - 1)])
def test_classes_that_no_data_have_are_refused(dtype: type, c: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"arr_1 has the class {c}"):
        npz.NpzImages(written(tmp_path / "a.npz", arr_1=np.full(len(IMAGES), c, dtype)))


@pytest.mark.parametrize("count", [-1, 0, 11, 2**40])
def test_images_that_are_not_there_are_not_believed_in(count: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.npz", arr_0=None)
    shape = (count, *IMAGES.shape[1:])
    with zipfile.ZipFile(path, "a") as file, file.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
        member.write(IMAGES.tobytes())
    with pytest.raises(UserError, match=re.escape(str(shape))):
        npz.NpzImages(path)


def test_an_array_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.npz")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("arr_0.npy", b"")
    with pytest.raises(UserError, match="twice"):
        npz.NpzImages(path)


def test_no_npz_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", IMAGES)
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as file:
        file.writestr("mu.npy", "no array")
    for name, said in (("none.npz", "No such file"), ("one.npy", "not a zip file"), ("text.npz", "mu cannot be read")):
        with pytest.raises(UserError, match=said):
            read_adm(tmp_path / name, count=COUNT)


def test_damage_is_found_where_it_is(tmp_path: Path) -> None:
    """A byte that flipped among the images."""
    path = written(tmp_path / "a.npz")
    whole = path.read_bytes()
    place = whole.index(IMAGES[7].tobytes())
    (tmp_path / "flipped.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    images = read_adm(tmp_path / "flipped.npz", count=COUNT).images(4)
    with pytest.raises(UserError, match=r"flipped.npz is damaged at image \d .*: download it again"):
        list(images)


@pytest.mark.parametrize("missing", [1, IMAGES[0].nbytes])  # a byte, and a whole image
def test_images_that_are_fewer_than_the_header_says_are_refused(missing: int, tmp_path: Path) -> None:
    whole = written(tmp_path / "a.npz")
    shorter = written(tmp_path / "short.npz", arr_0=None)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(shorter, "a") as new:
        new.writestr("arr_0.npy", old.read("arr_0.npy")[:-missing])
    with pytest.raises(UserError, match=r"short.npz(: arr_0 has .* bytes, too few| is damaged at image \d)"):
        list(read_adm(shorter, count=COUNT).images(4))


def test_damage_behind_an_image_leaves_it_readable(tmp_path: Path) -> None:
    """A file that failed is opened anew: the images before the damage are read as ever."""
    pixels = np.tile(IMAGES // 64, (20, 1, 1, 1))  # is compressed, in several pieces
    path = written(tmp_path / "a.npz", True, arr_0=pixels)
    damaged = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        info = file.getinfo("arr_0.npy")
    place = info.header_offset + info.compress_size * 3 // 4
    damaged[place : place + 64] = b"\xff" * 64
    path.write_bytes(damaged)
    images = npz.NpzImages(path)
    with pytest.raises(UserError, match="is damaged at image 190"):
        images.pixels(190, 191)
    assert images.file is None
    assert np.array_equal(images.pixels(0, 2).permute(0, 2, 3, 1).numpy(), pixels[:2])
