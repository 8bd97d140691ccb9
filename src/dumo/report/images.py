"""Images that others made, judged by a protocol: the numbers and the card that samples of a run would have.

`judge` is the entrance. It opens the images (`dumo.report.place`), decides the protocol by their number and shape,
finds the real images to compare with, has the protocol score them, and writes the report (`dumo.report.evaluate`).

Images of a reference are brought to the size of those that are judged as a run's data are (`dumo.data.pixel.cut`). So
both references have one hash, and a run and images stand in one table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from dumo.config.change import override
from dumo.config.error import require_known
from dumo.config.load import parse
from dumo.data import Digits, Images
from dumo.data.store import Labels
from dumo.encoders import vision
from dumo.evaluation import Context, ImageProtocol, MetricProtocol
from dumo.evaluation.npz import NpzImages
from dumo.evaluation.reference import Inception, hash_images
from dumo.evaluation.shipped import Shipped
from dumo.io.file import check_writable
from dumo.io.picture import to_uint8
from dumo.io.read import user_path
from dumo.io.source import Data
from dumo.report.card import Card
from dumo.report.evaluate import complete_report, write
from dumo.report.place import Batch, PlacedImages, have_same_classes, open_images, require_path
from dumo.run.judge import bar_while_reading
from dumo.runtime import dist, threads
from dumo.runtime.progress import Bar, Tick, no_bar, teller
from dumo.types import Spec, UserError

DEFAULT = "photos"
KINDS = sorted(
    {*get_args(Inception), *get_args(Shipped), *get_args(vision.Kind)} - {"toy"}
)  # protocols of images without captions


class _ProtocolOnly(Spec):
    """What of an evaluation has a meaning for images that are there."""

    protocol: MetricProtocol


class _ImagesSettings(Spec):
    """The fields that --set may give: of the protocol, and of the data that are the reference."""

    evaluate: _ProtocolOnly
    data: Images | None = None


def judge(
    images: str,
    kind: str = DEFAULT,
    *,
    against: str | None = None,
    fields: Sequence[str] = (),
    out: Path | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Judge the images of a place by the protocol `kind`, against those of another; write the report, and return it.

    `fields` are a run's, as --set gives them. All images are judged, and the protocol's name says where these are not
    its number. Several ranks share the work, and the first writes. Raises UserError, and writes nothing, where a place
    holds no images or those the protocol does not judge, and where the reference is missing or of no use.
    """
    place = user_path(images, "--images")
    path = out or Path(f"{place.resolve().name}.evaluation.json")
    check_writable(path.parent)

    # the images, the protocol, and what it compares with
    tree = _settings_tree(kind, against, fields)
    placed = open_images(place, "--images")
    protocol = _protocol_for(tree, placed, str(place))
    channels, classes = fitting(protocol, placed, str(place))
    missing = protocol.missing
    if missing:
        missing = missing.replace("named in", "named by --against, or in")
        raise UserError(f"protocol {protocol.kind} needs {missing}")
    reference = _reference(protocol, tree, against, placed, classes)
    labels = reference.labels
    classes = labels.count if labels else 0

    # their hash
    total = protocol.total
    with bar("reading the images", total) as tick:
        pixels = ((index, to_uint8(x)) for index, x in _count_images(placed.batches(total, channels), total, tick))
        _, sha256 = hash_images(pixels)

    # their scores
    torch_device = dist.device(device)
    with threads.fewer_when_busy(torch_device, teller(bar)):
        with bar_while_reading(bar) as reading_tick:
            c = labels.c[placed.chosen_rows(total)] if labels else None
            context = Context(reference.open, classes, device=torch_device, tick=reading_tick, c=c)
            evaluator = protocol.evaluator(context)
        with bar("judging", total) as tick:
            scores = evaluator.score(_count_images(placed.batches(total, channels), total, tick))

    card: Card = {
        "protocol": protocol.name,
        "samples": total,
        **evaluator.facts,
        "images": f"{total:,} of {len(placed.source):,} images in {place}",
        "images_sha256": sha256,
        "labels": f"{classes} classes of the images" if classes else "none",
        "data": reference.spec,
        "device": torch_device.type,
        "versions": dist.versions(),
    }
    head = {"images": str(place), "file": str(path), "protocol": protocol.name, "samples": total}
    report = complete_report(head, results=[scores], contrast=[], baselines=evaluator.baselines(), card=card)
    if dist.is_main():
        write(path, report)
    return report


def _count_images(batches: Iterator[Batch], total: int, tick: Tick) -> Iterator[Batch]:
    """The batches as they are; `tick` is called with how many images have come, of other ranks as many again."""
    done = 0
    for index, x in batches:
        yield index, x
        threads.check()
        done += len(index) * dist.world()
        tick(min(done, total), "")


