"""Evaluate existing images with the same scores and card as samples of a run.

`judge`, which `dumo evaluate --images` calls, opens the images (`open_images`), completes the protocol with their
number and shape, finds the reference images, hashes the images, scores them, and writes the report.

Images are read as in pytorch-fid, torch-fidelity and clean-fid (`Image.convert("RGB")`): grey becomes three equal
channels, and pillow keeps the high byte of 16-bit colours. There are three differences. Images are rotated by their
EXIF tag. 16-bit grey is rounded to 8 bits, as samples are; the other evaluators clip almost all of it to white.
Transparent images are drawn on white. Images are neither resized nor cropped, because resizing changes the FID (Parmar
et al. 2022, arXiv 2104.11222), so all must have the same size.

The images of a reference folder are cropped and resized to the size of the evaluated images, in the same way as a run's
data (`dumo.data.pixel.crop_middle`). A folder therefore has the same hash as the reference of a run and of images, and
both reports can be compared.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from dumo.config.load import parse
from dumo.config.overrides import override
from dumo.config.suggestion import require_known
from dumo.data import Digits, Images, pixel
from dumo.data.images import Labels, Source, labels_of
from dumo.data.rows import open_rows
from dumo.encoders import vision
from dumo.evaluation import Context, ImageProtocol, MetricProtocol
from dumo.evaluation.bundled import BundledKind
from dumo.evaluation.npz import NpzImages
from dumo.evaluation.protocol import ImageTick
from dumo.evaluation.reference import BATCH_SIZE, InceptionKind, hash_images, with_progress
from dumo.io.data_source import Data
from dumo.io.picture import to_uint8
from dumo.io.read import first_few, user_path, write_json
from dumo.report.evaluation_card import Card
from dumo.run.judge import bar_while_reading
from dumo.runtime import dist, signals
from dumo.runtime.device import choose_device, software_versions
from dumo.runtime.limits import GIGABYTE
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.runtime.random import stream
from dumo.types import Spec, UserError

# A protocol that needs no download.
DEFAULT_KIND = "photos"
# Protocols that compute class scores if images and reference have the same classes.
CLASSES_KINDS = ("photos", "cifar10-features")
DIGIT_NUMERALS = tuple("0123456789")
# Protocols for images without captions.
KINDS = sorted({*get_args(InceptionKind), *get_args(BundledKind), *get_args(vision.FeatureKind)} - {"toy"})
# The size of the cache of decoded pixels, equal to that of a run's data.
MEMORY_BYTES = 2 * GIGABYTE

# Sample indices (n,), and images (n, channels, height, width) in [-1, 1].
Batch = tuple[Tensor, Tensor]


class _ProtocolOnly(Spec):
    """The part of a run's `evaluate` that applies to existing images."""

    protocol: MetricProtocol


class _ImagesSettings(Spec):
    """The fields that overrides may set: those of the protocol and of the reference data."""

    evaluate: _ProtocolOnly
    data: Images | None = None


