"""Images are known by what is in them: another content is refused by name, whatever its size, time and name."""

import io
import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from autoencoder import taef2
from dumo.config import recipe_files
from dumo.data import Latents, ledger
from dumo.data.ledger import FILE, Ledger
from dumo.run import fill_caches
from e2e.shell import call, refused, together
from tiers import tiered
from unit.data.animals import archive
from unit.data.spy import spied
from unit.run.known import noted

COUNT, SIDE = 40, 16
NET = {"kind": "dit", "patch": 8, "width": 16, "depth": 1, "attention": 2, "time_scale": 10.0}
CHANGED = "the data differ from those the run was trained on"


def bmp(seed: int) -> bytes:
    """Random pixels; all are of one size."""
    draws, out = torch.Generator().manual_seed(seed), io.BytesIO()
    pixels = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=draws)
    Image.fromarray(pixels.numpy()).save(out, "BMP")
    return out.getvalue()


def as_folder(root: Path, first: int) -> None:
    for i in range(COUNT):
        file = root / f"class{i % 2}" / f"{i:02}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bmp(first + i))


def as_tar(root: Path, first: int) -> None:
    archive(root / "a.tar", {f"{i:02}.bmp": bmp(first + i) for i in range(COUNT)})


def as_parquet(root: Path, first: int) -> None:
    import pyarrow as pa

    root.mkdir(exist_ok=True)
    rows = [{"image": {"bytes": bmp(first + i), "path": ""}, "label": i % 2} for i in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows), root / "train.parquet", compression="none", use_dictionary=False)


FORMS: dict[str, Callable[[Path, int], None]] = {"folder": as_folder, "tar": as_tar, "parquet": as_parquet}


def back(root: Path, times: dict[str, int]) -> None:
    """All files again, with new inodes and these times."""
    for file in [path for path in root.rglob("*.*") if path.is_file() and not path.name.startswith(".")]:
        shutil.copy(file, other := file.with_name("other"))
        os.utime(other, ns=(times[file.name],) * 2)
        other.replace(file)


def times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.rglob("*.*")}


def sizes(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in root.rglob("[!.]*.*")}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny run on images, which are read when they are needed; what is noted of them lies outside of where we are."""
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    tree = yaml.safe_load(recipe_files.text("digits"))
    tree["data"] = {"kind": "images", "root": "../images", "side": SIDE, "crop": "none", "memory": 0.0}
    tree["net"] = NET
    tree["train"] |= {"steps": 2, "batch": COUNT // 2, "schedule": {"kind": "constant"}}
    tree["evaluate"]["protocol"] = {"kind": "photos", "samples": 20}
    (file := here / "run.yml").write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture
def run(recipe: Path) -> Path:
    """It has seen all of its images, in a folder."""
    as_folder(Path("../images"), 0)
    assert call("train", recipe, "--out", "run").code == 0
    return Path("run")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images that are hashed at once from here on."""
    return spied(monkeypatch, Ledger, "hash", lambda ledger, images: len(images))


LONGER = ["train.steps=3"]


WAYS = [*product(FORMS, ("data.memory=0", "data.memory=2"))]


@pytest.mark.parametrize(("form", "memory"), tiered(WAYS, ci=[WAYS[0], WAYS[3]], id="-".join))
def test_other_content_of_equal_size_is_refused_before_a_step(form: str, memory: str, recipe: Path) -> None:
    FORMS[form](root := Path("../images"), 0)
    assert call("train", recipe, "--out", "run", memory).code == 0
    before = sizes(root)
    FORMS[form](root, 100)
    assert sizes(root) == before
    name = {"folder": "class0/00.bmp", "tar": "a.tar member 00.bmp", "parquet": "train.parquet row 0"}[form]
    refused(
        "train",
        "run",
        *LONGER,
        named=(CHANGED, f"{root.resolve() / name}, ", "and 37 more changed", "--from STEP --out NEW"),
    )


@pytest.mark.nightly
def test_the_same_time_and_another_inode_is_refused_as_it_is_read(run: Path, hashed: list[int]) -> None:
    was = times(root := Path("../images"))
    as_folder(root, 100)
    back(root, was)
    done = call("train", run, *LONGER)
    assert (done.code, "has changed since this run first read it" in done.err) == (2, True)
    assert sum(hashed) == 0


@pytest.mark.nightly
def test_the_full_check_sees_a_change_that_hides(run: Path) -> None:
    """In place, of the same size, with its time set back."""
    assert call("show", run, "--check").code == 0
    file = Path("../images/class0/00.bmp")
    was = file.stat().st_mtime_ns
    file.write_bytes(bmp(100))
    os.utime(file, ns=(was, was))
    done = call("show", run, "--check")
    assert (done.code, f"{file.resolve()} changed" in done.out) == (1, True)


@pytest.mark.parametrize("change", tiered(["add", "remove", "rename"], ci=["rename"]))
def test_images_that_come_and_go_are_named(change: str, run: Path) -> None:
    file, new = Path("../images/class0/00.bmp"), Path("../images/class0/new.bmp")
    if change == "rename":
        file.rename(new)
    elif change == "add":
        new.write_bytes(bmp(1))
    else:
        file.unlink()
    said = {"add": "class0/new.bmp new", "remove": "class0/00.bmp gone"}
    said["rename"] = f"{said['remove']}, {said['add']}"
    refused("train", run, *LONGER, named=(CHANGED, said[change]))


