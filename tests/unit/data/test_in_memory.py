"""Rows that Python gives are read as what they are, or refused with what would do."""

from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import IterableDataset, TensorDataset

from dumo.data import Memory
from dumo.data import in_memory as module
from dumo.runtime.progress import bar
from dumo.types import UserError

GREY = np.arange(2 * 5 * 7, dtype=np.uint8).reshape(2, 5, 7)
FLOATS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


class Rows:
    """A map-style data set of torch's, which never says where it ends."""

    def __init__(self, *rows: object, **more: object) -> None:
        self.rows = rows
        self.__dict__ |= more

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> object:
        return self.rows[i]


class Flipping(Rows):
    """Rows that are mirrored at random, as torchvision's transforms do."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x = FLOATS[i % 2]
        return (x.flip(2) if torch.rand(()) < 0.5 else x), i % 3


class Stream(IterableDataset[torch.Tensor]):
    """Rows without numbers."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from FLOATS


class Feature:
    """As Hugging Face's ClassLabel."""

    names = ("cat", "dog")


class OnGpu(torch.Tensor):
    """As a tensor of a GPU: NumPy does not read it."""

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *_: object, **__: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def image(level: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, (level, 0, 255))


@pytest.mark.parametrize(
    ("data", "shape", "classes", "names"),
    [
        (GREY, (1, 5, 7), 0, ()),
        (FLOATS, (3, 8, 8), 0, ()),
        (FLOATS.numpy().astype(np.float64), (3, 8, 8), 0, ()),
        (FLOATS.permute(0, 2, 3, 1), (3, 8, 8), 0, ()),
        ((FLOATS, [0, 1]), (3, 8, 8), 2, ()),
        ((FLOATS, torch.tensor([1, 0])), (3, 8, 8), 2, ()),
        (torch.randn(10, 2), (2,), 0, ()),
        (Rows((image(0), 1), (image(9), 0), classes=["a", "b", "c"]), (3, 4, 6), 3, ("a", "b", "c")),
        (Rows({"image": image(0), "label": 1}, features={"label": Feature()}), (3, 4, 6), 2, ("cat", "dog")),
        (Rows({"img": image(0)}, {"img": image(5)}), (3, 4, 6), 0, ()),
        (Rows(FLOATS[0], FLOATS[1]), (3, 8, 8), 0, ()),
        (TensorDataset(FLOATS), (3, 8, 8), 0, ()),
        (TensorDataset(FLOATS, torch.tensor([1, 0])), (3, 8, 8), 2, ()),
    ],
)
def test_data_are_read(data: object, shape: tuple[int, ...], classes: int, names: tuple[str, ...]) -> None:
    spec = Memory.of(data)
    assert (spec.shape, spec.classes, spec.names) == (shape, classes, names)
    table = spec.open()
    assert table.x.shape[1:] == shape
    assert table.x.dtype == torch.float32
    assert table.x.is_contiguous()
    assert table.fingerprint() == spec.digest
    assert table is spec.originals()


ON_GPU = FLOATS.as_subclass(OnGpu)
LABELS_ON_GPU = torch.tensor([1, 0]).as_subclass(OnGpu)


@pytest.mark.parametrize(
    "data",
    [(ON_GPU, LABELS_ON_GPU), Rows((ON_GPU[0], LABELS_ON_GPU[0]), (ON_GPU[1], LABELS_ON_GPU[1]))],
    ids=["tensors", "rows"],
)
def test_tensors_of_a_gpu_are_brought_to_the_cpu(data: object) -> None:
    source = Memory.of(data).open()
    assert type(source.x) is torch.Tensor
    assert torch.equal(source.x, FLOATS)
    assert source.c.tolist() == [1, 0]


def test_colours_lie_from_minus_one_to_one() -> None:
    x = Memory.of(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1)).open().x
    assert x.flatten().tolist() == [-1, 1]
    first = Memory.of(Rows((image(255), 1), (image(0), 0))).open()
    assert first.x[:, :, 0, 0].tolist() == [[1, -1, 1], [-1, -1, 1]]
    assert first.c.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("picture", "first"),
    [
        (image(255).quantize(), [1, -1, 1]),
        (image(255).convert("CMYK"), [1, -1, 1]),
        (Image.new("LA", (6, 4), (0, 0)), [1, 1, 1]),
        (Image.new("I;16", (6, 4), 65535), [1, 1, 1]),
        (Image.new("1", (6, 4), 1), [1]),
        (Image.new("L", (6, 4), 255), [1]),
    ],
)
def test_pictures_of_any_mode_are_read_as_they_look(picture: Image.Image, first: list[float]) -> None:
    assert Memory.of(Rows(picture)).open().x[0, :, 0, 0].tolist() == first


def test_pictures_are_turned_upright() -> None:
    picture = image(0)
    picture.getexif()[ExifTags.Base.Orientation] = 6
    assert Memory.of(Rows(picture)).shape == (3, 6, 4)


def test_an_array_may_be_read_backwards() -> None:
    points = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)
    assert Memory.of(points[::-1]).open().x.tolist() == points[::-1].tolist()


def test_rows_that_change_are_read_at_each_visit(capfd: pytest.CaptureFixture[str]) -> None:
    data = Flipping(*range(30))
    spec = Memory.of(data, bar)
    assert "Flipping returns different samples at each read" in capfd.readouterr().err
    source = spec.open()
    visits = torch.stack([source.batch(step, 30, 0)[0] for step in range(8)])
    numbers = source.numbers(0, 30, 0)
    row = [int((source.numbers(step, 30, 0) == numbers[0]).nonzero()) for step in range(8)]
    seen = torch.stack([visits[step, row[step]] for step in range(8)])
    original = FLOATS[int(numbers[0]) % 2]
    mirrored = original.flip(2)
    assert all(torch.equal(x, original) or torch.equal(x, mirrored) for x in seen)
    assert not (seen == seen[0]).all(), "one row is not always the same"
    assert torch.equal(source.batch(0, 30, 0)[1], numbers % 3), "and keeps its class"
    assert Memory.of(Flipping(*range(30))).digest == spec.digest, "a training goes on with the same data set"
    assert Memory.of(Flipping(*range(29))).digest != spec.digest


def test_a_batch_of_rows_that_change_is_checked() -> None:
    data = Flipping(*range(30))
    source = Memory.of(data).open()
    object.__setattr__(source, "data_set", Rows(*[(3 * FLOATS[0], 0)] * 30))
    with pytest.raises(UserError, match="a row of the data has the value 3: scale images"):
        source.batch(0, 4, 0)
    object.__setattr__(source, "data_set", Rows(*[(FLOATS[0, :, :4], 0)] * 30))
    with pytest.raises(UserError, match=r"have shape \(3, 4, 8\), but \(3, 8, 8\)"):
        source.batch(0, 4, 0)


def test_rows_that_this_process_was_not_given_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Memory.of(GREY)
    monkeypatch.setattr(module, "SOURCES", {})
    with pytest.raises(UserError, match=r"a Python numpy:ndarray .* dumo.load\(RUN, data=...\)"):
        spec.open()