@dataclass(frozen=True)
class ImageSet:
    """The images of a folder or file."""

    # Reads images by row.
    source: Source | NpzImages
    # (3, height, width).
    shape: tuple[int, ...]
    # None if there are no classes.
    labels: Labels | None
    # The name of the image in a row, for messages.
    name: Callable[[int], str]
    # The reason why the classes cannot be read.
    label_problem: str = ""

    def batches(self, total: int, channels: int) -> Iterator[Batch]:
        """Yield this rank's batches of `total` chosen images: sample indices (n,), and images in [-1, 1].

        The images are (n, channels, height, width). The sample index is the position among the `total` images. Batches
        do not depend on the number of ranks. Raises UserError for colour images if `channels` is 1, and for an image
        that is unreadable or of another size.
        """
        not_selected = -1
        sample_index_by_row = torch.full((len(self.source),), not_selected)
        sample_index_by_row[self.chosen_rows(total)] = torch.arange(total)

        # Blocks of BATCH_SIZE rows are assigned to ranks round-robin, so that batches do not depend on the number of
        # ranks. A rank without a block yields an empty batch, because the other ranks wait for it.
        num_rows = len(sample_index_by_row)
        first_rows: Sequence[int] = range(dist.rank() * BATCH_SIZE, num_rows, dist.world() * BATCH_SIZE)
        for first in first_rows or [num_rows]:
            signals.check()
            sample_indices = sample_index_by_row[first : first + BATCH_SIZE]
            is_selected = sample_indices != not_selected
            x, _ = self.source.rows(slice(first, first + BATCH_SIZE))
            x = x[is_selected]
            if channels == 1:
                is_coloured = (x != x[:, :1]).flatten(1).any(1)
                if is_coloured.any():
                    row = first + int(is_selected.nonzero()[:, 0][is_coloured][0])
                    raise UserError(f"{self.name(row)} is in colour, but this protocol needs grayscale images")
            yield sample_indices[is_selected], x[:, :channels]

    def chosen_rows(self, total: int) -> Tensor:
        """Return the rows (total,) to evaluate: all, or a random choice, because files may be sorted by class."""
        order = torch.randperm(len(self.source), generator=stream("images"))
        return order[:total].sort().values


def open_images(place: Path) -> ImageSet:
    """Open the images of a folder, .npz, table or archive.

    Classes that cannot be read are omitted (`ImageSet.label_problem`). The number of classes of an .npz is its largest
    class number plus 1. Raises UserError if there are no images, or if the first is unreadable.
    """
    if place.suffix == ".npz":
        source = NpzImages(place)
        labels = None if source.c is None else Labels(source.c, int(source.c.max()) + 1)
        _, height, width, _ = source.shape
        return ImageSet(source, (3, height, width), labels, lambda row: f"image {row} of {place}")
    rows = open_rows(place)
    labels = None
    problem = ""
    try:
        labels = labels_of(rows)
    except UserError as error:
        # The rest of the message is a fix for runs.
        problem, _, _ = str(error).partition(": ")
    try:
        width, height = pixel.load_upright(rows.read(0)).size
    except (OSError, ValueError) as error:
        raise UserError(f"{rows.path(0)} {error}: repair or remove it") from error
    to_pixels = pixel.SameSize(height=height, width=width, crop="none", first_name=rows.path(0))
    source = Source(rows, to_pixels, labels).keep_decoded(MEMORY_BYTES)
    return ImageSet(source, to_pixels.shape, labels, rows.path, problem)


