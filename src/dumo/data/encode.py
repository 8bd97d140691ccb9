"""Encode a data set into a cache, shard by shard: by any number of ranks, and killed and started again at will.

What is in a shard depends on its number alone: it is encoded in the same batches from its own first row, and its draws
have a stream of their own. It is written beside its place, flushed and renamed; then so is a note of its size and
checksum, `shard-00000.json`. A shard without a note, or that differs from it, is made again. So it never matters who
made it, or how often that was interrupted. Rank k of n makes the shards k, k + n, k + 2 n ...; the ranks need not run
at once, nor know of each other. Whoever finds the last note in its place gathers them all in cache.yaml.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from dumo import stop
from dumo.codecs.scaled import Opened
from dumo.data.cache import FILE, Contents, Plan, Shard, dump, read_contents, sums
from dumo.data.source import Finite
from dumo.io import digest
from dumo.io import file as files
from dumo.io.picture import from_uint8
from dumo.io.weights import load
from dumo.types import UserError

Tick = Callable[[int, str], None]  # (this rank's images behind it, a note)


@dataclass(frozen=True)
class Done:
    """What a rank did."""

    made: int  # shards
    damaged: tuple[str, ...]  # those of them that stood there, and what was wrong with them
    missing: int  # shards that other ranks have yet to make; 0: the cache is whole


def encode(
    source: Finite,
    codec: Opened,
    plan: Plan,
    out: Path,
    *,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    tick: Tick = lambda done, note: None,
) -> Done:
    """Make those of this rank's shards that are not there, or damaged. Another batch may move the last bits.

    Raises UserError where `out` holds another cache or something else, an image or a label is not as planned, a latent
    is too large for the dtype, or the disk is full, OSError where nothing can be written, Stopped where that is asked;
    the shards that stand are kept.
    """
    files.check_writable(out)
    contents = claim(out, described(source, codec, plan), rank)
    sweep(out, rank, world)
    notes = noted(out, contents)
    made, done, damaged = 0, 0, list[str]()
    for number in range(rank, contents.count, world):
        note, title = notes.get(number), name(number)
        if note and (fault := note.fault(out, deep=True)):
            damaged.append(f"{note.file} {fault}")
            note, title = None, f"{damaged[-1]}, made again"
        if note is None:
            parts: list[dict[str, Tensor]] = []
            for behind, part in batches(source, codec, contents, number, batch):
                parts.append(part)
                tick(done + behind, title)
            shard = packed(parts, codec, contents, number)
            claim(out, contents, rank)  # raises where another took the folder, as long as it was empty
            store(out, number, shard, rank)
            made += 1
        done += len(span(contents, number))
        tick(done, title)
    return Done(made, tuple(damaged), gather(out, contents, rank))


def described(source: Finite, codec: Opened, plan: Plan) -> Contents:
    """What cache.yaml says before any shard is made. Raises UserError if there is nothing to encode."""
    if not len(source):
        raise UserError(f"there are no images to encode{f' in {plan.source}' if plan.source else ''}")
    channels, height, width = codec.shape(plan.resolution)
    both = codec.codec.gaussian and plan.store == "moments"
    tree = plan.model_dump() | {"codec": codec.codec.model_dump(), "weights": codec.sha256, "images": len(source)}
    return Contents.model_validate(tree | {"shape": (channels * (1 + both), height, width)})


def claim(out: Path, contents: Contents, rank: int) -> Contents:
    """Take the folder, or go on in it; what its cache.yaml says, without shards. Raises UserError if it is taken."""
    there = read_contents(out)
    if there is not None and not there.shards and not any(out.glob("shard-*.json")) and flat(there) != flat(contents):
        there = None  # begun, and stopped before anything was made: that binds nobody
    if there is None:
        taken = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
        if taken and not (out / FILE).exists():  # not where another rank has begun meanwhile
            raise UserError(f"{out} is not empty and holds no {FILE}: give another folder")
        write(out / FILE, dump(contents).encode(), rank)
        return contents
    old, new = (flat(side) for side in (there, contents))
    if lines := [f"{key}: {old[key]} there, {new[key]} now" for key in new if old.get(key) != new[key]]:
        listed = "\n  ".join(lines)
        raise UserError(f"{out} holds another cache:\n  {listed}\nGive another folder, or remove this one")
    return there.model_copy(update={"shards": (), "mean": (), "std": ()})


def flat(contents: Contents) -> dict[str, object]:
    """What must be the same to go on; not where the weights lie, for their hash is there."""
    tree = contents.model_dump(exclude={"shards": True, "mean": True, "std": True, "codec": {"weights", "sha256"}})
    codec: dict[str, object] = tree.pop("codec")
    return tree | {f"codec.{key}": value for key, value in codec.items()}


def batches(
    source: Finite, codec: Opened, contents: Contents, number: int, batch: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """A shard's images encoded, batch by batch, each with how many images are behind it. Raises as `encode` does."""
    places = span(contents, number)
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
    places = span(contents, number)
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
    if len(wrong := labels[(labels < 0) | (labels >= max(contents.classes, 1))]):
        raise UserError(f"{where}: there is a label {int(wrong[0])}, and {contents.classes} classes are planned")
    if images.dtype == torch.uint8:
        return from_uint8(images)
    if float(images.abs().max()) > 1 + 1e-4:
        raise UserError(f"{where} reach {float(images.abs().max()):.4g}: give uint8, or floats in [-1, 1]")
    return images.float()


