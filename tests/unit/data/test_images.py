"""A user's own images: found by looking, the same from every kind of store, and refused with a reason."""

import os
import runpy
import shutil
import tarfile
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dumo.config.conditions import Conditions
from dumo.config.difference import config_hash, differences
from dumo.config.load import dump, load
from dumo.config.source import parse_text
from dumo.data import Images
from dumo.data import images as module
from dumo.data.images import Source
from dumo.io.data_source import DataSource
from dumo.run import judge
from dumo.run.resolve import resolve
from dumo.run.summary import empty_classes_line
from dumo.types import UserError
from unit.data.animals import (
    CLASSES,
    COUNT,
    SIDE,
    STORES,
    archive,
    as_folder,
    as_parquet,
    as_tar,
    bytes_of,
    label,
    levels,
    picture,
    refused,
    spec,
    table,
)

# --- what is there


ENDS = {  # the first image and the last
    "folder": ["ant/00.png", "cow/11.png"],
    "parquet": ["train-00000-of-00002.parquet row 0", "train-00001-of-00002.parquet row 4"],
    "tar": ["animals-train-000000.tar member 000000.png", "animals-train-000001.tar member 000011.png"],
}


@pytest.mark.parametrize("form", STORES)
def test_suffixes_may_be_in_upper_case(form: str, tmp_path: Path) -> None:
    STORES[form](tmp_path)
    for file in [path for path in tmp_path.rglob("*.*") if path.is_file()]:
        file.rename(file.with_suffix(file.suffix.upper()))
    assert spec(tmp_path).open().size == COUNT


@pytest.mark.parametrize("form", STORES)
@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_every_store_gives_the_same(form: str, memory: float, tmp_path: Path) -> None:
    """In order, each with its class and its path; labels can be left unread."""
    STORES[form](tmp_path)
    images = spec(tmp_path, memory=memory, flip=True)
    assert (images.classes, images.shape) == (3, (3, SIDE, SIDE))
    source = images.open()
    assert isinstance(source, DataSource)
    assert source.size == len(source) == COUNT
    assert source.names == (CLASSES if form != "tar" else ())
    x, c = source.reference(100, 0)
    assert (x.dtype, c.dtype) == (torch.float32, torch.int64)
    assert c.tolist() == [label(i) for i in range(COUNT)]
    assert bytes_of(x)[:, :, 5, 5].tolist() == [list(levels(i)) for i in range(COUNT)]
    assert (x[:, :, 0, 0] == 1).all()  # white is 1, and up and left are where they were
    some, its = source.rows(slice(4, 9))
    assert torch.equal(some, x[4:9])
    assert torch.equal(its, c[4:9])
    assert [source.encoded.path(i) for i in (0, 11)] == [str(tmp_path / end) for end in ENDS[form]]
    unread = spec(tmp_path, memory=memory, labelled=False)
    assert unread.classes == 0
    assert not unread.open().batch(0, 20, 0)[1].any()


@pytest.mark.parametrize("form", STORES)
def test_memory_changes_no_batch(form: str, tmp_path: Path) -> None:
    """And no order of asking does: forwards, again, from the middle."""
    STORES[form](tmp_path)
    kept, read = (spec(tmp_path, flip=True, memory=memory).open() for memory in (2.0, 0.0))
    for step, seed in ((0, 0), (1, 0), (2, 0), (2, 0), (7, 0), (1, 3)):
        (x, c), (y, d) = kept.batch(step, 5, seed), read.batch(step, 5, seed)
        assert torch.equal(x, y)
        assert torch.equal(c, d)


