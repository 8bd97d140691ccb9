"""Images or points that Python gave to `dumo.train`: an array, or a data set of torch's, held in memory."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dumo.io.picture import from_uint8
from dumo.io.source import TensorData
from dumo.types import FREE, Spec, UserError
from dumo.types.outside import name_of

CHANNELS = (1, 3)  # of images
# Keys of a row of Hugging Face datasets.
IMAGE = ("image", "img", "pixel_values")
LABEL = ("label", "labels", "fine_label")
TABLES: dict[str, TensorData] = {}  # by digest, as they were given


class Memory(Spec):
    """Rows in memory, there while the process lives."""

    kind: Literal["memory"] = "memory"
    name: str  # of the type that was given
    shape: tuple[int, ...]  # of a sample
    classes: int = Field(ge=0)
    names: tuple[str, ...] = ()  # of the classes
    digest: str = Field(json_schema_extra=FREE)  # of all numbers; training goes on with the same alone (data.json)
    captions: ClassVar[None] = None
    augment: ClassVar[None] = None

    @classmethod
    def of(cls, data: Any) -> "Memory":  # noqa: ANN401, what a notebook has
        """Read and remember an array, a pair (array, labels), or a map-style data set of samples, or of such pairs.

        Images are (n, channels, height, width), channels last, or grey without channels, as uint8 or floats in
        [-1, 1]; data sets may give PIL images. Points are (n, d). Raises UserError for anything else.
        """
        x, c, names = read(data)
        table = TensorData(samples(x), labels(c, len(x)))
        classes = 0 if c is None else max(int(table.c.max()) + 1, len(names))
        TABLES[digest := table.fingerprint()] = table
        return cls(
            name=name_of(type(data)), shape=tuple(table.x.shape[1:]), classes=classes, names=names, digest=digest
        )

    @property
    def labels(self) -> int:
        """How many classes there are: they have no captions."""
        return self.classes

    def open(self) -> TensorData:
        """All rows. Raises UserError where this process was not given them."""
        if self.digest not in TABLES:
            raise UserError(
                f"the data are a {self.name} of Python that this process does not have: give the same in Python, "
                "dumo.train(RUN, data=...) or dumo.load(RUN, data=...)"
            )
        return TABLES[self.digest]

    def originals(self) -> TensorData:
        """The same."""
        return self.open()


def read(data: Any) -> tuple[Any, Any, tuple[str, ...]]:  # noqa: ANN401
    """Samples, labels or None, and the names of classes. Raises UserError for what is no data."""
    if isinstance(data, Tensor | np.ndarray):
        return data, None, ()
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return *data, ()
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
        raise UserError(
            f"data is a {name_of(type(data))}: give a folder, an array, a pair (array, labels), or a data set with a "
            "length and rows"
        )
    rows = list[Tensor]()
    found = list[Any]()
    for x, c in map(pair, elements(data)):
        rows.append(tensor(x, f"row {len(rows)} of the data"))
        found.append(c)
        if rows[-1].shape != rows[0].shape or (c is None) != (found[0] is None):
            raise UserError(
                f"row {len(rows) - 1} of the data has shape {tuple(rows[-1].shape)}, row 0 {tuple(rows[0].shape)}, and "
                "all or none have a label: bring all to one size, or give a folder of images"
            )
    return torch.stack(rows), None if found[0] is None else found, class_names(data)


def class_names(data: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Those that a data set of torchvision's, or of Hugging Face's, knows; () where it knows none."""
    if names := getattr(data, "classes", ()):
        return tuple(map(str, names))
    features: Any = getattr(data, "features", None) or {}
    return next((tuple(getattr(features[key], "names", ())) for key in LABEL if key in features), ())


def elements(data: Any) -> Iterator[Any]:  # noqa: ANN401
    """The rows of a data set, each once: not all of them end by themselves."""
    return (data[i] for i in range(len(data)))


def pair(row: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """A sample and its label, or None. Raises UserError for a mapping without an image."""
    if isinstance(row, dict):
        image = next((row[key] for key in IMAGE if key in row), None)
        if image is None:
            raise UserError(f"a row of the data has {', '.join(map(str, row))}: none is {' or '.join(IMAGE)}")
        return image, next((row[key] for key in LABEL if key in row), None)
    return (row[0], row[1]) if isinstance(row, tuple | list) and len(row) == 2 else (row, None)


def tensor(values: Any, name: str) -> Tensor:  # noqa: ANN401
    """An array, picture or list of numbers as a tensor. Raises UserError, with this name, for what holds no numbers."""
    if isinstance(values, Tensor):
        return values
    try:
        array = values if isinstance(values, np.ndarray) else np.array(values)
    except ValueError as error:  # lists of several lengths
        raise UserError(f"{name} is no array ({error}): give rows of one shape") from error
    if any(stride < 0 for stride in array.strides):  # torch has none
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:  # objects, texts; another order of bytes
        raise UserError(
            f"{name} is an array of dtype {array.dtype}, which torch cannot hold: give uint8 colours, or finite floats "
            "in [-1, 1]"
        ) from error


def samples(x: Tensor | np.ndarray) -> Tensor:
    """Float32 points (n, d), or images (n, 1 or 3, h, w) in [-1, 1]. Raises UserError for other shapes and ranges."""
    x = tensor(x, "data")
    if x.ndim == 3:
        x = x.unsqueeze(1)  # grey
    if x.ndim == 4 and x.shape[1] not in CHANNELS and x.shape[3] in CHANNELS:
        x = x.permute(0, 3, 1, 2)
    if x.ndim not in (2, 4) or not len(x) or (x.ndim == 4 and x.shape[1] not in CHANNELS):
        raise UserError(
            f"data has shape {tuple(x.shape)}: give images (n, 1 or 3, height, width), or points (n, numbers)"
        )
    if x.dtype == torch.uint8 and x.ndim == 4:
        return from_uint8(x).contiguous()
    if not x.is_floating_point() or not x.isfinite().all():
        raise UserError(f"data holds {x.dtype} or what is no number: give uint8 colours, or finite floats in [-1, 1]")
    low = x.min().item()
    high = x.max().item()
    if x.ndim == 4 and not (-1 <= low < 0 and high <= 1):
        raise UserError(
            f"data are floats from {low:.3g} to {high:.3g}, and images lie in [-1, 1]: give 2 * x - 1 where they are "
            "from 0 to 1, or uint8 colours"
        )
    return x.float().contiguous()


def labels(c: Any, n: int) -> Tensor:  # noqa: ANN401
    """Class numbers (n,), all 0 where there are none. Raises UserError for what is no class, or not as many."""
    if c is None:
        return torch.zeros(n, dtype=torch.long)
    rule = f"labels are whole numbers from 0, one for each of {n} samples"
    try:
        values = np.asarray(c)
    except ValueError as error:  # lists of several lengths
        raise UserError(rule) from error
    if values.dtype.kind not in "iu":
        raise UserError(f"{rule}, and these are of dtype {values.dtype}")
    if values.shape != (n,) or values.min() < 0:
        raise UserError(rule)
    return torch.from_numpy(values.astype(np.int64))
