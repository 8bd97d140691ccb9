"""Images that others made, judged by a protocol: the numbers and the card that samples of a run would have.

They are read as the field's evaluators read them (pytorch-fid, torch-fidelity and clean-fid: `Image.convert("RGB")`):
grey becomes three equal channels, and of 16-bit colours pillow gives the high byte. Two things differ: 16-bit grey is
rounded to 8 bits, as protocols round samples, where theirs clips it, almost all to white; and transparency lies over
white. No image is resized or cropped, for the way it is done moves a FID (Parmar et al. 2022, arXiv 2104.11222): all
must have one size. Images of a reference are brought to that size as a run's data are (`dumo.data.pixel.square`), so
both have one hash, and a run and images stand in one table.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from dumo.data import Digits, Images
from dumo.data.album import Album
from dumo.data.image import GIGABYTE, find
from dumo.data.pixel import Frame, Unreadable, flat, upright
from dumo.data.store import Labels, Store
from dumo.evaluation import Context, ImageProtocol, MetricProtocol
from dumo.evaluation.npz import NpzImages
from dumo.evaluation.reference import PIECE, Inception, hashed
from dumo.evaluation.shipped import Shipped
from dumo.io.file import check_writable
from dumo.io.picture import to_uint8
from dumo.io.read import user_path
from dumo.io.source import Data
from dumo.run.config.change import override
from dumo.run.config.error import require_known
from dumo.run.config.load import parse
from dumo.run.config.source import FILE
from dumo.run.evaluation.card import Card, state
from dumo.run.evaluation.evaluate import looking, write
from dumo.runtime import dist, signals
from dumo.runtime.progress import Bar, Tick, no_bar
from dumo.runtime.random import stream
from dumo.types import Spec, UserError

Batch = tuple[Tensor, Tensor]  # numbers, and images in [-1, 1]

DEFAULT = "photos"
KINDS = sorted({*get_args(Inception), *get_args(Shipped)} - {"toy"})  # protocols of images without captions
MEMORY = 2 * GIGABYTE  # of pixels that are kept decoded, as of a run's data
SKIPPING = ", or leave such images out with data.on_bad=skip"  # of images that are judged none is left out


class Part(Spec):
    """What of an evaluation has a meaning for images that are there."""

    protocol: MetricProtocol


class Settings(Spec):
    """The fields that --set may give: of the protocol, and of the data that are the reference."""

    evaluate: Part
    data: Images | None = None


@dataclass(frozen=True)
class Same(Frame):
    """RGB at the size of the first image, `width` x `side`."""

    width: int
    first: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.side, self.width)

    def __call__(self, data: bytes) -> Tensor:
        """The pixels, 0 ... 255. Raises Unreadable where the bytes are no whole image, or one of another size."""
        image = flat(upright(data))
        if image.size != (self.width, self.side):
            size, wanted = f"{image.width} x {image.height} pixels", f"{self.width} x {self.side}"
            raise Unreadable(f"is {size}, and {self.first} is {wanted}: images are judged at one size, none is resized")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Found:
    """The images of a place: a source of them, their shape, classes where they have some, and what each is called."""

    source: Album | NpzImages
    shape: tuple[int, ...]
    labels: Labels | None
    name: Callable[[int], str]

    def judged(self, total: int, channels: int) -> Iterator[Batch]:
        """This rank's share of those that are judged: numbers and images in [-1, 1] of `channels`.

        The pieces are the same however many ranks there are, and a rank without one has an empty piece.
        """
        numbers = torch.full((len(self.source),), -1)
        numbers[self.chosen(total)] = torch.arange(total)
        for first in range(dist.rank() * PIECE, len(numbers), dist.world() * PIECE) or [len(numbers)]:
            signals.check()
            some = numbers[first : first + PIECE]
            with plainly("--images"):
                x = self.source.rows(slice(first, first + PIECE))[0][some >= 0]
            if channels == 1 and len(odd := (x != x[:, :1]).flatten(1).any(1).nonzero()):
                place = first + int((some >= 0).nonzero()[odd[0]])
                raise UserError(f"{self.name(place)} is in colour, and this protocol judges grey images")
            yield some[some >= 0], x[:, :channels]

    def chosen(self, total: int) -> Tensor:
        """The rows that are judged, in their order: all, or a random choice, for files often lie in order of class."""
        order = torch.randperm(len(self.source), generator=stream("images"))
        return order[:total].sort().values


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
    tree = settings(kind, against, fields)
    found = look(place, "--images")
    protocol = protocol_of(tree, found, str(place))
    channels, classes = fitting(protocol, found, str(place))
    if why := protocol.missing:
        raise UserError(f"protocol {protocol.kind} needs {why.replace('named in', 'named by --against, or in')}")
    data, spec, labels = reference(protocol, tree, against, found, classes)
    total, classes = protocol.total, labels.count if labels else 0
    with bar("reading the images", total) as tick:
        _, sha256 = hashed((index, to_uint8(x)) for index, x in counted(found.judged(total, channels), total, tick))

    def real() -> Data:
        assert data is not None, "the protocol reads a file of its own"
        return data

    with looking(bar) as seen:
        c = labels.c[found.chosen(total)] if labels else None
        evaluator = protocol.evaluator(Context(real, classes, device=dist.device(device), tick=seen, c=c))
    with bar("judging", total) as tick:
        scores = evaluator.score(counted(found.judged(total, channels), total, tick))
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
            "device": dist.device(device).type,
            "versions": dist.versions(),
        },
        "versions": dist.versions(),
    }
    report["state"] = state(report["results"], report["baselines"])
    if dist.is_main():
        write(path, report)
    return report


def counted(batches: Iterator[Batch], total: int, tick: Tick) -> Iterator[Batch]:
    """The same, and how many images have come; of other ranks as many again."""
    done = 0
    for index, x in batches:
        yield index, x
        done += len(index) * dist.world()
        tick(min(done, total), "")


def settings(kind: str, against: str | None, fields: Sequence[str]) -> dict[str, Any]:
    """The tree of `Settings`, with the protocol and a reference of ADM's; what is not known yet is not there."""
    tree: dict[str, Any] = {"evaluate": {"protocol": {"kind": kind}}, "data": {}}
    override(tree, fields)
    if (odd := tree.keys() - {"evaluate", "data"}) or not isinstance(tree["data"], dict):
        field = min(odd or ["data"])
        raise UserError(f"--set {field}: of images set fields of evaluate.protocol, or fields of data, the reference")
    protocol = parse(Settings, {"evaluate": tree["evaluate"]}).evaluate.protocol
    require_known("protocol of images", protocol.kind, KINDS)
    own = "the digits that ship" if protocol.kind == "digits" else None
    if isinstance(protocol, ImageProtocol) and protocol.standard.url:
        own = "ADM's file, which --against names"
        tree["evaluate"]["protocol"] |= {"reference": against} if against else {}
        against = None
    if own and (against or tree["data"]):
        raise UserError(f"protocol {protocol.kind} compares with {own}: leave out {'--against' if against else 'data'}")
    return tree