def test_half_are_mirrored_and_keyed(tmp_path: Path) -> None:
    """The white corner goes to the right, never down; with the step, not with the image."""
    as_folder(tmp_path)
    source = spec(tmp_path, flip=True).open()
    x, _ = source.batch(0, 4000, 0)
    left, right = (x[:, :, 0, k].eq(1).all(1) for k in (0, -1))
    assert torch.equal(left, ~right)
    assert abs(right.double().mean() - 0.5) < 0.04
    again, other = source.batch(0, 4000, 0)[0], source.batch(1, 4000, 0)[0]
    assert torch.equal(x, again)
    assert not torch.equal(right, other[:, :, 0, -1].eq(1).all(1))
    assert source.reference(1, 0)[0][:, :, 0, 0].eq(1).all()  # what is compared with is not mirrored
    plain = spec(tmp_path).open().batch(0, 4000, 0)[0]
    assert torch.equal(torch.where(right[:, None, None, None], x.flip(-1), x), plain)


def test_a_large_set_gives_a_sample_as_reference(tmp_path: Path) -> None:
    as_folder(tmp_path)
    source = spec(tmp_path, memory=0.0).open()
    some = [source.reference(5, 0, i)[0][:, 0, 5, 5] for i in (0, 0, 1)]
    assert len(some[0].unique()) == 5
    assert torch.equal(some[0], some[1])
    assert not torch.equal(some[0], some[2])


# --- how it is found


def test_a_flat_folder_has_no_classes(tmp_path: Path) -> None:
    """Nor has a folder of one folder; hidden files and other files are none of it."""
    for i in (3, 1, 2):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{i}.PNG").write_bytes(picture(i))
    (tmp_path / "photos" / "notes.txt").write_text("read me")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "9.png").write_bytes(picture(9))
    for root in (tmp_path, tmp_path / "photos"):
        images = spec(root)
        assert images.classes == 0
        assert bytes_of(images.open().reference(9, 0)[0])[:, 0, 5, 5].tolist() == [20, 40, 60]


