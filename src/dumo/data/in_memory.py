"""Data passed to `dumo.train` from Python: arrays, and data sets of PyTorch or Hugging Face.

`Memory.of` reads samples, labels and class names, converts them to tensors in dumo's layout and range, registers the
source in `SOURCES` by its digest, and returns the spec. `Memory.open` looks it up, so it needs the same process.

Colour images of a `datasets.Dataset` are decoded on demand. A data set whose rows change between two reads, as with
random augmentation, is read again for each batch (`RereadData`).
"""

from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from dumo.data.images import Source, labels_of, number_labels
from dumo.data.pixel import SameSize, Unreadable, load_upright, to_rgb
from dumo.data.rows import CAPTION_COLUMNS, DatasetRows, is_dataset
from dumo.io import digest
from dumo.io.data_source import TensorData
from dumo.io.picture import from_uint8
from dumo.runtime import signals
from dumo.runtime.limits import GIGABYTE
from dumo.runtime.progress import Bar, line_printer, no_bar
from dumo.types import FREE, Spec, UserError
from dumo.types.outside import name_of

# Grey and colour.
_IMAGE_CHANNELS = (1, 3)
# Rows read twice to detect changes. A flip with p = 1/2 is missed once in 65,536 times.
_ROWS_READ_TWICE = 16
# Tolerance of the range [-1, 1] of floats.
_ROUNDING = 1e-4
# Columns of images and labels in Hugging Face data sets.
_IMAGE_KEYS = ("image", "img", "pixel_values")
_LABEL_KEYS = ("label", "labels", "fine_label")
# PIL modes that keep one channel. Mode "F" has floats, which are not converted.
_GREY_MODES = ("1", "L")
# Decoded pixels of a `datasets.Dataset` are kept up to this size.
_KEPT_BYTES = 2 * GIGABYTE
# The data passed to this process, by digest.
SOURCES: dict[str, "TensorData | Source"] = {}


