"""A data set that a codec has encoded: a table (`dumo.io.table`), what it is of, and how it is made.

    x          what `Opened.encode` gives: the moments where the codec has Gaussians, or one draw of them
    flipped    the same of the mirrored images, if the data are flipped: a mirrored latent decodes to no mirrored image
    labels     classes, or the images' numbers in captions.jsonl, which then says what is written of each
    image      which of the images each row is of, by number, and
    sha256     the hash of that image's file, so that a cache is refused where its images are others now

Of images in buckets there are, for each bucket, "x 192x320" and "flipped 192x320", with the entries of its images
alone, and "in 192x320", which says what rows these are; "cropped" is the share of each image that was cut off.

A shard is encoded in the same batches from its own first row, and its draws have a stream of their own.
"""

import sys
from collections.abc import Callable, Iterator
from operator import not_
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dumo.data.album import HASH, Album
from dumo.data.bucket import Assorted, Crops
from dumo.data.pixel import Size
from dumo.data.written import LINES, dump_lines, require_lines
from dumo.encoders import Codec
from dumo.encoders.caption import Captions
from dumo.encoders.codec import Opened
from dumo.io import table
from dumo.io.content import BYTES, Hashes, hashes_of, moved, unpacked
from dumo.io.picture import from_uint8
from dumo.io.source import Finite
from dumo.io.table import ELSEWHERE, Done, Index, Table, Tick
from dumo.io.weights import load
from dumo.runtime import signals
from dumo.runtime.bound import CLASSES, PIXELS, ROWS
from dumo.types import Spec, UserError

LATENTS = ("x", "flipped")  # columns
NAMES = "names.zlib"  # of a cache: what its images are called


class CachePlan(Spec):
    """How a data set is to be encoded, by whatever codec."""

    source: str = ""  # what it is, in words
    fingerprint: str = ""  # of the images' names and classes; what is in them, each shard says
    resolution: int = Field(gt=0, le=PIXELS)  # pixels along a side
    sizes: tuple[Size, ...] = Field(default=(), exclude_if=not_)  # of the buckets around that side; (): all are squares
    crop: str = ""  # how the images came to be square, in words
    classes: int = Field(default=0, ge=0, le=CLASSES)  # labels are in [0, classes); 0: there are none, and all are 0
    names: tuple[str, ...] = ()  # of the classes
    captioned: bool = Field(default=False, exclude_if=not_)  # labels are the images' numbers in captions.jsonl
    flips: bool = True  # mirrored images, too
    store: Literal["moments", "samples"] = "moments"  # of a codec with Gaussians; others have one latent per image
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)  # images to a shard
    seed: int = 0  # of the samples

    def ending(self, size: Size) -> str:
        """Of the names of columns of images of this size."""
        return f" {size[0]}x{size[1]}" if self.sizes else ""


class CacheIndex(CachePlan, Index):
    """What index.json says of a cache."""

    word: ClassVar[str] = "cache"
    codec: dict[str, Any]  # what it does (`Scaled.facts`), and where its weights lay
    weights: str  # SHA-256 of the codec's

    def summary(self) -> str:
        """What a whole cache holds, in words."""
        rows = sum(shard.rows for shard in self.shards)
        lost = f" ({self.rows - rows} could not be read)" if rows < self.rows else ""
        shape = f"latents of {len(self.sizes)} buckets" if self.sizes else self.columns["x"].shape
        return f"{rows:,} images{lost} as {shape} in {self.dtype}"

    def binding(self) -> dict[str, Any]:
        """All but where the codec's weights lie, for their hash is there."""
        tree = super().binding()
        codec = {f"codec.{key}": value for key, value in tree.pop("codec").items() if key not in ("weights", "sha256")}
        return tree | codec


def read_contents(folder: Path) -> CacheIndex | None:
    """What index.json says, or None where there is none. Raises UserError if it is damaged."""
    return table.read(folder, CacheIndex)


