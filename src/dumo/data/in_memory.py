"""Images or points that Python gave to `dumo.train`: an array, or a data set of torch's or of Hugging Face's.

`Memory.of` reads samples, labels and names of classes, brings them to tensors in dumo's layout and range, remembers
the source in `SOURCES` by its digest, and returns the spec. `Memory.open` looks the source up, so it needs the same
process.

A `datasets.Dataset` of colour images is not read in advance: its encoded images are decoded when they are asked for. A
data set whose rows change between two reads, as with random augmentation, is read anew at each visit (`RereadData`).
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

_IMAGE_CHANNELS = (1, 3)  # grey, colour
_ROWS_READ_TWICE = 16  # to see whether they change: a flip with p = 1/2 is missed once in 65,536 times
_ROUNDING = 1e-4  # by which floats may lie outside [-1, 1]
_IMAGE_KEYS = ("image", "img", "pixel_values")  # of a row of Hugging Face datasets
_LABEL_KEYS = ("label", "labels", "fine_label")  # of a row of Hugging Face datasets
_GREY_MODES = ("1", "L")  # of PIL, whose pictures keep one channel; those of "F" hold numbers, which are taken as given
_KEPT_BYTES = 2 * GIGABYTE  # of the pixels of a `datasets.Dataset`
SOURCES: dict[str, "TensorData | Source"] = {}  # what this process was given, by digest


@dataclass(frozen=True)
class RereadData(TensorData):
    """A data set of Python that gives a row another sample at each read: batches read it anew.

    `x` has the first sample of each row, for what compares with the data. What a row gives is drawn by the data set,
    with generators of its own, so a resumed run meets other draws.
    """

    data_set: Any = None  # data_set[i] is its row i
    lock: Lock = field(default_factory=Lock)  # batches are made by several threads, and data sets may not allow that

    def batch(self, step: int, batch_size: int, seed: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The rows of a step, read now. Raises UserError for a sample of another shape, or beyond [-1, 1]."""
        numbers = self.numbers(step, batch_size, seed, rows)
        tensors: list[Tensor] = []
        with self.lock:
            for i in numbers.tolist():
                tensors.append(_read_sample(self.data_set, i))
        shapes = {tuple(tensor.shape) for tensor in tensors}
        x = torch.empty(0)  # of no sample's shape
        if len(shapes) == 1:
            x = _to_layout(torch.stack(tensors))
        if x.shape[1:] != self.x.shape[1:]:
            raise UserError(
                f"rows of the data have shape {', '.join(map(str, shapes))}, and gave {tuple(self.x.shape[1:])} "
                "when they were read first: bring all to one size"
            )
        x = _to_float32(x)
        if x.ndim == 4 and x.abs().max() > 1 + _ROUNDING:
            raise UserError(f"a row of the data reaches {x.abs().max():.3g}, and images lie in [-1, 1]")
        return x, self.c[numbers]

    def fingerprint(self) -> str:
        """A digest of the classes, the number and the shape of the rows: their samples are others at each read."""
        return digest.short("reread", str(tuple(self.x.shape)), digest.of_tensor(self.c))


