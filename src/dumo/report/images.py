"""Images that others made, judged by a protocol: the numbers and the card that samples of a run would have.

How they are read says `dumo.report.place`. Images of a reference are brought to their size as a run's data are
(`dumo.data.pixel.cut`), so both references have one hash, and a run and images stand in one table.
"""

from collections.abc import Iterator, Sequence
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
from dumo.report import score
from dumo.report.card import Card
from dumo.report.evaluate import write
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
    tree = _settings_tree(kind, against, fields)
    found = open_images(place, "--images")
    protocol = _protocol_for(tree, found, str(place))
    channels, classes = fitting(protocol, found, str(place))
    if why := protocol.missing:
        raise UserError(f"protocol {protocol.kind} needs {why.replace('named in', 'named by --against, or in')}")
    data, spec, labels = _reference(protocol, tree, against, found, classes)
    total, classes = protocol.total, labels.count if labels else 0
    with bar("reading the images", total) as tick:
        _, sha256 = hash_images(
            (index, to_uint8(x)) for index, x in _count_images(found.judged(total, channels), total, tick)
        )

    def real() -> Data:
        assert data is not None, "the protocol reads a file of its own"
        return data

    here = dist.device(device)
    with threads.fewer_when_busy(here, teller(bar)):
        with bar_while_reading(bar) as seen:
            c = labels.c[found.chosen(total)] if labels else None
            evaluator = protocol.evaluator(Context(real, classes, device=here, tick=seen, c=c))
        with bar("judging", total) as tick:
            scores = evaluator.score(_count_images(found.judged(total, channels), total, tick))
    report: dict[str, Any] = {
        "images": str(place),
        "file": str(path),
        "protocol": protocol.name,
        "samples": total,
        "results": [scores],
        "contrast": [],
        "baselines": evaluator.baselines(),
        "card": {
            "protocol": protocol.name,
            "samples": total,
            **evaluator.facts,
            "images": f"{total:,} of {len(found.source):,} images in {place}",
            "images_sha256": sha256,
            "labels": f"{classes} classes of the images" if classes else "none",
            "data": spec,
            "device": here.type,
            "versions": dist.versions(),
        },
        "versions": dist.versions(),
    }
    report["state"] = score.state(report["results"], report["baselines"])
    if dist.is_main():
        write(path, report)
    return report


def _count_images(batches: Iterator[Batch], total: int, tick: Tick) -> Iterator[Batch]:
    """The same, and how many images have come; of other ranks as many again."""
    done = 0
    for index, x in batches:
        yield index, x
        threads.check()
        done += len(index) * dist.world()
        tick(min(done, total), "")


def _settings_tree(kind: str, against: str | None, fields: Sequence[str]) -> dict[str, Any]:
    """The tree of `_ImagesSettings`, with the protocol and a reference of ADM's; what is not known yet is not there."""
    tree: dict[str, Any] = {"evaluate": {"protocol": {"kind": kind}}, "data": {}}
    override(tree, fields)
    if (odd := tree.keys() - {"evaluate", "data"}) or not isinstance(tree["data"], dict):
        field = min(odd or ["data"])
        raise UserError(f"--set {field}: of images set fields of evaluate.protocol, or fields of data, the reference")
    protocol = parse(_ImagesSettings, {"evaluate": tree["evaluate"]}).evaluate.protocol
    require_known("protocol of images", protocol.kind, KINDS)
    own = "the digits that ship" if protocol.kind == "digits" else None
    if isinstance(protocol, ImageProtocol) and protocol.standard.url:
        own = "ADM's file, which --against names"
        tree["evaluate"]["protocol"] |= {"reference": against} if against else {}
        against = None
    if own and (against or tree["data"]):
        raise UserError(f"protocol {protocol.kind} compares with {own}: leave out {'--against' if against else 'data'}")
    return tree


def _protocol_for(tree: dict[str, Any], found: PlacedImages, place: str) -> Any:  # noqa: ANN401, a union of protocols
    """The protocol, of as many samples as there are images unless it is set. Raises UserError for too few."""
    there, wanted = len(found.source), tree["evaluate"]["protocol"].setdefault("samples", len(found.source))
    try:
        protocol = parse(_ImagesSettings, {"evaluate": tree["evaluate"]}).evaluate.protocol
    except UserError as error:
        raise UserError(f"{place} has {there:,} images: {error}") from error
    if protocol.total > there:
        raise UserError(
            f"{place} has {there:,} images, evaluate.protocol.samples={wanted}: set no more, or leave it out"
        )
    return protocol


def fitting(protocol: MetricProtocol, found: PlacedImages, place: str) -> tuple[int, int]:
    """How many channels of the images the protocol judges, and in how many classes. Raises UserError for none."""
    count = found.labels.count if found.labels else 0
    for channels in (3, 1):
        shape = (channels, *found.shape[1:])
        if not protocol.unfit(shape, 0):
            return channels, 0 if protocol.unfit(shape, count) else count
    _, height, width = found.shape
    raise UserError(
        f"{place} has {len(found.source):,} images of {width} x {height} pixels, such as {found.name(0)}: protocol "
        f"{protocol.kind} {protocol.unfit(found.shape, 0)}"
    )


def _reference(
    protocol: MetricProtocol, tree: dict[str, Any], against: str | None, found: PlacedImages, classes: int
) -> tuple[Data | None, Card | None, Labels | None]:
    """What images are compared with, what a card says of it, and the images' classes, None where they do not count.

    None where the protocol has a file of its own. Photos are judged by class only where both have the same classes.
    """
    labels, photos = found.labels if classes else None, protocol.kind == DEFAULT
    if protocol.kind == "digits":
        return Digits().originals(), Digits().model_dump(mode="json"), labels
    if isinstance(protocol, ImageProtocol) and protocol.standard.url:
        return None, None, labels
    if against is None:
        raise UserError(f"protocol {protocol.kind} compares with real images: say where, --against FOLDER or FILE.npz")
    place, (_, height, width) = user_path(against, "--against"), found.shape
    if place.suffix == ".npz" and not tree["data"]:
        real = open_images(place, "--against")
        if real.shape != found.shape:
            size = f"{real.shape[2]} x {real.shape[1]} pixels, and those that are judged {width} x {height}"
            raise UserError(f"{place} has images of {size}: give a reference of that size, or a folder of images")
        if photos and isinstance(real.source, NpzImages) and not have_same_classes(labels, real.labels):
            labels = real.source.c = None
        return real.source, {"root": str(place)}, labels
    if height != width:
        size = f"{found.name(0)} is {width} x {height} pixels, and a folder's images are brought to squares"
        raise UserError(f"{size}: give the reference as an .npz of that size")
    given = {"kind": "images", "root": against, "side": height, **tree["data"]}
    spec = _reference_images(tree, given)
    if photos and not have_same_classes(labels, Labels(torch.empty(0), spec.labels, spec.names or ())):
        labels, spec = None, _reference_images(tree, {**given, "labelled": False, "classes": 0})
    return spec.originals(), spec.model_dump(mode="json"), labels


def _reference_images(tree: dict[str, Any], data: dict[str, Any]) -> Images:
    """The images of a reference. Raises UserError where they are not there, or the fields do not fit."""
    spec = parse(_ImagesSettings, {"evaluate": tree["evaluate"], "data": data}).data
    assert spec is not None, "it is given"
    require_path(user_path(spec.root, "--against"), "--against")
    return spec.found()