@dataclass(frozen=True)
class RereadData(TensorData):
    """A data set whose rows change at each read, as with random augmentation. Batches read it again.

    `x` has the first sample of each row, as the reference. The data set's random generators are not saved, so a resumed
    run has different draws. The lock serializes reads, since data sets may not be thread-safe.
    """

    data_set: Any = None
    lock: Lock = field(default_factory=Lock)

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Read the rows of a step. Raises UserError if a sample has another shape, or values outside [-1, 1]."""
        numbers = self.numbers(step, batch_size, seed, rows)
        tensors: list[Tensor] = []
        with self.lock:
            for i in numbers.tolist():
                tensors.append(_read_sample(self.data_set, i))
        shapes = {tuple(tensor.shape) for tensor in tensors}
        # An empty tensor fails the comparison of shapes below.
        x = torch.empty(0)
        if len(shapes) == 1:
            x = _to_layout(torch.stack(tensors))
        if x.shape[1:] != self.x.shape[1:]:
            raise UserError(
                f"rows of the data have shape {', '.join(map(str, shapes))}, but {tuple(self.x.shape[1:])} when first "
                "read: resize all to one size"
            )
        x = _to_float32(x)
        if x.ndim == 4 and x.abs().max() > 1 + _ROUNDING:
            raise UserError(f"a row of the data has the value {x.abs().max():.3g}: scale images to [-1, 1]")
        return x, self.c[numbers]

    def fingerprint(self) -> str:
        """Return a digest of the classes, the number and the shape of the rows, since samples change at each read."""
        return digest.short("reread", str(tuple(self.x.shape)), digest.of_tensor(self.c))


class Memory(Spec):
    """Samples in the memory of this process."""

    kind: Literal["memory"] = "memory"
    # The type of the Python object.
    name: str
    # The shape of a sample.
    shape: tuple[int, ...]
    classes: int = Field(ge=0)
    # The names of the classes.
    names: tuple[str, ...] = ()
    # The digest of all samples, which must be equal to resume training. For `RereadData`, it only covers what does not
    # change: two such data sets may have the same digest, and `open` then returns the one read last.
    digest: str = Field(json_schema_extra=FREE)
    captions: ClassVar[None] = None
    augment: ClassVar[None] = None

    @classmethod
    def of(cls, data: Any, bar: Bar = no_bar) -> "Memory":  # noqa: ANN401, what a notebook has
        """Read and register an array, a pair (array, labels), or a map-style data set of samples or (sample, label).

        Images are (n, channels, height, width), channels last, or grey without channels, as uint8 or floats in
        [-1, 1]; data sets may return PIL images. Points are (n, d). If rows change between two reads, a message is
        printed and the data set is read again for each batch. Raises UserError for other data.
        """
        if is_dataset(data):
            rows = DatasetRows(data)
            if load_upright(rows.read(0)).mode not in _GREY_MODES:
                return cls._of_dataset(rows, bar)
            data = rows.data
        raw_x, raw_labels, names = _read(data, bar)
        x = _to_samples(raw_x)
        c = _to_labels(raw_labels, len(raw_x))
        classes = 0
        if raw_labels is not None:
            classes = number_labels(c.tolist(), "the data", names).count
        source = TensorData(x, c)
        is_data_set = raw_x is not data and not isinstance(data, tuple)
        if is_data_set and _gives_other_samples(data, raw_x):
            source = RereadData(x, c, data_set=data)
            line_printer(bar)(
                f"{name_of(type(data))} returns different samples at each read, as with augmentation: training reads "
                "rows again for each batch, and a resumed run has different draws"
            )
        return cls._register(source, name_of(type(data)), tuple(x.shape[1:]), classes, names)

    @classmethod
    def _of_dataset(cls, rows: DatasetRows, bar: Bar) -> "Memory":
        """Register the colour images of a `datasets.Dataset`, all of one size. Prints the unused columns."""
        class_columns = [name for name in _LABEL_KEYS if name in rows.columns()]
        if not class_columns and len(rows.class_names) == 1:
            class_columns = [*rows.class_names]
        labels = labels_of(rows, class_columns[0]) if class_columns else None
        unused = [name for name in (*rows.class_names, *CAPTION_COLUMNS) if name in rows.columns()]
        unused = [name for name in unused if name not in class_columns[:1]]
        if unused:
            line_printer(bar)(
                f"the columns {', '.join(unused)} of the data are not used: classes are read from a column 'label', "
                "and captions from a folder or parquet files"
            )
        width, height = load_upright(rows.read(0)).size
        source = Source(rows, SameSize(height, width, "none", rows.path(0)), labels)
        source.keep_decoded(_KEPT_BYTES, now=False)
        count = labels.count if labels else 0
        return cls._register(source, name_of(type(rows.data)), (3, height, width), count, source.names)

    @classmethod
    def _register(
        cls, source: TensorData | Source, name: str, shape: tuple[int, ...], classes: int, names: tuple[str, ...]
    ) -> "Memory":
        """Register a source for `open`, and return its spec."""
        fingerprint = source.fingerprint()
        SOURCES[fingerprint] = source
        return cls(name=name, shape=shape, classes=classes, names=names, digest=fingerprint)

    @property
    def labels(self) -> int:
        """The number of classes."""
        return self.classes

    def open(self) -> TensorData | Source:
        """Return all samples. Raises UserError if they were not passed to this process."""
        if self.digest not in SOURCES:
            raise UserError(
                f"the data is a Python {self.name} that was not passed to this process: pass it again in Python, "
                "dumo.train(RUN, data=...) or dumo.load(RUN, data=...)"
            )
        return SOURCES[self.digest]

    def originals(self) -> TensorData | Source:
        """Return all samples, as `open`. They have no captions."""
        return self.open()


def _read(data: Any, bar: Bar) -> tuple[Any, Any, tuple[str, ...]]:  # noqa: ANN401
    """Return samples, their labels or None, and the names of the classes.

    Arrays are returned unchanged, and rows of a data set as one tensor. Raises UserError for other objects.
    """
    if isinstance(data, Tensor | np.ndarray):
        return data, None, ()
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return *data, ()
    total = _count_rows(data)
    tensors: list[Tensor] = []
    labels: list[Any] = []
    with bar("reading the data", total) as tick:
        # Some data sets raise no IndexError at their end, so do not iterate over them.
        for i in range(total):
            signals.check()
            sample, label = _sample_and_label(data[i])
            tensors.append(_to_tensor(sample, f"row {i} of the data"))
            labels.append(label)
            if tensors[i].shape != tensors[0].shape:
                raise UserError(
                    f"row {i} of the data has shape {tuple(tensors[i].shape)}, but row 0 has "
                    f"{tuple(tensors[0].shape)}: resize all rows to one size, or use a folder of images"
                )
            if (label is None) != (labels[0] is None):
                raise UserError(f"only one of rows 0 and {i} of the data has a label: label all rows, or none")
            tick(i + 1, "")
    has_labels = labels[0] is not None
    return torch.stack(tensors), labels if has_labels else None, _class_names(data)


def _read_sample(data_set: Any, i: int) -> Tensor:  # noqa: ANN401
    """Return the sample in row i of a data set. Raises UserError if it is not numeric."""
    sample, _ = _sample_and_label(data_set[i])
    return _to_tensor(sample, f"row {i} of the data")


def _count_rows(data: Any) -> int:  # noqa: ANN401
    """Return the number of rows of a data set. Raises UserError if rows cannot be indexed, as in a loader or a stream.

    A pandas table has a length, but its indices are columns.
    """
    try:
        total = len(data)
        data[0]
    except (TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"data is a {name_of(type(data))}, whose rows cannot be indexed: give a folder, an array, a pair (array, "
            "labels), or a map-style data set (the dataset of a DataLoader, list(...) of a stream)"
        ) from error
    return total


def _gives_other_samples(data_set: Any, x: Tensor) -> bool:  # noqa: ANN401
    """Whether some rows of a data set, read again, differ from the samples x (n, ...) read before."""
    numbers = torch.linspace(0, len(x) - 1, min(len(x), _ROWS_READ_TWICE)).long()
    for i in numbers.tolist():
        sample = _read_sample(data_set, i)
        if sample.shape != x[i].shape or not torch.equal(sample, x[i]):
            return True
    return False


def _class_names(data: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Return the class names of a torchvision or Hugging Face data set; () if it has none."""
    classes = getattr(data, "classes", ())
    if classes and isinstance(classes, list | tuple):
        return tuple(str(name) for name in classes)
    features: Any = getattr(data, "features", None) or {}
    for key in _LABEL_KEYS:
        if key in features:
            return tuple(getattr(features[key], "names", ()))
    return ()