class Memory(Spec):
    """Samples in memory, there while the process lives."""

    kind: Literal["memory"] = "memory"
    name: str  # of the type that was given
    shape: tuple[int, ...]  # of a sample
    classes: int = Field(ge=0)
    names: tuple[str, ...] = ()  # of the classes
    # Of all samples: training resumes with the same alone (run.yaml). Where rows are others at each read, of what does
    # not change (`RereadData.fingerprint`): two such data sets may share it, and `open` then gives the one read last.
    digest: str = Field(json_schema_extra=FREE)
    captions: ClassVar[None] = None
    augment: ClassVar[None] = None

    @classmethod
    def of(cls, data: Any, bar: Bar = no_bar) -> "Memory":  # noqa: ANN401, what a notebook has
        """Read and remember an array, a pair (array, labels), or a map-style data set of samples, or of such pairs.

        Images are (n, channels, height, width), channels last, or grey without channels, as uint8 or floats in
        [-1, 1]; data sets may give PIL images. Points are (n, d). A data set whose rows change between two reads is
        read again at each visit, which a line says. Raises UserError for anything else.
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
                f"{name_of(type(data))} gives other samples at each read, as augmentation does: training reads rows "
                "anew at each visit, and a resumed run meets other draws"
            )
        return cls._remember(source, name_of(type(data)), tuple(x.shape[1:]), classes, names)

    @classmethod
    def _of_dataset(cls, rows: DatasetRows, bar: Bar) -> "Memory":
        """Remember the colour images of a `datasets.Dataset`, all of one size. Says which columns are not used."""
        class_columns = [name for name in _LABEL_KEYS if name in rows.columns()]
        if not class_columns and len(rows.class_names) == 1:
            class_columns = [*rows.class_names]
        labels = labels_of(rows, class_columns[0]) if class_columns else None
        unused = [name for name in (*rows.class_names, *CAPTION_COLUMNS) if name in rows.columns()]
        unused = [name for name in unused if name not in class_columns[:1]]
        if unused:
            line_printer(bar)(
                f"the columns {', '.join(unused)} of the data are not used: classes are read from a column 'label', "
                "captions from a folder or parquet files"
            )
        width, height = load_upright(rows.read(0)).size
        source = Source(rows, SameSize(height, width, "none", rows.path(0)), labels)
        source.keep_decoded(_KEPT_BYTES, now=False)
        count = labels.count if labels else 0
        return cls._remember(source, name_of(type(rows.data)), (3, height, width), count, source.names)

    @classmethod
    def _remember(
        cls, source: TensorData | Source, name: str, shape: tuple[int, ...], classes: int, names: tuple[str, ...]
    ) -> "Memory":
        """The spec of a source, which is kept for `open`."""
        fingerprint = source.fingerprint()
        SOURCES[fingerprint] = source
        return cls(name=name, shape=shape, classes=classes, names=names, digest=fingerprint)

    @property
    def labels(self) -> int:
        """The number of classes."""
        return self.classes

    def open(self) -> TensorData | Source:
        """All samples. Raises UserError where this process was not given them."""
        if self.digest not in SOURCES:
            raise UserError(
                f"the data are a {self.name} of Python that this process does not have: give the same in Python, "
                "dumo.train(RUN, data=...) or dumo.load(RUN, data=...)"
            )
        return SOURCES[self.digest]

    def originals(self) -> TensorData | Source:
        """All samples: they have no captions. Raises UserError where this process was not given them."""
        return self.open()


def _read(data: Any, bar: Bar) -> tuple[Any, Any, tuple[str, ...]]:  # noqa: ANN401
    """Samples as they were given, their labels or None, and the names of the classes.

    Arrays are returned as they are, rows of a data set as one tensor. Raises UserError for what is no data.
    """
    if isinstance(data, Tensor | np.ndarray):
        return data, None, ()
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        return *data, ()
    total = _count_rows(data)
    tensors: list[Tensor] = []
    labels: list[Any] = []
    with bar("reading the data", total) as tick:
        for i in range(total):  # not every data set ends by itself
            signals.check()
            sample, label = _sample_and_label(data[i])
            tensors.append(_to_tensor(sample, f"row {i} of the data"))
            labels.append(label)
            has_other_shape = tensors[i].shape != tensors[0].shape
            lacks_label = (label is None) != (labels[0] is None)
            if has_other_shape or lacks_label:
                raise UserError(
                    f"row {i} of the data has shape {tuple(tensors[i].shape)}, row 0 {tuple(tensors[0].shape)}, and "
                    "all or none have a label: bring all to one size, or give a folder of images"
                )
            tick(i + 1, "")
    has_labels = labels[0] is not None
    return torch.stack(tensors), labels if has_labels else None, _class_names(data)


def _read_sample(data_set: Any, i: int) -> Tensor:  # noqa: ANN401
    """The sample in row i of a data set, as it is. Raises UserError for what holds no numbers."""
    sample, _ = _sample_and_label(data_set[i])
    return _to_tensor(sample, f"row {i} of the data")


def _count_rows(data: Any) -> int:  # noqa: ANN401
    """The number of rows of a data set. Raises UserError for what has no rows by number, such as a loader or a stream.

    A table of pandas has a length, and columns in place of rows.
    """
    try:
        total = len(data)
        data[0]
    except (TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"data is a {name_of(type(data))}, which has no rows by number: give a folder, an array, a pair (array, "
            "labels), or a data set with a length and rows; of a DataLoader its dataset, of a stream list(...)"
        ) from error
    return total


def _gives_other_samples(data_set: Any, x: Tensor) -> bool:  # noqa: ANN401
    """Whether some rows of a data set, read again, differ from the samples x (n, ...) that were read before."""
    numbers = torch.linspace(0, len(x) - 1, min(len(x), _ROWS_READ_TWICE)).long()
    for i in numbers.tolist():
        sample = _read_sample(data_set, i)
        if sample.shape != x[i].shape or not torch.equal(sample, x[i]):
            return True
    return False


def _class_names(data: Any) -> tuple[str, ...]:  # noqa: ANN401
    """The names of the classes that a data set of torchvision's, or of Hugging Face's, has; () where it has none."""
    classes = getattr(data, "classes", ())
    if classes and isinstance(classes, list | tuple):
        return tuple(str(name) for name in classes)
    features: Any = getattr(data, "features", None) or {}
    for key in _LABEL_KEYS:
        if key in features:
            return tuple(getattr(features[key], "names", ()))
    return ()


def _sample_and_label(row: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """The sample in a row of a data set, and its label or None. Raises UserError for a mapping without an image."""
    if isinstance(row, dict):
        image = _first_of(row, _IMAGE_KEYS)
        if image is None:
            raise UserError(f"a row of the data has {', '.join(map(str, row))}: none is {' or '.join(_IMAGE_KEYS)}")
        return image, _first_of(row, _LABEL_KEYS)
    if isinstance(row, tuple | list) and len(row) == 2:
        return row[0], row[1]
    if isinstance(row, tuple) and len(row) == 1:  # of a TensorDataset of images alone
        return row[0], None
    return row, None


def _first_of(row: dict[Any, Any], keys: tuple[str, ...]) -> Any:  # noqa: ANN401
    """The value of the first key that a row has; None where it has none."""
    for key in keys:
        if key in row:
            return row[key]
    return None


def _to_tensor(values: Any, name: str) -> Tensor:  # noqa: ANN401
    """An array, picture or list of numbers as a tensor on the CPU.

    Raises UserError, with `name`, for what holds no numbers.
    """
    if isinstance(values, Tensor):
        return values.cpu()
    if isinstance(values, Image.Image) and values.mode != "F":
        values = _to_colours(values, name)
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


def _to_colours(picture: Image.Image, name: str) -> Image.Image:
    """A picture upright in grey or RGB, as one looks at it. Raises UserError, with `name`, where its range is unknown.

    Pixels of a palette are numbers of its colours, and pictures in CMYK, or with transparency, have four channels.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in _GREY_MODES:
        return picture.convert("L")
    try:
        return to_rgb(picture)
    except Unreadable as error:
        raise UserError(f"{name} {error}") from error


