"""Images that others made: read to the level, judged as a run's samples are, refused by name where they cannot be."""

import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from dumo.data import Digits
from dumo.data.pixel import SameSize, Unreadable
from dumo.encoders import inception
from dumo.evaluation import BundledProtocol, Context
from dumo.evaluation import fid as by_inception
from dumo.evaluation.protocol import NumberedSamples, Scores
from dumo.evaluation.reference import BATCH_SIZE, STANDARDS, hash_images
from dumo.evaluation.statistics import gather, statistics_of
from dumo.io.picture import to_rows, to_uint8, write_adm
from dumo.report import score
from dumo.report.comparison import compare, require_comparable
from dumo.report.evaluate_images import ImageSet, judge, judged_channels_and_classes, open_images
from dumo.runtime import dist
from dumo.types import UserError
from forked import main_of
from golden import inception as recipe
from meeting import outputs
from unit.data.animals import CLASSES, COUNT, SIDE, STORES, label, picture
from unit.evaluation.extractor import Peephole
from unit.report import judge_together

DRAWS = np.random.default_rng(0)
OTHER_CLASSES = "none: the protocol does not evaluate classes, or the reference has other classes"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, nothing fetched or kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    return tmp_path


def write(folder: str, n: int, *, classes: int = 0, side: int = 8, base: int = 0) -> Path:
    """A folder of images, in classes or flat; an .npz is one file."""
    for i in range(n):
        k = i % max(classes, 1)
        file = Path(folder, *[f"class {k}"] * bool(classes), f"{i:03}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        level = DRAWS.integers(base + 8 * k, base + 8 * k + 120, (side, side, 3), dtype=np.uint8)
        Image.fromarray(level).save(file)
    return Path(folder)


def pixels(found: ImageSet) -> tuple[torch.Tensor, str]:
    """All images of a place, and their hash."""
    batches = [(index, to_uint8(x)) for index, x in found.batches(len(found.source), 3)]
    return torch.cat([x for _, x in batches]), hash_images(batches)[1]


def test_a_folder_a_table_an_archive_and_an_npz_are_one(here: Path) -> None:
    """As for `dumo sample --format npz`, whose file it is."""
    wanted = np.stack([np.array(Image.open(io.BytesIO(picture(i)))) for i in range(COUNT)])
    write_adm(here / "npz.npz", torch.from_numpy(wanted), torch.tensor([label(i) for i in range(COUNT)]))
    places = [here / "npz.npz", *(here / name for name in STORES)]
    for name, make in STORES.items():
        make(here / name)
    seen = [(found, *pixels(found)) for found in (open_images(place) for place in places)]
    for found, x, sha256 in seen:
        assert np.array_equal(to_rows(x / 127.5 - 1).numpy(), wanted)
        assert sha256 == seen[0][2]
        assert found.shape == (3, SIDE, SIDE)
        assert found.labels is not None
        assert found.labels.c.tolist() == [label(i) for i in range(COUNT)]
    assert [found.labels.names for found, *_ in seen if found.labels] == [(), CLASSES, CLASSES, ()]


def sixteen(levels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, (h, w, 3), which pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_images_are_read_as_the_fields_evaluators_do_and_grey_of_16_bits_is_rounded() -> None:
    to_pixels = SameSize(8, 8, "none", "first.png")
    grey = Image.fromarray(DRAWS.integers(0, 256, (8, 8), dtype=np.uint8))
    for image in (grey, grey.convert("P"), grey.convert("1"), grey.convert("CMYK").convert("RGB")):
        data = encoded(image)
        theirs = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(to_pixels(data).permute(1, 2, 0).numpy(), theirs)
    levels = DRAWS.integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    data = sixteen(levels)
    theirs = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(to_pixels(data).permute(1, 2, 0).numpy(), theirs)
    assert np.array_equal(to_pixels(data).permute(1, 2, 0).numpy(), levels >> 8)
    found = to_pixels(encoded(Image.fromarray(levels[..., 0])))
    assert np.array_equal(found[0].numpy(), np.round(levels[..., 0] / 257).astype(np.uint8))
    assert torch.equal(found[0], found[2])
    with pytest.raises(Unreadable, match=r"is 4 x 8 pixels, but first\.png is 8 x 8"):
        to_pixels(encoded(grey.crop((0, 0, 4, 8))))


@pytest.mark.slow
def test_all_are_judged_or_a_choice_and_the_name_says_it() -> None:
    write("made", 30, classes=2)
    write("real", 24, classes=2)
    report = judge("made", against="real")
    assert report["file"] == "made.evaluation.json"
    kept = json.loads(Path(report["file"]).read_text())
    assert kept["results"] == report["results"]
    assert kept["protocol"] == "photos (30 samples)"
    assert kept["card"]["images"] == "30 of 30 images in made"
    assert kept["card"]["labels"] == "2 classes of the images"
    assert kept["card"]["reference"] == "24 of 24 images of the data"
    assert not {"weights", "solver", "seed", "codec"} & kept["card"].keys()

    fewer = judge("made", against="real", fields=["evaluate.protocol.samples=20"])
    assert fewer["card"]["images"] == "20 of 30 images in made"
    assert fewer["card"]["images_sha256"] != report["card"]["images_sha256"]

    Path("real/class 1").rename("real/dogs")  # other classes than the images': both are taken without
    assert judge("made", against="real", out=Path("o.json"))["card"]["labels"] == OTHER_CLASSES


@pytest.mark.nightly
def test_classes_matter_to_photos_and_pixels_to_the_hash() -> None:
    """Class by class as a run is judged; the classes of an .npz have no names."""
    made, real = write("made", 30, classes=2, base=40), write("real", 30, classes=2)
    found, labels = open_images(made), open_images(real).labels
    assert labels is not None
    x, _ = pixels(found)
    write_adm(Path("made.npz"), to_rows(x / 127.5 - 1), labels.c)
    write_adm(Path("bare.npz"), to_rows(x / 127.5 - 1), labels.c)
    with np.load("bare.npz") as kept:
        np.savez("bare.npz", kept["arr_0"])
    reports = [judge(place, against="real") for place in ("made", "made.npz", "bare.npz")]
    assert len({report["card"]["images_sha256"] for report in reports}) == 1
    assert reports[0]["results"] == reports[1]["results"] != reports[2]["results"]
    assert [report["card"]["labels"] for report in reports] == [
        "2 classes of the images",
        "2 classes of the images",
        "none",
    ]
    # a reference of the same size as a file of pixels: what it is compared with is the same
    x, _ = pixels(open_images(real))
    write_adm(Path("real.npz"), to_rows(x / 127.5 - 1), labels.c)
    again = judge("made", against="real.npz", out=Path("again.json"))
    assert again["results"] == reports[0]["results"]
    assert again["card"]["reference_sha256"] == reports[0]["card"]["reference_sha256"]


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """What protocols were given to judge by; nothing is judged."""
    contexts: list[Context] = []

    class Judged:
        facts: ClassVar = {}

        def score(self, samples: NumberedSamples) -> Scores:
            return {"mmd": 0.0}

        def baselines(self) -> dict[str, Scores]:
            return {}

    def evaluator(protocol: BundledProtocol, context: Context) -> Judged:
        contexts.append(context)
        return Judged()

    monkeypatch.setattr(BundledProtocol, "evaluator", evaluator)
    return contexts


def test_features_of_cifar10_are_compared_by_class_where_both_sides_have_the_same(contexts: list[Context]) -> None:
    """Else neither has classes: a reference without them would be all of class 0."""
    x = torch.from_numpy(DRAWS.integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8))
    c = torch.arange(1000) % 10
    write_adm(Path("made.npz"), x, c)
    write_adm(Path("fewer.npz"), x, c % 5)
    np.savez("flat.npz", x.numpy())
    reports = [judge("made.npz", "cifar10-features", against=f"{name}.npz") for name in ("made", "fewer", "flat")]
    assert reports[0]["file"] == "made.npz.cifar10-features.evaluation.json"  # next to that of photos
    labels = [report["card"]["labels"] for report in reports]
    assert labels == [
        "10 classes of the images",
        OTHER_CLASSES,
        OTHER_CLASSES,
    ]
    assert [context.classes for context in contexts] == [10, 0, 0]
    assert [context.c is None for context in contexts] == [False, True, True]
    real_classes = [int(context.data().reference(1000, 0)[1].max()) for context in contexts]
    assert real_classes == [9, 0, 0]


@pytest.mark.nightly
def test_digits_are_grey_and_have_an_accuracy_only_with_classes() -> None:
    table = Digits().originals()
    write_adm(Path("digits.npz"), to_rows(table.x[:600]), table.c[:600])
    report = judge("digits.npz", "digits")
    assert report["results"][0]["accuracy"] > 0.98
    assert report["card"]["reference"] == "1,797 samples of the data"
    write_adm(Path("two.npz"), to_rows(table.x[:600]), table.c[:600] % 2)
    found = open_images(Path("two.npz"))
    assert judged_channels_and_classes(BundledProtocol(kind="digits"), found, Path("two.npz")) == (1, 0)
    assert "accuracy" not in judge("two.npz", "digits")["results"][0]


def write_digits(names: Sequence[str]) -> None:
    """A folder `digits` of 500 black images, 50 in a folder of each of these names."""
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, "PNG")
    for name in names:
        (folder := Path("digits", name)).mkdir(parents=True)
        for i in range(50):
            (folder / f"{i}.png").write_bytes(image.getvalue())


