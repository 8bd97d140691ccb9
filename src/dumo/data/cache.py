"""The cache of a data set that a codec has encoded: its format, and how it is read.

    cache.yaml                     codec, hash of its weights, resolution, crop, classes, mean, deviation, shards
    captions.jsonl                 if labels are numbers of images: what is written of each, a list of texts to a line
    shard-00000.safetensors        x, labels, and flipped where both flips are kept; total and squares per channel

`x` is what `Opened.encode` gives, so its moments where the codec has Gaussians, or one draw of them: (rows, m, y, x) in
the stored dtype. `flipped` is the same of the mirrored images; a mirrored latent would not decode to a mirrored image.
`total` and `squares` are sums of x and of E x^2 over rows and places, in float64, from which mean and deviation come.

Shards are mapped into memory, so a cache may be larger than it. All of them but the last hold the same number of rows,
less those that the source left out.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import not_
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dumo.bound import CLASSES, PIXELS, ROWS
from dumo.codecs import Codec
from dumo.codecs.scaled import Moments
from dumo.io import digest, series
from dumo.io.series import REMAKE, Shard
from dumo.io.weights import load
from dumo.types import Spec, UserError

FILE = "cache.yaml"
MAPPED = 2**14  # shards mapped at a time; Linux allows 65,530 maps. Ours
Rows = NDArray[np.generic]  # bytes of rows, or labels


class Plan(Spec):
    """How a data set is to be encoded, beside the codec."""

    source: str = ""  # what it is, in words
    resolution: int = Field(gt=0, le=PIXELS)  # pixels along a side
    crop: str = ""  # how the images came to be square, in words
    classes: int = Field(default=0, ge=0, le=CLASSES)  # labels are in [0, classes); 0: there are none, and all are 0
    names: tuple[str, ...] = ()  # of the classes
    captioned: bool = Field(default=False, exclude_if=not_)  # labels are the images' numbers in captions.jsonl
    flips: bool = True  # mirrored images, too
    store: Literal["moments", "samples"] = "moments"  # of a codec with Gaussians; others have one latent per image
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    shard_rows: int = Field(default=1024, gt=0, le=ROWS)  # images to a shard
    seed: int = 0  # of the samples


class Contents(Plan):
    """What cache.yaml says."""

    word: ClassVar[str] = "cache"
    format: Literal[1] = 1
    codec: Codec
    weights: str | None  # SHA-256 of the codec's
    images: int  # in the source
    shape: tuple[int, int, int]  # of a row of x
    mean: tuple[float, ...] = ()  # of x, per channel
    std: tuple[float, ...] = ()
    shards: tuple[Shard, ...] = ()  # none until all are written

    @property
    def count(self) -> int:
        """How many shards there are, or will be."""
        return -(-self.images // self.shard_rows)

    def span(self, number: int) -> range:
        """The source's rows in a shard."""
        return series.span(number, self.shard_rows, self.images)

    def binding(self) -> dict[str, object]:
        """What must be the same to go on; not where the weights lie, for their hash is there."""
        tree = self.model_dump(exclude={"shards": True, "mean": True, "std": True, "codec": {"weights", "sha256"}})
        codec: dict[str, object] = tree.pop("codec")
        return tree | {f"codec.{key}": value for key, value in codec.items()}