def _settings_tree(kind: str, against: str | None, fields: Sequence[str]) -> dict[str, Any]:
    """The tree of `_ImagesSettings`: the protocol, ADM's reference where it takes one, and `fields`.

    How many images there are is not known yet. Raises UserError for fields that images do not have, a protocol that
    judges none, and a reference where the protocol has its own.
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

    # the reference that the protocol fixes
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


def _protocol_for(tree: dict[str, Any], placed: PlacedImages, place: str) -> Any:  # noqa: ANN401, a union of protocols
    """The protocol, of as many samples as there are images unless it is set. Raises UserError for too few."""
    count = len(placed.source)
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


def fitting(protocol: MetricProtocol, placed: PlacedImages, place: str) -> tuple[int, int]:
    """How many channels of the images the protocol judges, and in how many classes. Raises UserError for none."""
    count = placed.labels.count if placed.labels else 0
    for channels in (3, 1):
        shape = (channels, *placed.shape[1:])
        if protocol.unfit(shape, 0):
            continue
        judges_classes = not protocol.unfit(shape, count)
        return channels, count if judges_classes else 0
    _, height, width = placed.shape
    raise UserError(
        f"{place} has {len(placed.source):,} images of {width} x {height} pixels, such as {placed.name(0)}: protocol "
        f"{protocol.kind} {protocol.unfit(placed.shape, 0)}"
    )


@dataclass(frozen=True)
class _ImagesReference:
    """What images are compared with, as a card has it, and the classes of those that are judged.

    `data` and `spec` are None where the protocol has a file of its own, `labels` where classes do not count.
    """

    data: Data | None
    spec: Card | None
    labels: Labels | None

    def open(self) -> Data:
        """The data. A protocol that has a file of its own does not ask for it."""
        assert self.data is not None, "the protocol reads a file of its own"
        return self.data


def _reference(
    protocol: MetricProtocol, tree: dict[str, Any], against: str | None, placed: PlacedImages, classes: int
) -> _ImagesReference:
    """What the images are compared with. Photos are judged by class only where both have the same classes.

    Raises UserError where --against is missing, or names images of another size.
    """
    labels = placed.labels if classes else None
    if protocol.kind == "digits":
        return _ImagesReference(Digits().originals(), Digits().model_dump(mode="json"), labels)
    if isinstance(protocol, ImageProtocol) and protocol.standard.url:
        return _ImagesReference(None, None, labels)
    if against is None:
        raise UserError(f"protocol {protocol.kind} compares with real images: say where, --against FOLDER or FILE.npz")
    by_shared_classes = protocol.kind == DEFAULT
    place = user_path(against, "--against")
    if place.suffix == ".npz" and not tree["data"]:
        return _npz_reference(place, placed, labels, by_shared_classes=by_shared_classes)

    # files of images, as a run's data
    _, height, width = placed.shape
    if height != width:
        raise UserError(
            f"{placed.name(0)} is {width} x {height} pixels, and a folder's images are brought to squares: give the "
            "reference as an .npz of that size"
        )
    data_fields = {"kind": "images", "root": against, "side": height, **tree["data"]}
    spec = _reference_images(tree, data_fields)
    if by_shared_classes:
        reference_labels = Labels(torch.empty(0), spec.labels, spec.names or ())
        if not have_same_classes(labels, reference_labels):
            labels = None
            spec = _reference_images(tree, {**data_fields, "labelled": False, "classes": 0})
    return _ImagesReference(spec.originals(), spec.model_dump(mode="json"), labels)


def _npz_reference(
    place: Path, placed: PlacedImages, labels: Labels | None, *, by_shared_classes: bool
) -> _ImagesReference:
    """An .npz as the reference. Raises UserError where its images have another size than those that are judged."""
    real = open_images(place, "--against")
    if real.shape != placed.shape:
        _, height, width = placed.shape
        size = f"{real.shape[2]} x {real.shape[1]} pixels, and those that are judged {width} x {height}"
        raise UserError(f"{place} has images of {size}: give a reference of that size, or a folder of images")
    if by_shared_classes and isinstance(real.source, NpzImages) and not have_same_classes(labels, real.labels):
        labels = None
        real.source.c = None
    return _ImagesReference(real.source, {"root": str(place)}, labels)


def _reference_images(tree: dict[str, Any], data: dict[str, Any]) -> Images:
    """The images of a reference. Raises UserError where they are not there, or the fields do not fit."""
    spec = parse(_ImagesSettings, {"evaluate": tree["evaluate"], "data": data}).data
    assert spec is not None, "it is given"
    require_path(user_path(spec.root, "--against"), "--against")
    return spec.found()