@pytest.mark.parametrize(
    ("form", "typed"),
    [
        ("folder", "."),
        ("parquet", "."),
        ("parquet", "train-00000-of-00002.parquet"),
        ("tar", "animals-train-000000.tar"),
    ],
)
def test_images_in_the_working_folder_have_their_names(
    form: str, typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their classes, which are the same by the absolute path, as a run has it."""
    STORES[form](tmp_path)
    monkeypatch.chdir(tmp_path)
    here, absolute = spec(Path(typed)), spec(tmp_path / typed)
    assert (here.names, here.classes) == (absolute.names, absolute.classes)
    assert here.open().fingerprint() == absolute.open().fingerprint()


def test_what_dumo_wrote_among_the_images_is_none_of_them(tmp_path: Path) -> None:
    """Samples in a run's folder, and images in memory that were kept to be encoded; a run's folder may be the root."""
    as_folder(tmp_path)
    fingerprint = spec(tmp_path).open().fingerprint()
    for name in ("runs/photos", "mine"):
        (samples := tmp_path / name / "samples").mkdir(parents=True)
        (samples / "0.png").write_bytes(picture(0))
        (samples.parent / "run.yaml").touch()
    as_tar(tmp_path / "runs/latents")
    images = spec(tmp_path)
    assert images.names == CLASSES
    assert images.open().fingerprint() == fingerprint
    assert spec(tmp_path / "mine").open().size == 1


def test_a_file_may_be_the_root_and_a_column_has_a_name(tmp_path: Path) -> None:
    as_parquet(tmp_path / "p")
    as_tar(tmp_path / "t")
    assert spec(tmp_path / "p" / "train-00001-of-00002.parquet").open().size == 5
    assert spec(tmp_path / "t" / "animals-train-000001.tar", labelled=False).open().size == 7
    (tmp_path / "one.png").write_bytes(picture(1))
    assert spec(tmp_path / "one.png").open().size == 1
    pq.write_table(table(range(COUNT), fine=[i % 5 for i in range(COUNT)]), file := tmp_path / "a.parquet")
    assert [spec(file, label="fine").classes, spec(file).classes] == [5, 3]
    pq.write_table(pa.table({"img": [picture(i) for i in range(3)]}), file)  # bytes alone are images too
    assert spec(file).classes == 0
    assert bytes_of(spec(file).open().reference(3, 0)[0])[:, 0, 5, 5].tolist() == [0, 20, 40]


def test_classes_may_lie_deep_and_be_links(tmp_path: Path) -> None:
    as_folder(tmp_path / "all")
    (tmp_path / "set" / "few").mkdir(parents=True)
    (tmp_path / "set" / "few" / "a").symlink_to(tmp_path / "all" / "bee")
    (tmp_path / "set" / "few" / "b" / "deep").mkdir(parents=True)
    shutil.copy(tmp_path / "all" / "cow" / "08.png", tmp_path / "set" / "few" / "b" / "deep")
    x, c = spec(tmp_path / "set").open().reference(9, 0)
    assert c.tolist() == [0, 0, 0, 0, 1]
    assert bytes_of(x)[:, 0, 5, 5].tolist() == [80, 100, 120, 140, 160]


@pytest.mark.parametrize("form", STORES)
def test_a_split_is_chosen_by_name(form: str, tmp_path: Path) -> None:
    STORES[form](tmp_path / "train")
    STORES[form](tmp_path / "test")
    for file in list((tmp_path / "test").rglob("*train*")):
        file.rename(str(file).replace("train", "test"))
    assert "data.split" in refused(tmp_path)
    assert "test, train" in refused(tmp_path)
    source = spec(tmp_path, split="test").open()
    assert source.size == COUNT
    assert source.encoded.path(0).startswith(str(tmp_path / "test"))
    assert "no split 'val'" in refused(tmp_path, split="val")
    shutil.rmtree(tmp_path / "test")
    assert spec(tmp_path).classes == 3  # a split alone needs no choice


def test_the_place_may_be_an_environment_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays one in the spec: a run's folder can move to another machine."""
    as_folder(tmp_path / "animals")
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    images = Images(root="$SOME_DATA/animals", side=SIDE)
    assert images.root == "$SOME_DATA/animals"
    images = images.with_facts()
    assert images.open().size == COUNT
    monkeypatch.delenv("SOME_DATA")
    with pytest.raises(UserError, match=r"\$SOME_DATA/animals, but SOME_DATA is not set"):
        images.open()


# --- what is wrong


def test_where_classes_have_no_names_the_last_may_lack_images(tmp_path: Path) -> None:
    as_tar(tmp_path)
    assert spec(tmp_path, classes=4).open().size == COUNT


def one_table(root: Path, **columns: object) -> None:
    """A table of these columns alone."""
    pq.write_table(pa.table(columns), root / "a.parquet")


TWO = [picture(0)] * 2


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_table_of_texts_beside_images_holds_none(form: str, tmp_path: Path) -> None:
    """As img2dataset writes it next to each archive, and as captions lie in a folder."""
    STORES[form](tmp_path)
    one_table(tmp_path, url=["a", "b"], caption=["an ant", "a bee"])
    assert spec(tmp_path).open().size == COUNT


def test_a_missing_column_of_classes_is_said(tmp_path: Path) -> None:
    one_table(tmp_path, image=TWO, fine_label=[0, 1])
    with pytest.warns(UserWarning, match=r"no column 'label'.*fine_label"):
        assert spec(tmp_path).classes == 0
    assert spec(tmp_path, label="fine_label").classes == 2
    assert spec(tmp_path, labelled=False).classes == 0
    one_table(tmp_path, image=TWO, text=["a", "b"])
    assert spec(tmp_path).classes == 0


def spoil(form: str, root: Path, i: int) -> str:
    """Make image i no image; returns what must be named."""
    text = b"<html>404</html>"
    match form:
        case "folder":
            file = root / CLASSES[label(i)] / f"{i:02}.png"
            file.write_bytes(text)
            return str(file)
        case "parquet":
            for file in root.iterdir():
                rows = pq.read_table(file).to_pylist()
                for row in rows:
                    if row["image"]["path"] == f"{i}.png":
                        row["image"]["bytes"] = None if i == 9 else text
                schema = pq.read_schema(file)
                pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=3)
            return f"row {i if i < 7 else i - 7}"
        case _:
            members = {f"{k:06}.png": text if k == i else picture(k) for k in range(COUNT)}
            members |= {f"{k:06}.cls": str(label(k)).encode() for k in range(COUNT)}
            shutil.rmtree(root)
            archive(root / "a.tar", members)
            return f"member {i:06}.png"


