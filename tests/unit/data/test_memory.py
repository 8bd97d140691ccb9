"""Rows that Python gives are read as what they are, or refused with what would do."""

import numpy as np
import pytest
import torch
from PIL import Image

from dumo.data import Memory
from dumo.data import memory as module
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


class Feature:
    """As Hugging Face's ClassLabel."""

    names = ("cat", "dog")


def image(level: int, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, (level, 0, 255))


@pytest.mark.parametrize(
    ("data", "shape", "classes", "names"),
    [
        (GREY, (1, 5, 7), 0, ()),
        (FLOATS, (3, 8, 8), 0, ()),
        (FLOATS.numpy().astype(np.float64), (3, 8, 8), 0, ()),
        (FLOATS.permute(0, 2, 3, 1), (3, 8, 8), 0, ()),
        ((FLOATS, [0, 2]), (3, 8, 8), 3, ()),
        ((FLOATS, torch.tensor([1, 0])), (3, 8, 8), 2, ()),
        (torch.randn(10, 2), (2,), 0, ()),
        (Rows((image(0), 1), (image(9), 0), classes=["a", "b", "c"]), (3, 4, 6), 3, ("a", "b", "c")),
        (Rows({"image": image(0), "label": 1}, features={"label": Feature()}), (3, 4, 6), 2, ("cat", "dog")),
        (Rows({"img": image(0)}, {"img": image(5)}), (3, 4, 6), 0, ()),
        (Rows(FLOATS[0], FLOATS[1]), (3, 8, 8), 0, ()),
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


def test_colours_lie_from_minus_one_to_one() -> None:
    x = Memory.of(np.array([0, 255], dtype=np.uint8).reshape(2, 1, 1)).open().x
    assert x.flatten().tolist() == [-1, 1]
    first = Memory.of(Rows((image(255), 4), (image(0), 0))).open()
    assert first.x[:, :, 0, 0].tolist() == [[1, -1, 1], [-1, -1, 1]]
    assert first.c.tolist() == [4, 0]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (3, "builtins:int: give a folder"),
        ([], "builtins:list: give a folder"),
        (torch.rand(4, 3, 8, 8), r"floats from .* give 2 \* x - 1"),
        (3 * FLOATS, "images lie in"),
        (FLOATS * float("nan"), "finite floats"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.long), "give uint8 colours"),
        (torch.randn(4, 5, 8, 8), r"shape \(4, 5, 8, 8\): give images"),
        (torch.randn(0, 2), r"shape \(0, 2\)"),
        ((FLOATS, [0]), "one for each of 2 samples"),
        ((FLOATS, [0, -1]), "whole numbers from 0"),
        ((FLOATS, [0.0, 1.0]), "whole numbers from 0"),
        ((FLOATS, ["a", "b"]), "whole numbers from 0, .* dtype <U1"),
        ((FLOATS, [[0], [1, 2]]), "whole numbers from 0"),
        (np.array([[1.0, "a"], [2.0, None]], dtype=object), "data is an array of dtype object"),
        (np.array([["a", "b"]]), "data is an array of dtype <U1"),
        (Rows([[1.0, 2.0], [3.0], [4.0]]), "row 0 of the data is no array"),
        (Rows("ab"), "row 0 of the data is an array of dtype <U2"),
        (Rows(image(0), image(0, (8, 8))), "row 1 of the data has shape"),
        (Rows((image(0), 1), image(0)), "all or none have a label"),
        (Rows({"text": "a"}), "a row of the data has text: none is image"),
    ],
)
def test_what_is_no_data_is_refused(data: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Memory.of(data)


def test_an_array_may_be_read_backwards() -> None:
    points = np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)
    assert Memory.of(points[::-1]).open().x.tolist() == points[::-1].tolist()


def test_rows_that_this_process_was_not_given_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Memory.of(GREY)
    monkeypatch.setattr(module, "TABLES", {})
    with pytest.raises(UserError, match=r"a numpy:ndarray of Python .* dumo.load\(RUN, data=...\)"):
        spec.open()