def test_a_digit_is_known_by_the_name_of_its_folder(contexts: list[Context]) -> None:
    """Classes are numbered in the order of their names, where eight would be the first."""
    write_digits("0123456789")
    judge("digits", "digits")
    (context,) = contexts
    assert context.c is not None
    assert context.c.tolist() == [digit for digit in range(10) for _ in range(50)]
    Path("digits/9").rename("digits/nine")
    with pytest.raises(UserError, match="0 to 9"):
        judge("digits", "digits")
    assert len(contexts) == 1


def test_colour_is_no_grey() -> None:
    """Digits that `dumo sample` wrote have three equal channels."""
    pixels = np.repeat(DRAWS.integers(0, 256, (520, 8, 8, 1), dtype=np.uint8), 3, 3)
    pixels[77, 3, 4, 1] ^= 1
    np.savez("colour.npz", pixels)
    with pytest.raises(UserError, match=r"^image 77 of colour\.npz is in colour"):
        judge("colour.npz", "digits")


def test_ranks_take_pieces_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pieces, so that no batch rounds otherwise; a rank without one gives an empty one, for others wait."""
    np.savez("many.npz", DRAWS.integers(0, 256, (2 * BATCH_SIZE + 5, 4, 4, 3), dtype=np.uint8))
    found = open_images(Path("many.npz"))
    alone = [index.tolist() for index, _ in found.batches(99, 3)]
    assert [i for piece in alone for i in piece] == [*range(99)]
    monkeypatch.setattr(dist, "world", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        [(index, x)] = found.batches(99, 3)
        assert index.tolist() == (alone[rank] if rank < 3 else [])
        assert x.shape == (len(index), 3, 4, 4)


def test_stands_in_one_table_with_runs_that_were_judged_alike(here: Path) -> None:
    """Whatever these' codec and seed: of images nobody knows them. Two runs still have to agree."""
    write("made", 20)
    write("real", 20)
    card = judge("made", against="real")["card"]
    run = card | {"codec": {"kind": "taesd", "sha256": "c" * 64}, "seed": 3, "solver": {"kind": "euler"}, "step": 4}
    del run["images"]
    require_comparable({"run": run, "made": card})
    for field in ("protocol", "features_sha256", "reference_sha256", "rounding"):
        with pytest.raises(UserError, match=rf"(?s)used different settings.*  {field}: .* in run; .* in made"):
            require_comparable({"run": run | {field: "another"}, "made": card})
    with pytest.raises(UserError, match="  seed: 3 in run; None in made; 4 in other"):
        require_comparable({"run": run, "made": card, "other": run | {"seed": 4}})

    (here / "run").mkdir()
    rows = {"results": [{"nfe": 1, "solver": "euler", "kid": 2.0}], "contrast": []}
    Path("run/evaluation.json").write_text(
        json.dumps({"step": 4, "protocol": run["protocol"], "baselines": {}, "card": run, **rows})
    )
    found = compare(["run", "made.evaluation.json"])["rows"]
    assert [(row["run"], row["step"], row["nfe"]) for row in found] == [("run", 4, 1), ("made", None, None)]