def judge(
    images: str,
    kind: str = DEFAULT_KIND,
    *,
    against: str | None = None,
    fields: Sequence[str] = (),
    out: Path | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Evaluate images with the protocol `kind`, write the report, and return it.

    `images` is a folder or file of images to evaluate, and `against` one of real images. `fields` are overrides of a
    run's fields, such as "evaluate.protocol.samples=1000". `out` is the report's file, by default in the working folder
    and named after `images`, and after the protocol if it is not `DEFAULT_KIND`.

    All images are evaluated. If their number differs from the protocol's, its name in the report contains the number.
    Ranks share the work, and the first one writes. Raises UserError, and writes nothing, if there are no images that
    the protocol supports, or if the reference is missing or incompatible.
    """
    place = user_path(images, "--images")
    tree: dict[str, Any] = {"evaluate": {"protocol": {"kind": kind}}, "data": {}}
    override(tree, fields)
    kind = tree["evaluate"]["protocol"]["kind"]
    require_known("protocol of images", kind, KINDS)
    protocol_part = "" if kind == DEFAULT_KIND else f".{kind}"
    path = out or Path(f"{place.resolve().name}{protocol_part}.evaluation.json")

    # Open the images, and complete the protocol.
    image_set = open_images(place)
    protocol = _protocol_for(tree, image_set, place, against)
    total = protocol.total
    channels, num_judged_classes = judged_channels_and_classes(protocol, image_set, place)

    # Find the reference.
    labels_of_images = image_set.labels if num_judged_classes else None
    reference = _find_reference(protocol, tree, against, image_set, labels_of_images)
    labels = reference.labels

    # Hash the images.
    with bar("reading the images", total) as tick:
        batches = with_progress(image_set.batches(total, channels), total, _update_bar(tick))
        _, sha256 = hash_images((index, to_uint8(x)) for index, x in batches)

    # Score the images.
    torch_device = choose_device(device)
    with bar_while_reading(bar) as reading_tick:
        c = labels.c[image_set.chosen_rows(total)] if labels else None
        num_classes = labels.count if labels else 0
        context = Context(reference.open, num_classes, device=torch_device, tick=reading_tick, c=c)
        evaluator = protocol.evaluator(context)
    with bar("scoring", total) as tick:
        batches = with_progress(image_set.batches(total, channels), total, _update_bar(tick))
        scores = evaluator.score(batches)

    # Write the report.
    if labels:
        labels_text = f"{labels.count} classes of the images"
    elif image_set.label_problem:
        labels_text = f"none: {image_set.label_problem}"
    elif image_set.labels:
        labels_text = "none: the protocol does not evaluate classes, or the reference has other classes"
    else:
        labels_text = "none"
    card: Card = {
        "protocol": protocol.name,
        "samples": total,
        **evaluator.facts,
        "images": f"{total:,} of {len(image_set.source):,} images in {place}",
        "images_sha256": sha256,
        "labels": labels_text,
        "data": reference.spec,
        "device": torch_device.type,
        "versions": software_versions(),
    }
    report: dict[str, Any] = {
        "images": str(place),
        "file": str(path),
        "protocol": protocol.name,
        "samples": total,
        "results": [scores],
        "contrast": [],
        "baselines": evaluator.baselines(),
        "card": card,
        "versions": software_versions(),
    }
    if dist.is_main():
        write_json(path, report)
    return report


def _update_bar(tick: Tick) -> ImageTick:
    """Return a callback that updates the bar after each batch."""
    return lambda done, total: tick(done, "")


def _protocol_for(tree: dict[str, Any], image_set: ImageSet, place: Path, against: str | None) -> MetricProtocol:
    """Return the protocol of the tree. It evaluates all images, unless the tree sets a number.

    The reference of a protocol that compares with ADM's file is set to `against`, also in the tree. Raises UserError if
    there are too few images, if a file of the protocol is missing, and for a reference that would be ignored.
    """
    count = len(image_set.source)
    tree["evaluate"]["protocol"].setdefault("samples", count)
    # The fields of the data are complete only with the reference.
    tree_without_data = {name: part for name, part in tree.items() if name != "data"}
    protocol = parse(_ImagesSettings, tree_without_data).evaluate.protocol
    if isinstance(protocol, ImageProtocol) and protocol.standard.url:
        ignored = bool(tree["data"])
        if against:
            tree["evaluate"]["protocol"]["reference"] = against
            protocol = parse(_ImagesSettings, {"evaluate": tree["evaluate"]}).evaluate.protocol
    else:
        ignored = protocol.kind == "digits" and bool(against or tree["data"])
    if ignored:
        raise UserError(f"protocol {protocol.kind} has its own reference: remove data, and for digits --against")
    if protocol.total > count:
        raise UserError(
            f"{place} has {count:,} images, but evaluate.protocol.samples={protocol.total}: set it to {count} or fewer"
        )
    if isinstance(protocol, ImageProtocol):
        missing = protocol.missing_files("by --against, or in evaluate.protocol.reference")
    else:
        missing = protocol.missing
    if missing:
        raise UserError(f"protocol {protocol.kind} needs {missing}")
    return protocol


def judged_channels_and_classes(protocol: MetricProtocol, image_set: ImageSet, place: Path) -> tuple[int, int]:
    """Return the number of channels and classes of the images that the protocol supports.

    These are 3 channels if supported, otherwise 1, and all classes if supported, otherwise 0. Raises UserError if the
    protocol supports neither 3 channels nor 1 at this image size.
    """
    num_classes = image_set.labels.count if image_set.labels else 0
    for channels in (3, 1):
        shape = (channels, *image_set.shape[1:])
        if not protocol.find_problem(shape, 0):
            return channels, 0 if protocol.find_problem(shape, num_classes) else num_classes
    _, height, width = image_set.shape
    raise UserError(
        f"{place} has {len(image_set.source):,} images of {width} x {height} pixels, such as {image_set.name(0)}: "
        f"protocol {protocol.kind} {protocol.find_problem(image_set.shape, 0)}"
    )


@dataclass(frozen=True)
class _ImagesReference:
    """The reference of an evaluation, and the labels of the evaluated images."""

    # None if the protocol has its own reference file.
    data: Data | None
    # The description of the data in the card, or None if `data` is None.
    spec: Card | None
    # None if the images are evaluated without classes.
    labels: Labels | None

    def open(self) -> Data:
        """Return the data. A protocol with its own reference file never calls this."""
        assert self.data is not None, "the protocol has its own reference file"
        return self.data


def _find_reference(
    protocol: MetricProtocol, tree: dict[str, Any], against: str | None, image_set: ImageSet, labels: Labels | None
) -> _ImagesReference:
    """Return the reference for `image_set`, whose classes are `labels`.

    Protocols of `CLASSES_KINDS` use classes only if images and reference have the same ones. Raises UserError if
    --against is missing or has images of another size, and if the classes of protocol digits are not 0 to 9.
    """
    if protocol.kind == "digits":
        # Classes are numbered in the order of their names, so only these names give the numbers of the digits.
        if labels and labels.names and labels.names != DIGIT_NUMERALS:
            raise UserError(
                f"protocol digits needs the classes 0 to 9, got {first_few(labels.names)}: rename the folders, or put "
                "all images into one folder to evaluate them without classes"
            )
        return _ImagesReference(Digits().originals(), Digits().model_dump(mode="json"), labels)
    if isinstance(protocol, ImageProtocol) and protocol.standard.url:
        return _ImagesReference(None, None, labels)
    if against is None:
        raise UserError(f"protocol {protocol.kind} compares with real images: pass --against FOLDER or FILE.npz")
    by_shared_classes = protocol.kind in CLASSES_KINDS
    place = user_path(against, "--against")
    _, height, width = image_set.shape
    if place.suffix == ".npz" and not tree["data"]:
        reference_set = open_images(place)
        if reference_set.shape != image_set.shape:
            _, reference_height, reference_width = reference_set.shape
            raise UserError(
                f"{place} has images of {reference_width} x {reference_height} pixels, but the images to evaluate "
                f"have {width} x {height}: use a reference of that size, or a folder of images"
            )
        spec = {"root": str(place)}
        if by_shared_classes and not have_same_classes(labels, reference_set.labels):
            return _ImagesReference(NpzImages(place, with_classes=False), spec, None)
        return _ImagesReference(reference_set.source, spec, labels)

    # Read image files in the same way as a run's data.
    if height != width:
        raise UserError(
            f"{image_set.name(0)} is {width} x {height} pixels, but images in a folder are cropped to squares: give "
            "the reference as an .npz of that size"
        )
    data_fields = {"kind": "images", "root": against, "side": height, **tree["data"]}
    images = _reference_images(tree, data_fields)
    if by_shared_classes:
        reference_labels = Labels(torch.empty(0), images.labels, images.names or ())
        if not have_same_classes(labels, reference_labels):
            images = _reference_images(tree, {**data_fields, "labelled": False, "classes": 0})
            labels = None
    return _ImagesReference(images.originals(), images.model_dump(mode="json"), labels)


def _reference_images(tree: dict[str, Any], data: dict[str, Any]) -> Images:
    """Return the images of a reference with the fields `data`."""
    images = parse(_ImagesSettings, {"evaluate": tree["evaluate"], "data": data}).data
    assert images is not None, "it is given"
    return images.with_facts()


def have_same_classes(a: Labels | None, b: Labels | None) -> bool:
    """Return whether two sets have the same number of classes and, if both have names, the same names."""
    if a is None or b is None or a.count != b.count:
        return False
    if not a.names or not b.names:
        return True
    return a.names == b.names
