"""Images or points that Python gave to `dumo.train`: an array, or a data set of torch's, held in memory.

`Memory.of` reads them: it finds samples, labels and names of classes, brings them to tensors, and remembers these in
`TABLES` by their digest. `Memory`, the spec, has the digest alone; `Memory.open` looks it up, in the same process.
"""

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
IMAGE_KEYS = ("image", "img", "pixel_values")  # of a row of Hugging Face datasets
LABEL_KEYS = ("label", "labels", "fine_label")  # of a row of Hugging Face datasets
TABLES: dict[str, TensorData] = {}  # what this process was given, by digest


class Memory(Spec):
    """Samples in memory, there while the process lives."""

    kind: Literal["memory"] = "memory"
    name: str  # of the type that was given
    shape: tuple[int, ...]  # of a sample
    classes: int = Field(ge=0)
    names: tuple[str, ...] = ()  # of the classes
    digest: str = Field(json_schema_extra=FREE)  # of all samples; training resumes with the same alone (data.json)
    captions: ClassVar[None] = None
    augment: ClassVar[None] = None

    @classmethod
    def of(cls, data: Any) -> "Memory":  # noqa: ANN401, what a notebook has
        """Read and remember an array, a pair (array, labels), or a map-style data set of samples, or of such pairs.

        Images are (n, channels, height, width), channels last, or grey without channels, as uint8 or floats in
        [-1, 1]; data sets may give PIL images. Points are (n, d). Raises UserError for anything else.
        """
        x, c, names = _read(data)
        table = TensorData(_samples(x), _labels(c, len(x)))
        classes = 0 if c is None else max(int(table.c.max()) + 1, len(names))
        digest = table.fingerprint()
        TABLES[digest] = table
        return cls(
            name=name_of(type(data)), shape=tuple(table.x.shape[1:]), classes=classes, names=names, digest=digest
        )

    @property
    def labels(self) -> int:
        """The number of classes."""
        return self.classes

    def open(self) -> TensorData:
        """All samples. Raises UserError where this process was not given them."""
        if self.digest not in TABLES:
            raise UserError(
                f"the data are a {self.name} of Python that this process does not have: give the same in Python, "
                "dumo.train(RUN, data=...) or dumo.load(RUN, data=...)"
            )
        return TABLES[self.digest]

    def originals(self) -> TensorData:
        """All samples: they have no captions. Raises as `open`."""
        return self.open()


def _read(data: Any) -> tuple[Any, Any, tuple[str, ...]]:  # noqa: ANN401
    """Samples, labels or None, and the names of the classes. Raises UserError for what is no data."""
    if isinstance(data, Tensor | np.ndarray):
        return data, None, ()
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return *data, ()
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
        raise UserError(
            f"data is a {name_of(type(data))}: give a folder, an array, a pair (array, labels), or a data set with a "
            "length and rows"
        )
    tensors: list[Tensor] = []
    labels: list[Any] = []
    for i in range(len(data)):  # not every data set ends by itself
        sample, label = _sample_and_label(data[i])
        tensors.append(_tensor(sample, f"row {i} of the data"))
        labels.append(label)
        if tensors[i].shape != tensors[0].shape or (label is None) != (labels[0] is None):
            raise UserError(
                f"row {i} of the data has shape {tuple(tensors[i].shape)}, row 0 {tuple(tensors[0].shape)}, and "
                "all or none have a label: bring all to one size, or give a folder of images"
            )
    return torch.stack(tensors), None if labels[0] is None else labels, _class_names(data)


def _class_names(data: Any) -> tuple[str, ...]:  # noqa: ANN401
    """The names of the classes that a data set of torchvision's, or of Hugging Face's, has; () where it has none."""
    classes = getattr(data, "classes", ())
    if classes:
        return tuple(str(name) for name in classes)
    features: Any = getattr(data, "features", None) or {}
    for key in LABEL_KEYS:
        if key in features:
            return tuple(getattr(features[key], "names", ()))
    return ()


def _sample_and_label(row: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """The sample in a row of a data set, and its label or None. Raises UserError for a mapping without an image."""
    if isinstance(row, dict):
        image = _first_of(row, IMAGE_KEYS)
        if image is None:
            raise UserError(f"a row of the data has {', '.join(map(str, row))}: none is {' or '.join(IMAGE_KEYS)}")
        return image, _first_of(row, LABEL_KEYS)
    if isinstance(row, tuple | list) and len(row) == 2:
        return row[0], row[1]
    return row, None


def _first_of(row: dict[Any, Any], keys: tuple[str, ...]) -> Any:  # noqa: ANN401
    """The value of the first key that a row has; None where it has none."""
    for key in keys:
        if key in row:
            return row[key]
    return None


def _tensor(values: Any, name: str) -> Tensor:  # noqa: ANN401
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


def _samples(x: Tensor | np.ndarray) -> Tensor:
    """Float32 points (n, d), or images (n, 1 or 3, h, w) in [-1, 1]. Raises UserError for other shapes and ranges."""
    x = _tensor(x, "data")
    if x.ndim == 3:
        x = x.unsqueeze(1)  # grey
    if x.ndim == 4 and x.shape[1] not in CHANNELS and x.shape[3] in CHANNELS:
        x = x.permute(0, 3, 1, 2)
    if x.ndim not in (2, 4) or not len(x) or (x.ndim == 4 and x.shape[1] not in CHANNELS):
        raise UserError(
            f"data has shape {tuple(x.shape)}: give images (n, 1 or 3, height, width), or points (n, numbers)"
        )
    is_image = x.ndim == 4
    if x.dtype == torch.uint8 and is_image:
        return from_uint8(x).contiguous()
    if not x.is_floating_point() or not x.isfinite().all():
        raise UserError(f"data holds {x.dtype} or what is no number: give uint8 colours, or finite floats in [-1, 1]")
    low = x.min().item()
    high = x.max().item()
    if is_image and not (-1 <= low < 0 and high <= 1):
        raise UserError(
            f"data are floats from {low:.3g} to {high:.3g}, and images lie in [-1, 1]: give 2 * x - 1 where they are "
            "from 0 to 1, or uint8 colours"
        )
    return x.float().contiguous()


def _labels(c: Any, n: int) -> Tensor:  # noqa: ANN401
    """Class numbers (n,), all 0 where `c` is None. Raises UserError for labels that are no classes, or not n."""
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