def protocol_of(tree: dict[str, Any], found: Found, place: str) -> Any:  # noqa: ANN401, a union of protocols
    """The protocol, of as many samples as there are images unless it is set. Raises UserError for too few."""
    there, wanted = len(found.source), tree["evaluate"]["protocol"].setdefault("samples", len(found.source))
    try:
        protocol = parse(Settings, {"evaluate": tree["evaluate"]}).evaluate.protocol
    except UserError as error:
        raise UserError(f"{place} has {there:,} images: {error}") from error
    if protocol.total > there:
        raise UserError(
            f"{place} has {there:,} images, evaluate.protocol.samples={wanted}: set no more, or leave it out"
        )
    return protocol


def fitting(protocol: MetricProtocol, found: Found, place: str) -> tuple[int, int]:
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


def reference(
    protocol: MetricProtocol, tree: dict[str, Any], against: str | None, found: Found, classes: int
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
        real = look(place, "--against")
        if real.shape != found.shape:
            size = f"{real.shape[2]} x {real.shape[1]} pixels, and those that are judged {width} x {height}"
            raise UserError(f"{place} has images of {size}: give a reference of that size, or a folder of images")
        if photos and isinstance(real.source, NpzImages) and not agree(labels, real.labels):
            labels = real.source.c = None
        return real.source, {"root": str(place)}, labels
    if height != width:
        size = f"{found.name(0)} is {width} x {height} pixels, and a folder's images are brought to squares"
        raise UserError(f"{size}: give the reference as an .npz of that size")
    given = {"kind": "images", "root": against, "side": height, **tree["data"]}
    spec = data_of(tree, given)
    if photos and not agree(labels, Labels(torch.empty(0), spec.labels, spec.names or ())):
        labels, spec = None, data_of(tree, {**given, "labelled": False, "classes": 0})
    return spec.originals(), spec.model_dump(mode="json"), labels


def data_of(tree: dict[str, Any], data: dict[str, Any]) -> Images:
    """The images of a reference. Raises UserError where they are not there, or the fields do not fit."""
    spec = parse(Settings, {"evaluate": tree["evaluate"], "data": data}).data
    assert spec is not None, "it is given"
    require_there(user_path(spec.root, "--against"), "--against")
    return spec.found()


def agree(one: Labels | None, other: Labels | None) -> bool:
    """Whether both have the same classes: as many, of the same names where both have names."""
    if one is None or other is None:
        return False
    return one.count == other.count and (one.names == other.names or () in (one.names, other.names))


def look(place: Path, option: str) -> Found:
    """The images of an .npz, a folder or a table. Raises UserError where there are none, or the first is unreadable."""
    require_there(place, option)
    if (place / FILE).is_file():
        raise UserError(f"{place} is a run's folder: dumo evaluate {place} judges it, {option} images that are made")
    if place.suffix == ".npz":
        source = NpzImages(place)
        labels = None if source.c is None else Labels(source.c, int(source.c.max()) + 1)
        return Found(source, (3, *source.shape[1:3]), labels, lambda i: f"image {i} of {place}")
    with plainly(option):
        store = stored(place)
        try:
            width, height = upright(store.read(0)).size
        except (OSError, ValueError) as error:
            raise UserError(f"{store.path(0)} {error}: mend or remove it") from error
        frame = Same(height, "none", width, store.path(0))
        source = Album(store, frame, flip=False, skip=False, memory=MEMORY)
    return Found(source, frame.shape, store.labels, store.path)


def require_there(place: Path, option: str) -> None:
    """Raise UserError where there is nothing."""
    if not place.exists():
        raise UserError(f"there is no folder or file {place}: say with {option} where the images are")


def stored(place: Path) -> Store:
    """The images, with their classes where these are in order."""
    try:
        return find(place)
    except UserError:
        return find(place, label=None)


@contextmanager
def plainly(option: str) -> Generator[None]:
    """Errors of a run's data as those of images that are named by an option."""
    try:
        yield
    except UserError as error:
        text = str(error).replace(SKIPPING, "").replace("choose one with data.split", f"name one of them with {option}")
        raise UserError(text.replace("data.root", option)) from error