@pytest.mark.parametrize("form", STORES)
@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_a_file_that_is_no_image_is_named(form: str, memory: float, tmp_path: Path) -> None:
    """At once where all are decoded, else in the batch that has it; the others are made."""
    STORES[form](tmp_path)
    name = spoil(form, tmp_path, 9)
    if memory:
        text = refused(tmp_path)
    else:
        source = spec(tmp_path, memory=0.0).open()
        with pytest.raises(UserError) as caught:
            [source.batch(step, 3, 0) for step in range(4)]
        text = str(caught.value)
    for part in (name, "data.on_bad=skip"):
        assert part in text


@pytest.mark.parametrize("form", STORES)
def test_skipped_images_are_counted_and_left_out(form: str, tmp_path: Path) -> None:
    STORES[form](tmp_path)
    for i in (2, 9) if form != "tar" else (9,):
        name = spoil(form, tmp_path, i)
    with pytest.warns(UserWarning, match=f"{1 if form == 'tar' else 2} of 12 images cannot be read") as caught:
        source = spec(tmp_path, on_bad="skip").open()
    assert name in str(caught[0].message)
    left = [i for i in range(COUNT) if i != 9 and (form == "tar" or i != 2)]
    x, c = source.reference(COUNT, 0)
    assert source.size == COUNT
    assert bytes_of(x)[:, 0, 5, 5].tolist() == [20 * i for i in left]
    assert c.tolist() == [label(i) for i in left]
    assert source.image_numbers(torch.tensor([10])).item() == 10


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_the_next_image_takes_the_place_of_a_bad_one(memory: float, tmp_path: Path) -> None:
    """Whoever asks first: batches stay a function of step and seed, and each image has its own label."""
    as_folder(tmp_path)
    spoil("folder", tmp_path, 3)
    spoil("folder", tmp_path, 11)
    images = spec(tmp_path, memory=memory, on_bad="skip")
    with pytest.warns(UserWarning, match="2 of 12 .* replaced by the next"):
        one, (x, c) = (source := images.open()), source.batch(0, COUNT, 0)
    two = spec(tmp_path, memory=0.0, on_bad="skip").open()
    number = bytes_of(x)[:, 0, 5, 5] // 20
    assert number.sort().values.tolist() == [0, 0, 1, 2, 4, 4, 5, 6, 7, 8, 9, 10]
    assert torch.equal(c, number // 4)
    x, c = one.rows(slice(None))  # a pass over all has each once
    assert bytes_of(x)[:, 0, 5, 5].tolist() == [20 * i for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10)]
    assert c.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    with pytest.warns(UserWarning, match="2 of 12"):
        late = [two.batch(step, 6, 0) for step in (3, 2, 1, 0)][::-1]
    for step, (y, d) in enumerate(late):
        x, c = one.batch(step, 6, 0)
        assert torch.equal(x, y)
        assert torch.equal(c, d)


