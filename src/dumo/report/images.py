"""Images that others made, judged by a protocol: the numbers and the card that samples of a run would have.

`judge` is the entrance; `dumo evaluate --images` calls it. In this order it

1. opens the images (`dumo.report.image_set`), and completes the protocol by their number and shape;
2. finds the real images that are the reference, or the file that the protocol has for it;
3. hashes the pixels of the images that are judged;
4. has the protocol score them;
5. writes the report (`dumo.report.evaluate`).

The images of a reference folder are cropped and resized to the size of those that are judged, in the way of a run's
data (`dumo.data.pixel.crop_middle`). So the same folder has the same hash as a run's reference and as a reference here,
and both reports can stand in one table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from dumo.config.change import override
from dumo.config.load import parse
from dumo.config.suggestion import require_known
from dumo.data import Digits, Images
from dumo.data.store import Labels
from dumo.data.toy import DIGIT_NAMES
from dumo.encoders import vision
from dumo.evaluation import Context, ImageProtocol, MetricProtocol
from dumo.evaluation.npz import NpzImages
from dumo.evaluation.protocol import ImageTick
from dumo.evaluation.reference import InceptionKind, hash_images, with_progress
from dumo.evaluation.shipped import ShippedKind
from dumo.io.file import check_writable
from dumo.io.picture import to_uint8
from dumo.io.read import first_few, user_path
from dumo.io.source import Data
from dumo.report.card import Card
from dumo.report.evaluate import complete_report, write_report
from dumo.report.image_set import ImageSet, have_same_classes, open_images, require_path
from dumo.run.judge import bar_while_reading
from dumo.runtime import dist, threads
from dumo.runtime.device import choose_device, software_versions
from dumo.runtime.progress import Bar, Tick, line_printer, no_bar
from dumo.types import Spec, UserError

DEFAULT_KIND = "photos"  # the protocol that needs no download: ours
CLASSES_KINDS = ("photos", "cifar10-features")  # of the protocols that compare with --against by class
DIGIT_NUMERALS = tuple("0123456789")
KINDS = sorted(  # the protocols that judge images without captions
    {*get_args(InceptionKind), *get_args(ShippedKind), *get_args(vision.FeatureKind)} - {"toy"}
)


class _ProtocolOnly(Spec):
    """The part of a run's `evaluate` that applies to existing images."""

    protocol: MetricProtocol


class _ImagesSettings(Spec):
    """The fields that --set may change: of the protocol, and of the data that are the reference."""

    evaluate: _ProtocolOnly
    data: Images | None = None


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
    """Judge images by the protocol `kind`, write the report, and return it.

    `images` is a folder or a file of images to judge, `against` one of real images to compare them with. `fields` are
    changes to a run's fields as --set gives them, such as "evaluate.protocol.samples=1000". `out` is the report's file;
    its default is named after `images`, and after a protocol other than `DEFAULT_KIND`, and lies in the working folder.

    All images are judged. Where their number is not the protocol's own, its name in the report says so. Several ranks
    share the work, and the first one writes. Raises UserError, and writes nothing, where there are no images or none
    that the protocol can judge, and where the reference is missing or does not fit.
    """
    place = user_path(images, "--images")
    tree = _settings_tree(kind, against, fields)
    path = out or _default_path(place, tree["evaluate"]["protocol"]["kind"])
    check_writable(path.parent)

    # the images, and the protocol that judges them
    image_set = open_images(place, "--images")
    protocol = _protocol_for(tree, image_set, str(place))
    channels, num_judged_classes = judged_channels_and_classes(protocol, image_set, str(place))
    missing = _missing_files(protocol)
    if missing:
        raise UserError(f"protocol {protocol.kind} needs {missing}")

    # what they are compared with
    labels_of_images = image_set.labels if num_judged_classes else None
    reference = _find_reference(protocol, tree, against, image_set, labels_of_images)
    labels = reference.labels
    num_classes = labels.count if labels else 0
    if labels:
        labels_text = f"{num_classes} classes of the images"
    else:
        labels_text = _unlabelled_text(images, against or "", image_set, num_judged_classes, reference.other_labels)

    # the hash of the images
    total = protocol.total
    with bar("reading the images", total) as tick:
        batches = with_progress(image_set.batches(total, channels), total, _update_bar(tick))
        _, sha256 = hash_images((index, to_uint8(x)) for index, x in batches)

    # the scores
    torch_device = choose_device(device)
    with threads.fewer_when_busy(torch_device, line_printer(bar)):
        with bar_while_reading(bar) as reading_tick:
            c = labels.c[image_set.chosen_rows(total)] if labels else None
            context = Context(reference.open, num_classes, device=torch_device, tick=reading_tick, c=c)
            evaluator = protocol.evaluator(context)
        with bar("judging", total) as tick:
            batches = with_progress(image_set.batches(total, channels), total, _update_bar(tick))
            scores = evaluator.score(batches)

    # the report
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
    head = {"images": str(place), "file": str(path), "protocol": protocol.name, "samples": total}
    report = complete_report(head, results=[scores], contrast=[], baselines=evaluator.baselines(), card=card)
    if dist.is_main():
        write_report(path, report, line_printer(bar))
    return report