def _to_samples(x: Tensor | np.ndarray) -> Tensor:
    """Float32 points (n, d), or images (n, 1 or 3, h, w) in [-1, 1]. Raises UserError for other shapes and ranges."""
    is_uint8 = x.dtype in (torch.uint8, np.uint8)
    x = _to_float32(_to_layout(_to_tensor(x, "data")))
    low = x.min().item()
    high = x.max().item()
    is_image = x.ndim == 4
    # Images without negative numbers are taken to be in [0, 1].
    is_in_range = -1 - _ROUNDING <= low < 0 and high <= 1 + _ROUNDING
    if is_image and not is_uint8 and not is_in_range:
        raise UserError(
            f"data are floats from {low:.3g} to {high:.3g}, and images lie in [-1, 1]: give 2 * x - 1 where they are "
            "from 0 to 1, or uint8 colours"
        )
    return x


def _to_layout(x: Tensor) -> Tensor:
    """Points (n, d) as they are, images as (n, 1 or 3, h, w). Raises UserError for other shapes."""
    if x.ndim == 3:
        x = x.unsqueeze(1)  # grey
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
    """uint8 colours of images in [-1, 1], and finite floats as they are, in float32. Raises UserError for all else."""
    if x.dtype == torch.uint8 and x.ndim == 4:
        return from_uint8(x).contiguous()
    if not x.is_floating_point() or not x.isfinite().all():
        raise UserError(f"data holds {x.dtype} or what is no number: give uint8 colours, or finite floats in [-1, 1]")
    return x.float().contiguous()


def _to_labels(labels: Any, n: int) -> Tensor:  # noqa: ANN401
    """Class numbers (n,), all 0 where `labels` is None. Raises UserError for labels that are no classes, or not n."""
    if labels is None:
        return torch.zeros(n, dtype=torch.long)
    rule = f"labels are whole numbers from 0, one for each of {n} samples"
    try:
        values = np.asarray(_to_cpu(labels))
    except ValueError as error:  # lists of several lengths
        raise UserError(rule) from error
    if values.dtype.kind not in "iu":
        raise UserError(f"{rule}, and these are of dtype {values.dtype}")
    if values.shape != (n,) or values.min() < 0:
        raise UserError(rule)
    return torch.from_numpy(values.astype(np.int64))


def _to_cpu(labels: Any) -> Any:  # noqa: ANN401
    """Labels with their tensors on the CPU, one tensor or some in a list: NumPy reads no others."""
    if isinstance(labels, Tensor):
        return labels.cpu()
    if isinstance(labels, list | tuple):
        return [_to_cpu(label) for label in labels]
    return labels