def test_a_pass_in_batches_warns_a_few_times(tmp_path: Path) -> None:
    """However many cannot be read; the last line has them all."""
    draws = torch.Generator().manual_seed(0)
    for i in range(96):
        (tmp_path / f"{i:02}.png").write_bytes(b"no")
    for i in torch.randperm(96, generator=draws)[:36].tolist():
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i:02}.png")
    images = spec(tmp_path, memory=0.0, on_bad="skip", labelled=False, classes=0).rows()
    assert isinstance(images, Source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for start in range(0, 96, 4):
            images.rows(slice(start, start + 4))
        images.warn_of_unreadable("left out")
    assert len(caught) <= 8
    assert str(caught[-1].message).startswith("60 of 96 images cannot be read and are left out: ")


@pytest.mark.parametrize("memory", [2.0, 0.0])
def test_no_readable_image_is_an_error(memory: float, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"none of the 3 images can be read; the first: .*0\.png"):
        spec(tmp_path, memory=memory, on_bad="skip").open().batch(0, 2, 0)


def test_a_truncated_archive_is_named_wherever_it_ends(tmp_path: Path) -> None:
    """In a member, in a header, or between two: where a reader stops without a word. Padding may be missing."""
    as_tar(tmp_path)
    file = tmp_path / "animals-train-000001.tar"
    end = 7 * 3 * 2 * tarfile.BLOCKSIZE  # seven samples of three members, each a header and a block
    os.truncate(file, end + tarfile.BLOCKSIZE)
    assert spec(tmp_path).open().size == COUNT
    for size in range(end, -1, -768):
        os.truncate(file, size)
        assert str(file) in refused(tmp_path, on_bad="skip")


def test_what_was_found_is_written_down_and_held_to(tmp_path: Path) -> None:
    """Equal texts are equal specs, whatever the disk holds meanwhile; what it held is shown where the data are not."""
    as_folder(tmp_path)
    before = Images(root=str(tmp_path), side=SIDE)
    images = before.with_facts()
    assert (before.classes, before.names, images.classes, images.names) == (0, None, 3, CLASSES)
    told = images.model_dump(mode="json")
    assert told["names"] == list(CLASSES)
    assert Images.model_validate(told) == images
    (tmp_path / "bee").rename(tmp_path / "wasp")
    with pytest.raises(UserError, match="without bee; with wasp"):
        images.open()
    assert Images(root=str(tmp_path), side=SIDE) == before
    assert before.with_facts().names == ("ant", "cow", "wasp")
    assert "names has 3 names for classes=2" in refused(tmp_path, classes=2, names=CLASSES)
    shutil.rmtree(tmp_path)
    assert Images.model_validate(told).classes == 3
    away = spec(tmp_path, classes=7)
    assert (away.classes, away.shape) == (7, (3, SIDE, SIDE))


def test_where_the_number_of_classes_is_given_tables_say_what_they_are_called(tmp_path: Path) -> None:
    """People read it. No image changes its class, and data that call the classes otherwise are the same data."""
    as_parquet(tmp_path / "here")
    images = spec(tmp_path / "here", classes=3)
    assert (images.names, images.titles) == ((), CLASSES)
    assert Conditions(images).index("bee") == 1
    assert Images.model_validate(images.model_dump(mode="json")) == images
    assert spec(tmp_path / "here", classes=4).titles == ()  # they say what three are called
    as_parquet(tmp_path / "there" / "data")
    assert spec(tmp_path / "there", classes=3).titles == CLASSES
    as_folder(tmp_path / "folder")
    assert spec(tmp_path / "folder", classes=3).titles == ()  # not looked at: it may have a million files
    fields = [f"data.images.root={tmp_path / 'here'}", "data.images.classes=3", "evaluate.protocol={kind: photos}"]
    run = load("cifar10-latents", fields)
    resolved = resolve(run)
    assert resolved.resolved["data.images.titles"] == [*CLASSES]
    assert parse_text(dump(resolved), Path("run.yaml")).tree["resolved"]["data.images.titles"] == [*CLASSES]
    assert not [one for one in differences(run, resolved) if one.decides]
    assert config_hash(run) == config_hash(resolved)
    text = parse_text(dump(resolved), Path("run.yaml"))
    mine = load(text, ["data.images.titles=[ape, bat, cat]"])
    assert load(parse_text(dump(mine), Path("run.yaml"))) == mine.model_copy(update={"resolved": {}})


def test_titles_are_of_as_many_classes_as_there_are(tmp_path: Path) -> None:
    as_parquet(tmp_path)
    assert "titles has 3 names for classes=0" in refused(tmp_path, classes=0, labelled=False, titles=CLASSES)
    assert "titles has 2 names for classes=3" in refused(tmp_path, titles=CLASSES[:2])
    assert spec(tmp_path, classes=3, titles=("ape", "bat", "cat")).titles == ("ape", "bat", "cat")


def test_where_there_are_no_classes_or_no_data_yet_no_names_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written down asks to look again, and whoever opens what was not looked at is told."""
    monkeypatch.delenv("HERE", raising=False)
    for images in (Images(root="$HERE", side=SIDE).with_facts(), spec(tmp_path / "later")):
        assert (images.classes, images.names, images.model_dump()["classes"]) == (0, None, None)
    as_folder(tmp_path / "later")
    with pytest.raises(UserError, match="its classes are unknown"):
        images.open()
    assert images.with_facts().names == CLASSES
    for fields in ({"classes": 3}, {"labelled": False}):
        images = spec(tmp_path / "later", **fields)
        assert images.names == ()
        assert "names" not in images.model_dump()
    as_tar(tmp_path / "tar")
    assert (spec(tmp_path / "tar").classes, spec(tmp_path / "tar").names) == (3, ())


# --- as they come from the hub


@pytest.mark.data
def test_cifar10_is_whole() -> None:
    """Not decoded here: 50,000 rows, 5,000 of each class, ten names."""
    images = Images(root="$DUMO_DATA/cifar10", side=32, crop="none", split="train", memory=0.0).with_facts()
    assert images.classes == 10
    source = images.open()
    assert source.size == 50_000
    x, c = source.rows(slice(0, 40))
    assert (x.shape, c[0].item()) == ((40, 3, 32, 32), 1)
    assert (x.min(), x.max()) == (-1, 1)
    every = source.labels
    assert every is not None
    assert every.c.bincount().tolist() == [5_000] * 10
    assert Images(root="$DUMO_DATA/cifar10", side=32, split="test", memory=0.0, classes=10).open().size == 10_000


@pytest.mark.data
def test_imagenet_sample_is_in_order_and_cropped_already() -> None:
    """One image per class, of 256 x 256: ADM's crop to that size leaves every pixel as it is."""
    root = f"{os.environ['DUMO_DATA']}/imagenet-sample"
    cropped, plain = (
        Images(root=root, side=256, crop=crop, memory=0.0).with_facts().open() for crop in ("adm", "none")
    )
    assert cropped.size == 1000
    rows = slice(0, 1000, 250)
    x, c = cropped.rows(rows)
    assert c.tolist() == [0, 250, 500, 750]
    assert torch.equal(x, plain.rows(rows)[0])
    every = cropped.labels
    assert every is not None
    assert torch.equal(every.c, torch.arange(1000))


def test_a_class_of_which_no_image_can_be_read_is_named(tmp_path: Path) -> None:
    as_folder(tmp_path)
    images = spec(tmp_path, on_bad="skip").with_facts()
    assert empty_classes_line(images, images.open()) == ""
    spoiled = images.names[1]
    for file in (tmp_path / spoiled).iterdir():
        file.write_bytes(b"no")
    with pytest.warns(UserWarning, match="cannot be read"):
        source = images.open()
    assert f"no image can be read of class {spoiled}, " in empty_classes_line(images, source)
    first_few = images.model_copy(update={"count": 1})  # the other classes are left out, not spoiled
    assert empty_classes_line(first_few, first_few.open()) == ""


def test_no_more_images_are_decoded_at_once_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert runpy.run_path(module.__file__)["MAX_THREADS"] == 1


def test_images_are_not_all_decoded_where_some_are_judged_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_folder(tmp_path)
    for most, is_decoded in ((COUNT, True), (COUNT - 1, False)):
        monkeypatch.setattr(judge, "MAX_IMAGES", most)
        source = judge._originals_for_photos(spec(tmp_path))
        assert isinstance(source, Source)
        assert (source.decoded is not None) == is_decoded