def open_cache(folder: Path, codec: Codec, memory: float = 0.0, **wanted: object) -> Table:
    """Open a cache to read it as the data of a codec and of `wanted` fields of the plan; None: whatever is there.

    A cache of both flips serves those who want one. One of at most `memory` bytes is read, not mapped. Raises UserError
    where there is no cache, it is unfinished, a shard is missing or of another size, or it is of something else.
    """
    contents = table.read_whole(folder, CacheIndex, f"is no cache (it has no {table.FILE}): make it with dumo encode")
    wanted["flips"] = wanted.get("flips") or None
    lines = [f"{name}: {getattr(contents, name)} in the cache, {value} asked"
             for name, value in wanted.items() if value not in (None, getattr(contents, name))]  # fmt: skip
    if lines := [*lines, *differences(contents, codec)]:
        listed = "\n  ".join(lines)
        raise UserError(f"{folder} does not fit:\n  {listed}\nEncode the data for this, or ask for what is there")
    return Table(folder, contents, memory)


def crops(table: Table) -> Crops:
    """What the buckets left of the images of a cache."""
    contents = table.index
    assert isinstance(contents, CacheIndex)
    place, cropped = list[Tensor](), list[Tensor]()
    for number in range(len(contents.shards)):
        columns = table.tensors(number)
        place.append(torch.stack([columns[f"in{contents.ending(size)}"] for size in contents.sizes]).long().argmax(0))
        cropped.append(columns["cropped"])
    return Crops.of(contents.sizes, torch.cat(place), torch.cat(cropped))


def differences(contents: CacheIndex, codec: Codec) -> Iterator[str]:
    """A line per way in which a codec would have given another latent.

    Weights are the same if they have the same SHA-256, of a run that has begun or of a file that is here; else the same
    name.
    """
    here, there = (
        {k: v for k, v in one.items() if k not in ("weights", "sha256")} for one in (contents.codec, codec.facts())
    )
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            yield f"codec.{name}: {here.get(name)} in the cache, {there.get(name)} asked"
    named = contents.weights if codec.weights == contents.codec["weights"] else None
    if here == there and (codec.sha256 or codec.digest() or named) != contents.weights:
        yield f"codec.weights: {contents.codec['weights']} in the cache, {codec.weights} asked, which are not the same"


def encode(
    source: Finite | Assorted,
    codec: Opened,
    plan: CachePlan,
    out: Path,
    *,
    captions: Captions | None = None,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    tick: Tick = lambda done, note: None,
) -> Done:
    """Make those of this rank's shards that are not there, or damaged. Another batch may move the last bits.

    `captions` of images that are labelled by their numbers are kept next to them. Raises UserError where `out` holds
    another cache, other captions or something else, an image or a label is not as planned, a latent is too large for
    the dtype, or the disk is full, OSError where nothing can be written, Stopped after a signal; finished shards are
    kept.
    """
    contents, hashes = contents_of(source, codec, plan), hashes_of(source)
    if hashes:
        hashes.hash(i for number in standing(out, contents, rank, world) for i in contents.span(number))
        require_origin(out, hashes, contents, copies=sys.maxsize)
    if captions:
        require_lines(out / LINES, captions)

    def shard(number: int, behind: Callable[[int], None]) -> dict[str, Tensor]:
        return pack(encoded(source, codec, contents, number, batch, behind), codec, contents, number)

    others = {LINES: dump_lines(captions)} if captions else {}
    of = (lambda number: hashes.digest(contents.span(number))) if hashes else (lambda number: "")
    others |= {NAMES: hashes.packed.numpy().tobytes()} if hashes else {}
    done = table.make(out, contents, shard, rank=rank, world=world, of=of, others=others, tick=tick)
    if hashes:
        hashes.save()
        require_origin(out, hashes, contents, copies=0)  # another rank may have seen other images meanwhile
    return done


def standing(out: Path, contents: CacheIndex, rank: int, world: int) -> list[int]:
    """Which of a rank's shards stand in a folder that holds this cache."""
    there = table.read(out, CacheIndex)
    if there is None or there.binding() != contents.binding():
        return []
    return [number for number in table.noted(out, there) if number % world == rank]


