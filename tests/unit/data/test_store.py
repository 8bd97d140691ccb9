"""Files that are no images cost neither time nor memory; and a data set is known again by its fingerprint."""

import os
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dumo.data import Digits, Moons
from dumo.data.cache import open_cache
from dumo.data.encoding import encode
from dumo.io.source import Endless, TensorData
from dumo.types import UserError
from unit.data.animals import COUNT, STORES, archive, as_folder, picture, refused, spec
from unit.encoders.toy import PLAN, POINT, Pictures


def hole(file: Path) -> None:
    file.touch()
    os.truncate(file, 2**40)


def listener(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(file.name)
    os.chdir(here)


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (os.mkfifo, "is no regular file"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "is no regular file"),
    "hole": (hole, "has 1099511627776 bytes, more than an image has"),
    "socket": (listener, "cannot be read"),
    "empty": (Path.touch, "is empty"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_what_only_bears_an_image_s_name_is_named_and_not_waited_for(kind: str, memory: float, tmp_path: Path) -> None:
    as_folder(tmp_path)
    make, said = ODD[kind]
    make(file := tmp_path / "bee" / "odd.png")
    with pytest.raises(UserError, match=f"{file} {said}.*data.on_bad=skip"):
        spec(tmp_path, memory=memory).open().rows(slice(None))
    with pytest.warns(UserWarning, match=f"1 of 13 images .*{file} {said}"):
        x, _ = spec(tmp_path, memory=memory, on_bad="skip").open().rows(slice(None))
    assert len(x) == COUNT


@pytest.mark.parametrize("ending", ["tar", "parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_an_archive_or_table_that_is_no_file_is_named(ending: str, kind: str, tmp_path: Path) -> None:
    STORES[ending](tmp_path)
    ODD[kind][0](file := tmp_path / f"z-train.{ending}")
    for root in (tmp_path, file):
        assert f"{file} is no regular file" in refused(root)


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_images_that_come_or_go_after_opening(memory: float, tmp_path: Path) -> None:
    """What came is not there before the next start; what went is named, or left out, unless it was in memory."""
    as_folder(tmp_path)
    strict, lax = (spec(tmp_path, memory=memory, on_bad=way).open() for way in ("raise", "skip"))
    (tmp_path / "ant" / "new.png").write_bytes(picture(0))
    (tmp_path / "bee" / "05.png").unlink()
    if memory:
        assert len(strict.rows(slice(None))[0]) == len(lax.rows(slice(None))[0]) == COUNT
        return
    with pytest.raises(UserError, match=r"bee/05.png cannot be read: No such file"):
        strict.batch(0, COUNT, 0)
    with pytest.warns(UserWarning, match="1 of 12 images"):
        assert len(lax.rows(slice(None))[0]) == COUNT - 1
    assert lax.batch(0, COUNT, 0)[0].shape[0] == COUNT


# --- fingerprints


def first(root: Path) -> Path:
    """The first file of images."""
    return min(path for path in root.rglob("*") if path.suffix in (".png", ".tar", ".parquet"))


def add(form: str, root: Path) -> None:
    """One image more, or some."""
    if form == "folder":
        (root / "ant" / "new.png").write_bytes(picture(0))
    else:
        shutil.copy(first(root), root / f"zz-train.{form}")


def rename(form: str, root: Path) -> None:
    file = first(root)
    file.rename(file.with_stem(f"{file.stem}0"))


def replace(form: str, root: Path) -> None:
    """Another image in the place of one."""
    if form == "folder":
        (root / "ant" / "00.png").write_bytes(picture(0) + b"0")
    elif form == "parquet":
        rows = pq.read_table(file := first(root)).to_pylist()
        rows[0]["image"]["bytes"] += b"0"
        pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(file)), file, row_group_size=3)
    else:
        with tarfile.open(file := first(root)) as there:
            members = {info.name: there.extractfile(info) for info in there}
            whole = {name: found.read() for name, found in members.items() if found}
        archive(file, whole | {"000001.png": picture(1) + b"0"})


@pytest.mark.parametrize("form", STORES)
@pytest.mark.parametrize("change", [add, rename, replace, lambda form, root: first(root).unlink()])
def test_a_fingerprint_is_of_the_images_and_not_of_where_they_lie(
    form: str, change: Callable[[str, Path], None], tmp_path: Path
) -> None:
    """The same for a copy, with other times, decoded or not; another for other images."""
    STORES[form](one := tmp_path / "one")
    print_of = spec(one, classes=None).open().fingerprint()
    assert len(print_of) == 16
    shutil.copytree(one, two := tmp_path / "elsewhere" / "two")
    for file in two.rglob("*"):
        os.utime(file, ns=(5, 5))
    assert spec(two, memory=0.0).open().fingerprint() == print_of
    change(form, two)
    assert spec(two).open().fingerprint() != print_of


def test_fingerprints_of_what_is_no_file() -> None:
    """Digits are known by their numbers; what never ends, by nothing."""
    digits = Digits().open()
    assert isinstance(digits, TensorData)
    assert digits.fingerprint() == Digits().open().fingerprint()
    assert TensorData(digits.x + 1, digits.c).fingerprint() != digits.fingerprint()
    assert TensorData(digits.x, digits.c.flip(0)).fingerprint() != digits.fingerprint()
    moons = Moons().open()
    assert isinstance(moons, Endless)
    assert moons.fingerprint() is None


def test_a_cache_s_fingerprint_is_of_its_numbers(tmp_path: Path) -> None:
    prints: list[str] = []
    for k, (count, change) in enumerate([(20, {}), (20, {}), (21, {}), (20, {"dtype": "float16"})]):
        encode(Pictures(count), POINT, PLAN.model_copy(update=change), tmp_path / str(k))
        prints.append(open_cache(tmp_path / str(k), POINT.codec).fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