def store(out: Path, number: int, tensors: dict[str, Tensor], rank: int) -> None:
    """Write a shard, then its note."""
    data, file = safetensors.torch.save(tensors), f"{name(number)}.safetensors"
    note = Shard(file=file, rows=len(tensors["labels"]), size=len(data), sha256=digest.of_bytes(data))
    write(out / file, data, rank)
    write(out / f"{name(number)}.json", note.model_dump_json().encode(), rank)


def noted(out: Path, contents: Contents) -> dict[int, Shard]:
    """The shards that were written whole, by number: by their notes, else by cache.yaml."""
    notes: dict[int, Shard] = {}
    for number in range(contents.count):
        try:
            notes[number] = Shard.model_validate_json((out / f"{name(number)}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            continue
    there = read_contents(out)  # after the notes: they are removed when it has them
    return dict(enumerate(there.shards if there else ())) | notes


def gather(out: Path, contents: Contents, rank: int) -> int:
    """Finish cache.yaml if all shards are written, and remove their notes. Returns how many are not."""
    notes = noted(out, contents)
    whole = [
        note for number in range(contents.count) if (note := notes.get(number)) and not note.fault(out, deep=False)
    ]
    if len(whole) < contents.count:
        return contents.count - len(whole)
    total = squares = torch.zeros(contents.codec.channels, dtype=torch.float64)
    for note in whole:
        shard = load(out / note.file)
        total, squares = total + shard["total"], squares + shard["squares"]
    n = sum(note.rows for note in whole) * (1 + contents.flips) * contents.shape[1] * contents.shape[2]
    mean, std = total / n, (squares / n - (total / n).square()).clamp(min=0).sqrt()
    told = {"mean": tuple(mean.tolist()), "std": tuple(std.tolist()), "shards": tuple(whole)}
    write(out / FILE, dump(contents.model_copy(update=told)).encode(), rank)
    for number in range(contents.count):
        (out / f"{name(number)}.json").unlink(missing_ok=True)
    return 0


def write(file: Path, data: bytes, rank: int) -> None:
    """Write a file beside its place, wait until it is on the disk, and move it there whole."""
    try:
        files.write(file, data, writer=rank, durable=True)
    except OSError as error:
        if files.full(error):
            raise UserError(
                f"{file}: the disk is full ({error.strerror}); free some space and start again, what stands is kept"
            ) from error
        raise


def sweep(out: Path, rank: int, world: int) -> None:
    """Remove what a killed rank left half-written: one of this number, or of one that no rank has now."""
    for half in out.glob(".*.tmp"):
        writer = half.suffixes[-2][1:] if len(half.suffixes) > 1 else ""
        if writer.isdecimal() and int(writer) % world == rank:
            files.remove(half)


def name(number: int) -> str:
    """A shard's, without its ending."""
    return f"shard-{number:05d}"


def span(contents: Contents, number: int) -> range:
    """The source's rows in a shard."""
    first = number * contents.shard_rows
    return range(first, min(first + contents.shard_rows, contents.images))