def _default_path(place: Path, kind: str) -> Path:
    """Where the report of images belongs: a file in the working folder for each protocol."""
    protocol_part = "" if kind == DEFAULT_KIND else f".{kind}"
    return Path(f"{place.resolve().name}{protocol_part}.evaluation.json")


def _update_bar(tick: Tick) -> ImageTick:
    """What to call after each batch: it adapts the number of threads to the machine's load, and moves the bar."""

    def update(done: int, total: int) -> None:
        threads.check()
        tick(done, "")

    return update


def _settings_tree(kind: str, against: str | None, fields: Sequence[str]) -> dict[str, Any]:
    """The settings as a tree of `_ImagesSettings`: the protocol, changed by `fields`, and fields of the data.

    A protocol that compares with ADM's file gets `against` as its reference. The number of samples may still be
    missing. Raises UserError for fields that images do not have, a protocol that does not judge images, and a reference
    where the protocol has its own.
    """
    tree: dict[str, Any] = {"evaluate": {"protocol": {"kind": kind}}, "data": {}}
    override(tree, fields)
    unknown_fields = sorted(tree.keys() - {"evaluate", "data"})
    if not unknown_fields and not isinstance(tree["data"], dict):
        unknown_fields = ["data"]
    if unknown_fields:
        raise UserError(
            f"--set {unknown_fields[0]}: of images set fields of evaluate.protocol, or fields of data, the reference"
        )
    protocol = parse(_ImagesSettings, {"evaluate": tree["evaluate"]}).evaluate.protocol
    require_known("protocol of images", protocol.kind, KINDS)

    # some protocols have a reference of their own
    own_reference = None
    if protocol.kind == "digits":
        own_reference = "the digits that ship"
    elif isinstance(protocol, ImageProtocol) and protocol.standard.url:
        own_reference = "ADM's file, which --against names"
        if against:
            tree["evaluate"]["protocol"]["reference"] = against
            against = None
    if own_reference and (against or tree["data"]):
        option = "--against" if against else "data"
        raise UserError(f"protocol {protocol.kind} compares with {own_reference}: leave out {option}")
    return tree


def _protocol_for(tree: dict[str, Any], image_set: ImageSet, place: str) -> MetricProtocol:
    """The protocol of the tree; unless the tree says how many samples it judges, it judges all images.

    Raises UserError where there are fewer images than that, or too few for the protocol.
    """
    count = len(image_set.source)
    samples = tree["evaluate"]["protocol"].setdefault("samples", count)
    try:
        protocol = parse(_ImagesSettings, {"evaluate": tree["evaluate"]}).evaluate.protocol
    except UserError as error:
        raise UserError(f"{place} has {count:,} images: {error}") from error
    if protocol.total > count:
        raise UserError(
            f"{place} has {count:,} images, evaluate.protocol.samples={samples}: set no more, or leave it out"
        )
    return protocol


def judged_channels_and_classes(protocol: MetricProtocol, image_set: ImageSet, place: str) -> tuple[int, int]:
    """The number of channels and of classes by which the protocol can judge the images.

    All 3 channels if it can, else 1; all classes if it can, else 0. Raises UserError where it judges neither 3 channels
    nor 1 of images of this size.
    """
    num_classes = image_set.labels.count if image_set.labels else 0
    for channels in (3, 1):
        shape = (channels, *image_set.shape[1:])
        if protocol.why_unfit(shape, 0):
            continue
        judges_classes = not protocol.why_unfit(shape, num_classes)
        return channels, num_classes if judges_classes else 0
    _, height, width = image_set.shape
    raise UserError(
        f"{place} has {len(image_set.source):,} images of {width} x {height} pixels, such as {image_set.name(0)}: "
        f"protocol {protocol.kind} {protocol.why_unfit(image_set.shape, 0)}"
    )


def _missing_files(protocol: MetricProtocol) -> str | None:
    """What must be fetched or named before the protocol can judge images; None: nothing."""
    if isinstance(protocol, ImageProtocol):
        return protocol.missing_files("by --against, or in evaluate.protocol.reference")
    return protocol.missing


@dataclass(frozen=True)
class _ImagesReference:
    """What images are compared with, and the labels by which they are judged."""

    data: Data | None  # None where the protocol reads a file of its own
    spec: Card | None  # the data as the report's card describes them; None where `data` is
    labels: Labels | None  # of the images that are judged; None where they are judged without classes
    other_labels: Labels | None = None  # of the reference, where images are judged without classes because of them

    def open(self) -> Data:
        """The data. A protocol that reads a file of its own never calls this."""
        assert self.data is not None, "the protocol reads a file of its own"
        return self.data


