"""Encode a data set into a cache, shard by shard: by any number of ranks, and killed and started again at will.

What is in a shard depends on its number alone (`dumo.io.series`): it is encoded in the same batches from its own first
row, and its draws have a stream of their own.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dumo import stop
from dumo.codecs.scaled import Opened
from dumo.data import line
from dumo.data.cache import FILE, Contents, Plan, read_contents, sums
from dumo.data.source import Finite
from dumo.io import series
from dumo.io.picture import from_uint8
from dumo.io.series import Done, Tick
from dumo.io.weights import load
from dumo.texts.caption import Captions
from dumo.types import UserError


def encode(
    source: Finite,
    codec: Opened,
    plan: Plan,
    out: Path,
    *,
    captions: Captions | None = None,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    tick: Tick = lambda done, note: None,
) -> Done:
    """Make those of this rank's shards that are not there, or damaged. Another batch may move the last bits.

    `captions` of images that are labelled by their numbers are kept beside them. Raises UserError where `out` holds
    another cache, other captions or something else, an image or a label is not as planned, a latent
    is too large for the dtype, or the disk is full, OSError where nothing can be written, Stopped where that is asked;
    the shards that stand are kept.
    """
    contents = described(source, codec, plan)
    if captions:
        line.require(out / line.FILE, captions)

    def shard(number: int, behind: Callable[[int], None]) -> tuple[int, dict[str, Tensor]]:
        parts: list[dict[str, Tensor]] = []
        for done, part in batches(source, codec, contents, number, batch):
            parts.append(part)
            behind(done)
        tensors = packed(parts, codec, contents, number)
        return len(tensors["labels"]), tensors

    made, damaged = series.make(
        out / FILE, contents, lambda: read_contents(out), shard, rank=rank, world=world, tick=tick
    )
    if captions:
        series.write(out / line.FILE, line.dump(captions), rank)
    return Done(made, damaged, gather(out, contents, rank))


def described(source: Finite, codec: Opened, plan: Plan) -> Contents:
    """What cache.yaml says before any shard is made. Raises UserError if there is nothing to encode."""
    if not len(source):
        raise UserError(f"there are no images to encode{f' in {plan.source}' if plan.source else ''}")
    channels, height, width = codec.shape(plan.resolution)
    both = codec.codec.gaussian and plan.store == "moments"
    tree = plan.model_dump() | {"codec": codec.codec.model_dump(), "weights": codec.sha256, "images": len(source)}
    return Contents.model_validate(tree | {"shape": (channels * (1 + both), height, width)})


def batches(
    source: Finite, codec: Opened, contents: Contents, number: int, batch: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """A shard's images encoded, batch by batch, each with how many images are behind it. Raises as `encode` does."""
    places = contents.span(number)
    for i in places[::batch]:
        stop.check()
        images, labels = source.rows(slice(i, min(i + batch, places.stop)))
        if len(images):
            images = checked(images, labels, contents, i)
            part = {"labels": labels.long(), "x": codec.encode(images).cpu()}
            if contents.flips:
                part["flipped"] = codec.encode(images.flip(3)).cpu()
            yield min(i + batch, places.stop) - places.start, part


def packed(parts: list[dict[str, Tensor]], codec: Opened, contents: Contents, number: int) -> dict[str, Tensor]:
    """A shard's tensors, as they are stored. Raises UserError if there are none, or not in the stored dtype."""
    places = contents.span(number)
    where = f"images {places.start} to {places.stop - 1}"
    if not parts:
        raise UserError(f"{where}: not one could be read")
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    labels = whole.pop("labels")
    if contents.store == "samples":
        keyed = (contents.seed, "posterior", number)
        whole = {key: codec.sample(x, *keyed, key, rows=range(len(x))) for key, x in whole.items()}
    whole = {key: x.to(getattr(torch, contents.dtype)) for key, x in whole.items()}
    each = [sums(x, codec.codec.channels) for x in whole.values()]
    total, squares = (torch.stack(side).sum(0) for side in zip(*each, strict=True))
    if not bool((total + squares).isfinite().all()):
        raise UserError(f"{where}: the codec gives no numbers, or too large ones for {contents.dtype}: try float32")
    return whole | {"labels": labels, "total": total, "squares": squares}


def checked(images: Tensor, labels: Tensor, contents: Contents, first: int) -> Tensor:
    """The images as floats in [-1, 1]. Raises UserError if they or their labels are not as planned."""
    side, where = contents.resolution, f"images {first} to {first + len(images) - 1}"
    if images.shape[1:] != (3, side, side):
        raise UserError(f"{where} are {tuple(images.shape[1:])}, planned is (3, {side}, {side})")
    most = contents.images if contents.captioned else max(contents.classes, 1)
    if len(wrong := labels[(labels < 0) | (labels >= most)]):
        raise UserError(f"{where}: there is a label {int(wrong[0])}, and {contents.classes} classes are planned")
    if images.dtype == torch.uint8:
        return from_uint8(images)
    if float(images.abs().max()) > 1 + 1e-4:
        raise UserError(f"{where} reach {float(images.abs().max()):.4g}: give uint8, or floats in [-1, 1]")
    return images.float()


def gather(out: Path, contents: Contents, rank: int) -> int:
    """Finish cache.yaml if all shards are written. Returns how many are not."""
    whole = series.standing(out, contents.count, lambda: read_contents(out))
    if len(whole) < contents.count:
        return contents.count - len(whole)
    total = squares = torch.zeros(contents.codec.channels, dtype=torch.float64)
    for note in whole:
        shard = load(out / note.file)
        total, squares = total + shard["total"], squares + shard["squares"]
    n = sum(note.rows for note in whole) * (1 + contents.flips) * contents.shape[1] * contents.shape[2]
    mean, std = total / n, (squares / n - (total / n).square()).clamp(min=0).sqrt()
    told = {"mean": tuple(mean.tolist()), "std": tuple(std.tolist()), "shards": whole}
    begun = read_contents(out) or contents  # which may name another place of the weights
    series.finish(out / FILE, begun.model_copy(update=told), contents.count, rank)
    return 0
