"""Make the cache that a recipe trains on: where images, a codec and a folder meet.

By any number of ranks, which need not run at once; a killed one is started again, and the cache is the same to the last
bit. What is damaged is found, named and made anew (see `dumo.data.cache`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from dumo.data import Latents, cache
from dumo.data.cache import Contents, Plan, read_contents
from dumo.data.caption import Files
from dumo.data.image import below
from dumo.io.read import brief, user_path
from dumo.io.table import Done
from dumo.run import text
from dumo.run.config.change import override
from dumo.run.config.load import FILE, load, parse
from dumo.run.config.resolve import resolve
from dumo.run.config.spec import Run
from dumo.runtime import dist
from dumo.runtime.progress import Bar, no_bar
from dumo.types import Spec, UserError

LONG = 40  # characters of a part: ours


class Place(Spec):
    """The part of a run that says what images to encode."""

    data: Latents


@dataclass(frozen=True)
class Encoded:
    """What this rank did, and what was in the folder when it was done."""

    folder: Path
    done: Done
    contents: Contents | None  # of a cache that is whole; None: other ranks have shards to make

    def now(self) -> "Encoded":
        """The same, where other ranks may have finished since."""
        there = self.contents or read_contents(self.folder)
        return replace(self, contents=there if there and there.shards else None)


@dataclass(frozen=True)
class Work:
    """What there is to encode: images, the captions of a run that reads a table of them, or both."""

    data: Latents | None
    run: Run | None = None


def work_of(
    source: str, overrides: Sequence[str] = (), *, out: str | None, codec: str | None, side: int | None
) -> Work:
    """What to encode, and into which folders: as a recipe says, or a place of images and options.

    Raises UserError where the recipe trains on neither latents nor a table of texts, or an option is missing.
    """
    sets = [*settings(out, codec, side), *overrides]
    path = user_path(source, "the source")
    if not path.exists() or (path / FILE).exists() or path.suffix in (".yaml", ".yml"):
        run = resolve(load(source, sets))
        data, reads = run.data if isinstance(run.data, Latents) else None, text.asked(run) is not None
        if data is None and not reads:
            raise UserError(
                f"{source} trains on data '{run.data.kind}', not on latents, and its net reads no captions: there is "
                "nothing to encode"
            )
        return Work(data, run if reads else None)
    if None in (out, codec, side):
        raise UserError(f"{source} holds images: say by which --codec, of how many pixels --side, and where to, OUT")
    tree: dict[str, Any] = {"data": {"kind": "latents", "images": {"root": source, "flip": True}}}
    override(tree, sets)
    return Work(parse(Place, tree).data.found())


def settings(out: str | None, codec: str | None, side: int | None) -> list[str]:
    """What these options set of a recipe, as --set takes it."""
    given = {"data.root": out, "data.codec.kind": codec, "data.images.side": side}
    return [f"{name}={value}" for name, value in given.items() if value is not None]


def encode(
    data: Latents,
    *,
    batch: int = 32,
    part: tuple[int, int] = (0, 1),
    device: str = "auto",
    bar: Bar = no_bar,
    **options: object,
) -> Encoded:
    """Make shards k, k + n, k + 2 n ... of the cache, `part` being (k, n), with mirrored images where data are flipped.

    `options` are fields of the `Plan`: store, dtype, shard_rows, seed. Raises UserError as opening the images or the
    codec does, for an option that is none, and where the folder holds something else.
    """
    (rank, world), images = part, data.images
    opened, album = data.codec.open(dist.device(device)), data.rows()
    numbered = isinstance(data.captions, Files)
    tree = {
        "source": " ".join(word for word in (images.root, images.split) if word),
        "fingerprint": album.fingerprint(),
        "resolution": images.side,
        "crop": images.crop,
        "classes": images.labels,
        "names": () if numbered else album.names,
        "captioned": numbered,
        "flips": images.flip,
    }
    plan = parse(Plan, tree | options)
    mine = range(rank, ceil(len(album) / plan.shard_rows), world)
    total = sum(min(plan.shard_rows, len(album) - k * plan.shard_rows) for k in mine)
    with bar(f"encoding {images.root}", total) as tick, below("data.images"):
        captions = images.all_captions() if numbered else None
        done = cache.encode(
            album, opened, plan, data.folder, captions=captions, batch=batch, rank=rank, world=world, tick=tick
        )
    return Encoded(data.folder, done, None if done.missing else read_contents(data.folder))


def ensure(data: Latents, *, device: str = "auto", bar: Bar = no_bar) -> None:
    """Make the cache if it is not there, or go on with it if it is not finished. Raises UserError as `encode` does."""
    contents = read_contents(data.folder)
    if contents is None or not contents.shards:
        encode(data, device=device, bar=bar)


def part_of(text: str | None) -> tuple[int, int]:
    """'2/8' as (2, 8); None: this process's rank and how many there are, as torchrun says. Raises UserError."""
    if text is None:
        return dist.launched()
    k, _, n = text.partition("/")
    if len(text) > LONG or not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise UserError(f"--part {brief(text)}: write K/N with K from 0 to N - 1, such as 0/8")
    return int(k), int(n)


def lines(made: Encoded) -> Iterator[str]:
    """What was done, in lines: what was damaged, and what is there."""
    done, contents = made.done, made.contents
    yield from (f"was damaged and is made again: {what}" for what in done.damaged)
    if contents is None:
        yield f"{made.folder}: {done.made} shards made, {done.missing} are still to be made by others"
        return
    rows = sum(shard.rows for shard in contents.shards)
    lost = f" ({contents.rows - rows} could not be read)" if rows < contents.rows else ""
    yield f"{made.folder}: {rows:,} images{lost} as {contents.shape} in {contents.dtype}, {done.made} shards made now"