def _find_reference(
    protocol: MetricProtocol, tree: dict[str, Any], against: str | None, image_set: ImageSet, labels: Labels | None
) -> _ImagesReference:
    """What `image_set`, whose classes are `labels`, is compared with.

    Protocols of `CLASSES_KINDS` judge by class only where images and reference have the same classes. Raises UserError
    where --against is missing, or names images of another size, and where protocol digits has classes of other names.
    """
    if protocol.kind == "digits":
        return _ImagesReference(Digits().originals(), Digits().model_dump(mode="json"), _digits_of(labels))
    if isinstance(protocol, ImageProtocol) and protocol.standard.url:
        return _ImagesReference(None, None, labels)
    if against is None:
        raise UserError(f"protocol {protocol.kind} compares with real images: say where, --against FOLDER or FILE.npz")
    by_shared_classes = protocol.kind in CLASSES_KINDS
    place = user_path(against, "--against")
    if place.suffix == ".npz" and not tree["data"]:
        return _npz_reference(place, image_set, labels, by_shared_classes=by_shared_classes)

    # files of images, which are read as a run's data are
    _, height, width = image_set.shape
    if height != width:
        raise UserError(
            f"{image_set.name(0)} is {width} x {height} pixels, and a folder's images are brought to squares: give the "
            "reference as an .npz of that size"
        )
    data_fields = {"kind": "images", "root": against, "side": height, **tree["data"]}
    spec = _reference_images(tree, data_fields)
    if by_shared_classes:
        reference_labels = Labels(torch.empty(0), spec.labels, spec.names or ())
        if not have_same_classes(labels, reference_labels):
            spec = _reference_images(tree, {**data_fields, "labelled": False, "classes": 0})
            return _ImagesReference(spec.originals(), spec.model_dump(mode="json"), None, reference_labels)
    return _ImagesReference(spec.originals(), spec.model_dump(mode="json"), labels)


def _digits_of(labels: Labels | None) -> Labels | None:
    """Labels whose numbers are the digits that the classes are named after, as 7 or seven; numbers alone stay.

    Raises UserError for other names, since classes are numbered in the order of their names, which says no digit.
    """
    if labels is None or not labels.names:
        return labels
    for digit_names in (DIGIT_NUMERALS, DIGIT_NAMES):
        if {*labels.names} == {*digit_names}:
            digit_by_class = torch.tensor([digit_names.index(name) for name in labels.names])
            return Labels(digit_by_class[labels.c], labels.count, digit_names)
    raise UserError(
        f"protocol digits judges which digit an image is, and the classes here are {first_few(labels.names)}: name "
        "them 0 to 9, or put all images into one folder, to judge them without classes"
    )


def _unlabelled_text(
    images: str, against: str, image_set: ImageSet, num_judged_classes: int, other_labels: Labels | None
) -> str:
    """What a card says of the classes of images that are judged without: "none", and why where there are some."""
    if image_set.label_problem:
        return f"none: {image_set.label_problem}"
    if image_set.labels and not num_judged_classes:
        return f"none: the protocol does not judge {image_set.labels.count} classes"
    if image_set.labels or (other_labels and other_labels.count):
        image_classes = f"{Path(images).resolve().name} has {_classes_text(image_set.labels)}"
        return f"none: {image_classes}, {Path(against).resolve().name} has {_classes_text(other_labels)}"
    return "none"


def _classes_text(labels: Labels | None) -> str:
    """The first classes by name, or by number where they have none."""
    if labels is None or labels.count == 0:
        return "no classes"
    return first_few(labels.names or range(labels.count))


def _npz_reference(
    place: Path, image_set: ImageSet, labels: Labels | None, *, by_shared_classes: bool
) -> _ImagesReference:
    """The images of an .npz as the reference; `by_shared_classes`: without classes unless both have the same.

    Raises UserError where they have another size than those that are judged.
    """
    reference_set = open_images(place, "--against")
    if reference_set.shape != image_set.shape:
        _, reference_height, reference_width = reference_set.shape
        _, height, width = image_set.shape
        raise UserError(
            f"{place} has images of {reference_width} x {reference_height} pixels, and those that are judged {width} x "
            f"{height}: give a reference of that size, or a folder of images"
        )
    spec = {"root": str(place)}
    if by_shared_classes and not have_same_classes(labels, reference_set.labels):
        return _ImagesReference(NpzImages(place, with_classes=False), spec, None, reference_set.labels)
    return _ImagesReference(reference_set.source, spec, labels)


def _reference_images(tree: dict[str, Any], data: dict[str, Any]) -> Images:
    """The images of a reference, opened by the fields `data`. Raises UserError for missing images or a bad field."""
    spec = parse(_ImagesSettings, {"evaluate": tree["evaluate"], "data": data}).data
    assert spec is not None, "it is given"
    require_path(user_path(spec.root, "--against"), "--against")
    return spec.with_facts()