@dataclass(frozen=True)
class Cache:
    """An encoded data set, opened to read."""

    folder: Path
    contents: Contents
    codec: Codec  # in whose shift and scale rows are given
    memory: float = 0.0  # bytes of shards that are read rather than mapped

    def __len__(self) -> int:
        return self._ends[-1]

    def rows(
        self, rows: Int64[Tensor, " b"], flipped: Bool[Tensor, " b"] | None = None
    ) -> tuple[Moments, Int64[Tensor, " b"]]:
        """x in float32, or its moments (see the codec's `sample`), and labels; mirrored where `flipped` says so.

        Raises UserError if mirrored images are asked for and there are none, IndexError for a row that is not there.
        """
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows are numbered from 0 to {len(self) - 1}")
        if flipped is not None and flipped.any() and not self.contents.flips:
            raise UserError(f"{self.folder} holds no mirrored images: encode it with flips, or train without")
        dtype: torch.dtype = getattr(torch, self.contents.dtype)
        *outer, last = self.contents.shape
        raw, labels = np.empty((len(rows), *outer, last * dtype.itemsize), np.uint8), np.empty(len(rows), np.int64)
        turned = [False] * len(rows) if flipped is None else flipped.tolist()
        for i, (row, mirror) in enumerate(zip(rows.tolist(), turned, strict=True)):
            number = bisect_right(self._ends, row)
            shard, inside = self._opened(number), row - self._ends[number]  # counted from the end
            raw[i], labels[i] = shard["flipped" if mirror else "x"][inside], shard["labels"][inside]
        x, own = torch.from_numpy(raw).view(dtype).float(), self.contents.codec
        same = (own.shift, own.scale) == (self.codec.shift, self.codec.scale)
        return (x if same else self.codec.normalise(own.restore(x))), torch.from_numpy(labels)

    def fingerprint(self) -> str:
        """Of all shards' checksums."""
        return digest.short(*(f"{shard.rows} {shard.sha256}" for shard in self.contents.shards))

    @cached_property
    def labels(self) -> Int64[Tensor, " n"]:
        """Every row's label."""
        return torch.from_numpy(np.concatenate([self._opened(k)["labels"] for k in range(len(self._ends))]))

    @cached_property
    def _ends(self) -> list[int]:
        """Behind the last row of each shard."""
        return list(accumulate(shard.rows for shard in self.contents.shards))

    @cached_property
    def _opened(self) -> Callable[[int], dict[str, Rows]]:
        """The numbers of a shard: mapped into memory, where more than `memory` bytes are in all, else read."""
        mapped = sum(shard.size for shard in self.contents.shards) > self.memory

        @lru_cache(MAPPED if mapped else None)
        def opened(number: int) -> dict[str, Rows]:
            shard = self.contents.shards[number]
            tensors = load(self.folder / shard.file)
            keys, shape = ["x", *(["flipped"] if self.contents.flips else [])], (shard.rows, *self.contents.shape)
            dtype = getattr(torch, self.contents.dtype)
            right = all(key in tensors and (tensors[key].shape, tensors[key].dtype) == (shape, dtype) for key in keys)
            if not right or "labels" not in tensors or tensors["labels"].shape != shape[:1]:
                raise UserError(f"{self.folder}: {shard.file} holds other tensors than {FILE} says: {REMAKE}")
            found = {"labels": tensors["labels"].long().numpy()}
            found |= {key: tensors[key].view(torch.uint8).numpy() for key in keys}  # numpy knows no bfloat16
            return found if mapped else {key: rows.copy() for key, rows in found.items()}

        return opened


def open_cache(
    folder: Path,
    *,
    codec: Codec | None = None,
    resolution: int | None = None,
    crop: str | None = None,
    classes: int | None = None,
    names: tuple[str, ...] | None = None,
    captioned: bool | None = None,
    flips: bool | None = None,
    memory: float = 0.0,
) -> Cache:
    """Open a cache to read it as the data of a codec, a resolution, crop and classes; None: its own.

    A cache of both flips serves those who ask for one. One of at most `memory` bytes is read, not mapped. A codec that
    differs in shift and scale only still fits: rows come in its normalisation. Raises UserError where there is no
    cache, it is unfinished, a shard is missing or of another size, or what is asked is not what is there.
    """
    contents = read_contents(folder)
    if contents is None:
        raise UserError(f"{folder} is no cache (it has no {FILE}): make it with dumo encode")
    if not contents.shards:
        raise UserError(f"{folder} is unfinished: start the same dumo encode again, and it goes on where it stopped")
    asked = {
        "resolution": resolution,
        "crop": crop,
        "classes": classes,
        "names": names,
        "captioned": captioned,
        "flips": flips or None,
    }
    lines = [f"{name}: {getattr(contents, name)} in the cache, {value} asked"
             for name, value in asked.items() if value not in (None, getattr(contents, name))]  # fmt: skip
    lines += [] if codec is None else differences(contents, codec)
    if lines:
        listed = "\n  ".join(lines)
        raise UserError(f"{folder} does not fit:\n  {listed}\nEncode the data for this, or ask for what is there")
    series.require(folder, contents.shards)
    return Cache(folder, contents, codec or contents.codec, memory)


def differences(contents: Contents, codec: Codec) -> Iterator[str]:
    """A line per way in which a codec would have given another latent; shift and scale do not matter.

    Weights are the same if their SHA-256 is, or, where the codec does not ask for one, if they have the same name.
    """
    free = {"shift", "scale", "weights", "sha256"}
    here, there = contents.codec.model_dump(exclude=free), codec.model_dump(exclude=free)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            yield f"codec.{name}: {here.get(name)} in the cache, {there.get(name)} asked"
    if codec.kind != contents.codec.kind:
        return
    if codec.sha256 is not None and codec.sha256 != contents.weights:
        yield f"codec.sha256: {contents.weights} in the cache, {codec.sha256} asked"
    elif codec.sha256 is None and codec.weights != contents.codec.weights:
        yield (
            f"codec.weights: {contents.codec.weights} in the cache, {codec.weights} asked "
            f"(if they are the same, set codec.sha256={contents.weights})"
        )


def read_contents(folder: Path) -> Contents | None:
    """What cache.yaml says, or None where there is none. Raises UserError if it is damaged."""
    return series.read(folder / FILE, Contents)


def sums(x: Moments, channels: int) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Sums over rows and places of x and of E x^2 = mean^2 + deviation^2, per channel, in float64."""
    mean, *deviation = x.double().split(channels, 1)
    squares = mean.square() + sum((d.square() for d in deviation), torch.zeros(()))
    return mean.sum((0, 2, 3)), squares.sum((0, 2, 3))