@pytest.mark.nightly
def test_the_same_content_goes_on(run: Path, hashed: list[int]) -> None:
    """Untouched or copied with their times, nothing is hashed at once; touched, all are, once."""
    for k, change in enumerate(("none", "touch", "none", "copy", "none"), 3):
        hashed.clear()
        if change == "touch":
            for file in Path("../images").rglob("*.bmp"):
                file.touch()
        elif change == "copy":
            shutil.copytree("../images", "copy")
            shutil.rmtree("../images")
            Path("copy").rename("../images")
        assert call("train", run, f"train.steps={2 * k}").code == 0
        assert sum(hashed) == (COUNT if change == "touch" else 0), change
    assert {field for _, field, _, _ in noted(run)} == {"train.steps"}


@pytest.mark.slow
def test_a_new_run_takes_the_data_as_they_are(run: Path) -> None:
    as_folder(Path("../images"), 100)
    words = ("train", run, "--from", "2", "--out", "new", *LONGER)
    assert call(*words).code == 0
    assert call(*words).code == 0
    as_folder(Path("../images"), 0)
    refused("train", "new", "train.steps=6", named=(CHANGED,))


@pytest.mark.nightly
def test_a_teacher_s_pairs_are_not_trained_on_after_a_swap(run: Path) -> None:
    """What they were made for has changed."""
    words = ["teacher.kind=run", "teacher.source=run", "teacher.pairs.count=16", "data.memory=2"]
    done = call("train", "run.yml", "--out", "pupil", *words)
    assert done.code == 0, done.err
    as_folder(Path("../images"), 100)
    refused("train", "pupil", *LONGER, named=(CHANGED, "class0/00.bmp"))


@pytest.fixture
def latents(recipe: Path) -> Path:
    """The same of latents, and their cache, of two shards by two parts, the second not made yet."""
    tree = yaml.safe_load(recipe.read_text())
    images = tree["data"]
    codec = {"kind": "taef2", "weights": str(taef2(Path("taef2.safetensors").absolute()))}
    tree["data"] = {"kind": "latents", "root": "../cache", "images": images, "codec": codec}
    tree["net"] = NET | {"patch": 1}
    recipe.write_text(yaml.safe_dump(tree))
    as_folder(Path("../images"), 0)
    encode_shard(0)
    return Path("../cache")


def encode_shard(rank: int) -> int:
    """Make one of the two shards of the cache, and return how many were made."""
    data = fill_caches.encoding_work("run.yml", out=None, codec=None, side=None).data
    assert isinstance(data, Latents)
    return fill_caches.encode(data, shard_rows=COUNT // 2, rank=rank, world=2).make_result.made


def test_a_cache_of_two_data_sets_is_not_made(latents: Path) -> None:
    """The second part sees what the first was made of."""
    root = Path("../images")
    as_folder(root, 100)
    refused("encode", "run.yml", named=("class0/00.bmp", "and 17 more changed"))
    as_folder(root, 0)
    assert encode_shard(1) == 1
    as_folder(root, 100)
    for words in (("encode", "run.yml"), ("train", "run.yml", "--out", "new")):
        refused(*words, named=("class0/00.bmp", "and 37 more changed", "encode into another folder"))
    assert not Path("new").exists()


@pytest.mark.nightly
def test_a_cache_stands_for_its_images(latents: Path, hashed: list[int]) -> None:
    """A run goes on with the same ones touched, without them, and not with others: nor is it judged by these."""
    assert call("encode", "run.yml").code == 0
    assert call("train", "run.yml", "--out", "run").code == 0
    assert sum(hashed) == 0
    for file in Path("../images").rglob("*.bmp"):
        file.touch()
    assert call("train", "run", *LONGER).code == 0
    assert sum(hashed) == COUNT
    Path("../images").rename("gone")
    assert call("train", "run", "train.steps=4").code == 0
    Path("gone").rename("../images")
    file = Path("../images/class0/00.bmp")
    was = file.stat().st_mtime_ns
    file.write_bytes(bmp(100))
    os.utime(file, ns=(was, was))
    done = call("show", "run", "--check")
    assert (done.code, f"{file.resolve()} changed" in done.out) == (1, True)
    assert str(file.resolve()) in call("evaluate", "run", "--nfe", 1).err
    file.touch()
    refused("train", "run", "train.steps=5", named=(f"{file.resolve()} changed",))
    file.unlink()
    refused("train", "run", "train.steps=5", named=("class0/00.bmp gone",))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 of 41 images cannot be read")
def test_an_image_that_was_left_out_is_not_missed(latents: Path) -> None:
    shutil.rmtree(latents)
    (bad := Path("../images/class0/bad.bmp")).write_bytes(b"BM")
    skip = ["data.images.on_bad=skip"]
    data = fill_caches.encoding_work("run.yml", skip, out=None, codec=None, side=None).data
    assert isinstance(data, Latents)
    fill_caches.encode(data, shard_rows=COUNT // 2)
    for _ in range(2):
        done = call("encode", "run.yml", *skip)
        assert (done.code, "40 images (1 could not be read)" in done.out) == (0, True)
    Path("../images/class1/01.bmp").write_bytes(bmp(100))
    refused("encode", "run.yml", *skip, named=("images/class1/01.bmp changed",))
    assert bad.exists()


@pytest.mark.nightly
def test_ranks_know_what_any_of_them_read(recipe: Path) -> None:
    """Each reads half of the images; one process knows them all again."""
    as_folder(root := Path("../images"), 0)
    together(2, "train", recipe, "--out", "run", cwd=Path.cwd())
    file = Path("run", FILE)
    assert ledger.read(file, file.stat().st_size).records["sha256"].any(1).all()
    together(2, "train", "run", *LONGER, cwd=Path.cwd())
    as_folder(root, 100)
    refused("train", "run", "train.steps=4", named=(CHANGED, "37 more changed"))