def _sample_and_label(row: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """Return the sample and the label or None of a row. Raises UserError if a mapping has no image."""
    if isinstance(row, dict):
        image = _first_of(row, _IMAGE_KEYS)
        if image is None:
            raise UserError(
                f"a row of the data has {', '.join(map(str, row))}: name the images {' or '.join(_IMAGE_KEYS)}"
            )
        return image, _first_of(row, _LABEL_KEYS)
    if isinstance(row, tuple | list) and len(row) == 2:
        return row[0], row[1]
    # A TensorDataset without labels returns tuples of one tensor.
    if isinstance(row, tuple) and len(row) == 1:
        return row[0], None
    return row, None


def _first_of(row: dict[Any, Any], keys: tuple[str, ...]) -> Any:  # noqa: ANN401
    """Return the value of the first key that a row has; None if it has none."""
    for key in keys:
        if key in row:
            return row[key]
    return None


def _to_tensor(values: Any, name: str) -> Tensor:  # noqa: ANN401
    """Convert an array, picture or list of numbers to a tensor on the CPU.

    Raises UserError, with `name`, if it is not numeric.
    """
    if isinstance(values, Tensor):
        return values.cpu()
    if isinstance(values, Image.Image) and values.mode != "F":
        values = _to_colours(values, name)
    try:
        array = values if isinstance(values, np.ndarray) else np.array(values)
    except ValueError as error:
        # The lists have different lengths.
        raise UserError(f"{name} is not an array ({error}): give rows of one shape") from error
    # torch has no negative strides.
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        # torch has no objects, strings or foreign byte orders.
        raise UserError(
            f"{name} is an array of dtype {array.dtype}, which torch does not support: give uint8 colours, or finite "
            "floats in [-1, 1]"
        ) from error


def _to_colours(picture: Image.Image, name: str) -> Image.Image:
    """Convert a picture to upright grey or RGB. Raises UserError, with `name`, if its range is unknown.

    Palette, CMYK and transparent pictures are converted to RGB.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in _GREY_MODES:
        return picture.convert("L")
    try:
        return to_rgb(picture)
    except Unreadable as error:
        raise UserError(f"{name} {error}") from error


def _to_samples(x: Tensor | np.ndarray) -> Tensor:
    """Convert to float32 points (n, d) or images (n, 1 or 3, h, w) in [-1, 1]. Raises UserError if that fails."""
    is_uint8 = x.dtype in (torch.uint8, np.uint8)
    x = _to_float32(_to_layout(_to_tensor(x, "data")))
    low = x.min().item()
    high = x.max().item()
    is_image = x.ndim == 4
    # Images without negative numbers are assumed to be in [0, 1].
    is_in_range = -1 - _ROUNDING <= low < 0 and high <= 1 + _ROUNDING
    if is_image and not is_uint8 and not is_in_range:
        raise UserError(
            f"data are floats from {low:.3g} to {high:.3g}, but images must be in [-1, 1]: give 2 * x - 1 if they are "
            "from 0 to 1, or uint8 colours"
        )
    return x


def _to_layout(x: Tensor) -> Tensor:
    """Return points (n, d) unchanged, and images as (n, 1 or 3, h, w). Raises UserError for other shapes."""
    if x.ndim == 3:
        x = x.unsqueeze(1)
    if x.ndim == 4 and x.shape[1] not in _IMAGE_CHANNELS and x.shape[3] in _IMAGE_CHANNELS:
        x = x.permute(0, 3, 1, 2)
    is_image = x.ndim == 4 and x.shape[1] in _IMAGE_CHANNELS
    is_point = x.ndim == 2
    if not (is_image or is_point) or not len(x):
        raise UserError(
            f"data has shape {tuple(x.shape)}: give images (n, 1 or 3, height, width), or points (n, numbers)"
        )
    return x


def _to_float32(x: Tensor) -> Tensor:
    """Convert uint8 images to [-1, 1], and finite floats to float32. Raises UserError for other values."""
    if x.dtype == torch.uint8 and x.ndim == 4:
        return from_uint8(x).contiguous()
    if not x.is_floating_point() or not x.isfinite().all():
        raise UserError(f"data are {x.dtype} or not finite: give uint8 colours, or finite floats in [-1, 1]")
    return x.float().contiguous()


def _to_labels(labels: Any, n: int) -> Tensor:  # noqa: ANN401
    """Return class numbers (n,), all 0 if `labels` is None. Raises UserError if they are not n whole numbers from 0."""
    if labels is None:
        return torch.zeros(n, dtype=torch.long)
    rule = f"labels must be whole numbers from 0, one for each of {n} samples"
    try:
        values = np.asarray(_to_cpu(labels))
    except ValueError as error:
        # The lists have different lengths.
        raise UserError(rule) from error
    if values.dtype.kind not in "iu":
        raise UserError(f"{rule}, but these have dtype {values.dtype}")
    if values.shape != (n,) or values.min() < 0:
        raise UserError(rule)
    return torch.from_numpy(values.astype(np.int64))


def _to_cpu(labels: Any) -> Any:  # noqa: ANN401
    """Move labels, a tensor or a list with tensors, to the CPU, which NumPy needs."""
    if isinstance(labels, Tensor):
        return labels.cpu()
    if isinstance(labels, list | tuple):
        return [_to_cpu(label) for label in labels]
    return labels