def read_names(folder: Path) -> bytes:
    """What a cache's images are called, as `Hashes.names`; empty where it does not say."""
    file = folder / NAMES
    return unpacked(file.read_bytes()) if file.is_file() else b""


def require_origin(
    folder: Path, hashes: Hashes, like: CacheIndex | None = None, *, copies: int, later: bool = False
) -> None:
    """Raise UserError, with a name, where a cache is of other images than those that are here.

    Those that changed since they were hashed are hashed now; copies of files, too, where they have at most `copies`
    bytes. `later`: the others are compared when they are read. `like`: nothing is said of a folder that holds another
    cache anyhow.
    """
    there = table.read(folder, CacheIndex)
    if there is None:
        return
    same = {"fingerprint": like.fingerprint, "rows": like.rows} if like else {}
    if like and there.model_copy(update=same).binding() != like.binding():
        return
    way_out = f"put the images back as they were, or {ELSEWHERE}"
    if HASH not in there.columns:
        raise UserError(f"{folder} does not say what is in its images, as caches of an older dumo: {ELSEWHERE}")
    shards = table.noted(folder, there)
    if there.fingerprint != hashes.title():
        names = read_names(folder)
        wrong = moved(names, hashes.names) if names not in (b"", hashes.names) else "of other names or classes"
        if shards:
            raise UserError(f"{folder} is of other images than are here, {wrong}: {way_out}")
        return
    expected = np.zeros_like(hashes.known)
    for number, shard in shards.items():
        span = there.span(number)
        doubt = hashes.doubtful(span)
        other = shard.of != hashes.digest(span) and (doubt or later)
        if other and shard.fault(folder, deep=doubt) is None:  # what is damaged is another's to say
            rows = load(folder / shard.file)
            expected[rows["image"].numpy()] = rows[HASH].numpy()
    hashes.expect(expected, f"is not the image that {folder} was made of: {way_out}")
    hashes.hash(hashes.suspect())
    if len(odd := hashes.suspect(copies=True)) and hashes.size(odd) <= copies:
        hashes.hash(odd)
    if len(others := hashes.others()):
        shard, more = shards[int(others[0]) // there.shard_rows], len(others) - 1
        raise UserError(
            f"{folder}: {shard.file} was made of another {hashes.path(int(others[0]))} than is here"
            f"{(more and f', and {more:,} more are others') or ''}: {way_out}"
        )


def contents_of(source: Finite | Assorted, codec: Opened, plan: CachePlan) -> CacheIndex:
    """What index.json says before any shard is made. Raises UserError if there is nothing to encode."""
    if not len(source):
        raise UserError(f"there are no images to encode{f' in {plan.source}' if plan.source else ''}")
    both = codec.codec.gaussian and plan.store == "moments"
    columns: dict[str, dict[str, Any]] = {}
    for size in plan.sizes or [(plan.resolution, plan.resolution)]:
        channels, *sides = codec.codec.shape(*size)
        x, end = {"dtype": plan.dtype, "shape": (channels * (1 + both), *sides)}, plan.ending(size)
        columns |= {f"{name}{end}": x | ({"lengths": f"in{end}"} if end else {}) for name in LATENTS[: 1 + plan.flips]}
        columns |= {f"in{end}": {"dtype": "uint8"}} if end else {}
    columns |= {"labels": {"dtype": "int64"}, **({"cropped": {"dtype": "float32"}} if plan.sizes else {})}
    if hashes_of(source):
        columns |= {"image": {"dtype": "int64"}, HASH: {"dtype": "uint8", "shape": (BYTES,)}}
    said = codec.codec.facts() | {"weights": codec.codec.weights}
    of = {"codec": said, "weights": codec.sha256, "rows": len(source), "columns": columns}
    return CacheIndex.model_validate(plan.model_dump() | of)


def encoded(
    source: Finite | Assorted,
    codec: Opened,
    contents: CacheIndex,
    number: int,
    batch: int,
    behind: Callable[[int], None],
) -> list[dict[str, Tensor]]:
    """A shard's images encoded, batch by batch; `behind` hears how many are done. Raises as `encode` does."""
    places, parts = contents.span(number), list[dict[str, Tensor]]()
    for i in places[::batch]:
        signals.check()
        rows = range(i, min(i + batch, places.stop))
        for size, part, mine in stretches(source, rows, contents):
            images, labels = part.rows(slice(mine.start, mine.stop))
            if not len(images):
                continue
            images, end = check_images(images, labels, contents, i, size), contents.ending(size)
            parts.append({"labels": labels.long(), f"x{end}": codec.encode(images).cpu()})
            if isinstance(part, Album):
                parts[-1] |= part.origins(mine)
            if contents.flips:
                parts[-1][f"flipped{end}"] = codec.encode(images.flip(3)).cpu()
            if isinstance(source, Assorted):
                parts[-1]["cropped"] = source.cropped[parts[-1]["image"]]
        behind(rows.stop - places.start)
    return parts


def stretches(source: Finite | Assorted, rows: range, contents: CacheIndex) -> Iterator[tuple[Size, Finite, range]]:
    """What has a stretch of the images, by size: a source, and which of its rows."""
    if not isinstance(source, Assorted):
        yield (contents.resolution, contents.resolution), source, rows
        return
    source.look(rows)
    for k, album in source.albums(rows).items():
        yield source.sizes[k], album, range(len(album))


def pack(parts: list[dict[str, Tensor]], codec: Opened, contents: CacheIndex, number: int) -> dict[str, Tensor]:
    """A shard's tensors, as they are stored. Raises UserError if there are none, or not in the stored dtype."""
    places = contents.span(number)
    where = f"images {places.start} to {places.stop - 1}"
    if not parts:
        raise UserError(f"{where}: not one could be read")
    whole = joined(parts, contents)
    kept = {name: whole.pop(name) for name in [*whole] if name.partition(" ")[0] not in LATENTS}
    if contents.store == "samples":
        keyed = (contents.seed, "posterior", number)
        whole = {key: codec.codec.sample(x, *keyed, key, rows=range(len(x))) for key, x in whole.items()}
    whole = {key: x.to(getattr(torch, contents.dtype)) for key, x in whole.items()}
    if not all(bool(x.isfinite().all()) for x in whole.values()):
        raise UserError(f"{where}: the codec gives no numbers, or too large ones for {contents.dtype}: try float32")
    return kept | whole


def joined(parts: list[dict[str, Tensor]], contents: CacheIndex) -> dict[str, Tensor]:
    """The parts of a shard by column, images in buckets in their order in the source whatever bucket they are in."""
    if not contents.sizes:
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order, whole = torch.cat([part["image"] for part in parts]).argsort(), dict[str, Tensor]()
    for name, column in contents.columns.items():
        stem, _, end = name.partition(" ")
        if stem in LATENTS:  # those of one bucket are in order
            there = [part[name] for part in parts if name in part]
            whole[name] = torch.cat(there or [torch.zeros(0, *column.shape)])
        else:
            found = (torch.full((len(part["image"]),), f"x {end}" in part) if end else part[name] for part in parts)
            whole[name] = torch.cat([*found])[order].to(column.torch_dtype)
    return whole


def check_images(images: Tensor, labels: Tensor, contents: CacheIndex, first: int, size: Size) -> Tensor:
    """The images as floats in [-1, 1]. Raises UserError if they or their labels are not as planned."""
    whole = images.dtype == torch.uint8
    most = contents.rows if contents.captioned else max(contents.classes, 1)
    if images.shape[1:] != (3, *size):
        wrong = f" are {tuple(images.shape[1:])}, planned is {(3, *size)}"
    elif len(odd := labels[(labels < 0) | (labels >= most)]):
        wrong = f": there is a label {int(odd[0])}, and {contents.classes} classes are planned"
    elif not whole and (far := float(images.abs().max())) > 1 + 1e-4:
        wrong = f" reach {far:.4g}: give uint8, or floats in [-1, 1]"
    else:
        return from_uint8(images) if whole else images.float()
    raise UserError(f"images {first} to {first + len(images) - 1}{wrong}")