def test_a_report_says_which_classes_cannot_be_read() -> None:
    write("mixed", 20)
    write("mixed/cats", 1)
    write("real", 20)
    report = judge("mixed", against="real")
    [line] = [line for line in score.terminal_lines(report, None) if line.startswith("labels: ")]
    assert line.startswith("labels: none: mixed has images both in folders (cats) and outside of them")


@pytest.mark.nightly
def test_two_ranks_are_one(here: Path) -> None:
    """Images of one piece, so that the second rank has none, and of three."""
    write("few", 24, classes=2)
    write("many", 150, classes=2)
    outputs([main_of("unit.report.judge_together", rank, here / "meeting", cwd=here) for rank in (0, 1)], 300)
    for place in ("few", "many"):
        together = json.loads(Path(f"{place}-together.json").read_text())
        alone = json.loads(json.dumps(judge_together.judged(place)))
        for part in ("results", "baselines", "samples"):
            assert together[part] == alone[part]
        assert together["card"] == alone["card"]


@pytest.mark.slow
@pytest.mark.parametrize("frechet", [False, True])
def test_by_inception_as_a_runs_samples(frechet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of the evaluator, of the same pixels; weights have to be there."""
    small = STANDARDS["folder"]._replace(samples=30, kid_subset_size=10)
    monkeypatch.setitem(STANDARDS, "folder", small)
    monkeypatch.setattr(by_inception, "WIDTH", 6)
    write("made", 30)
    write("real", 40, side=9)
    fields = [f"evaluate.protocol.frechet={str(frechet).lower()}"]
    with pytest.raises(UserError, match="protocol folder needs the weights of Inception"):
        judge("made", "folder", against="real", fields=fields)
    net = Peephole()
    monkeypatch.setattr(inception, "load", lambda path, device: net)
    Path("weights").touch()
    monkeypatch.setenv(inception.VARIABLE, "weights")
    report = judge("made", "folder", against="real", fields=fields)
    assert ("fid" in report["results"][0]) == frechet
    assert report["protocol"] == "folder" + " (no Fréchet distances)" * (not frechet)
    x, _ = pixels(open_images(Path("made")))
    fake = gather(statistics_of(net, [(torch.arange(30), x)], 30), 30)
    assert report["card"]["data"]["side"] == 8  # a reference is brought to the size of what is judged
    assert report["results"][0]["is"] == pytest.approx(fake.inception_score.value()[0], rel=1e-12)


@pytest.mark.nightly
def test_features_of_a_folder_are_torch_fidelitys() -> None:
    """Of Inception with random weights, by way of files (tests/golden/inception.json)."""
    for size in (64, 256):
        for i, image in enumerate(recipe.images(size).permute(0, 2, 3, 1)):
            Path(f"{size}").mkdir(exist_ok=True)
            Image.fromarray(image.numpy()).save(f"{size}/{i}.png")
        x, _ = pixels(open_images(Path(f"{size}")))
        found, golden = recipe.summary(recipe.net()(x).pool), recipe.golden()[str(size)]["2048"]
        assert found["shape"] == golden["shape"]
        assert found["norm"] == pytest.approx(golden["norm"], rel=1e-4)
        torch.testing.assert_close(torch.tensor(found["slice"]), torch.tensor(golden["slice"]), rtol=1e-4, atol=1e-4)
