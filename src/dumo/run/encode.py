"""Make the folders that a recipe trains on: a cache of latents of images, and a table of encoded captions.

Any number of ranks may share the work, and need not run at once; a killed one is started again, and the folder is the
same to the last bit. What is damaged is named and made again (`dumo.io.table`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dumo.config.change import override
from dumo.config.load import load, parse
from dumo.config.source import choose
from dumo.config.spec import Run
from dumo.data import Data, Latents, Moons, cache
from dumo.data.caption import Files
from dumo.data.image import below
from dumo.encoders import texttable
from dumo.io import table
from dumo.io.file import locked
from dumo.io.read import brief
from dumo.io.table import Done, Index
from dumo.nets import Net
from dumo.nets.table import PipelineTexts, Tabled
from dumo.nets.text import Learned
from dumo.run.prompt import sources
from dumo.run.resolve import resolve
from dumo.runtime import dist, threads
from dumo.runtime.progress import Bar, no_bar, teller
from dumo.types import Spec, UserError

LONG = 40  # characters of a part: ours
SHARD_ROWS = 1024  # ours


class Place(Spec):
    """The part of a run that says what images to encode."""

    data: Latents


@dataclass(frozen=True)
class Made:
    """What this rank did in a folder."""

    folder: Path
    done: Done
    kind: type[Index]

    @property
    def contents(self) -> Index | None:
        """What is in the folder now; None: other ranks have shards to make."""
        there = table.read(self.folder, self.kind)
        return there if there and there.shards else None

    def lines(self) -> Iterator[str]:
        """What was done, in lines: what was damaged, and what is there."""
        yield from (f"was damaged and is made again: {what}" for what in self.done.damaged)
        if there := self.contents:
            yield f"{self.folder}: {there.summary()}, {self.done.made} shards made now"
            if isinstance(there, cache.Contents) and there.sizes:
                yield f"images are in {cache.crops(table.Table(self.folder, there))}"
        else:
            yield f"{self.folder}: {self.done.made} shards made, {self.done.missing} are still to be made by others"


@dataclass(frozen=True)
class Work:
    """What there is to encode: the images of latents, the captions of data for a table of texts, or both."""

    data: Data
    texts: Tabled | None = None


def work_of(
    source: str, overrides: Sequence[str] = (), *, out: str | None, codec: str | None, side: int | None
) -> Work:
    """What to encode, and into which folders: as a recipe says, or a place of images and options.

    Raises UserError where the recipe trains on neither latents nor a table of texts, or an option is missing.
    """
    sets = [*settings(out, codec, side), *overrides]
    if choose(source).kind != "images":
        run = resolve(load(source, sets))
        texts = table_of(run.net)
        if not isinstance(run.data, Latents) and texts is None:
            raise UserError(
                f"{source} trains on data '{run.data.kind}', not on latents, and its net reads no captions: there is "
                "nothing to encode"
            )
        return Work(run.data, texts)
    if None in (out, codec, side):
        raise UserError(f"{source} holds images: say by which --codec, of how many pixels --side, and where to, OUT")
    tree: dict[str, Any] = {"data": {"kind": "latents", "images": {"root": source, "flip": True}}}
    override(tree, sets)
    return Work(parse(Place, tree).data.found())


def settings(out: str | None, codec: str | None, side: int | None) -> list[str]:
    """What these options set of a recipe, as --set takes it."""
    given = {"data.root": out, "data.codec.kind": codec, "data.images.side": side}
    return [f"{name}={value}" for name, value in given.items() if value is not None]


def part_of(text: str | None) -> tuple[int, int]:
    """'2/8' as (2, 8); None: this process's rank and how many there are, as torchrun says. Raises UserError."""
    if text is None:
        return dist.torchrun_rank_and_world()
    k, _, n = text.partition("/")
    if len(text) > LONG or not (k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise UserError(f"--part {brief(text)}: write K/N with K from 0 to N - 1, such as 0/8")
    return int(k), int(n)


def encode(
    data: Latents,
    *,
    batch: int = 32,
    part: tuple[int, int] = (0, 1),
    device: str = "auto",
    bar: Bar = no_bar,
    verify: bool = False,
    **options: object,
) -> Made:
    """Make shards k, k + n, k + 2 n ... of the cache, `part` being (k, n), with mirrored images where data are flipped.

    `verify`: all images are hashed first, whatever is noted of them. `options` are fields of the `Plan`: store,
    dtype, shard_rows, seed. Raises UserError as opening the images or the codec does, for an option that is none, and
    where the folder holds something else, or what was made of other images.
    """
    (rank, world), images = part, data.images
    here = dist.device(device)
    opened, album = data.codec.open(here), data.rows()
    if verify:
        album.hashes.forget()
        album.hashes.hash(range(len(album)))
    numbered = isinstance(data.captions, Files)
    tree = {
        "source": " ".join(word for word in (images.root, images.split) if word),
        "fingerprint": album.hashes.title(),
        "resolution": images.side,
        "sizes": images.sizes,
        "crop": images.crop,
        "classes": images.labels,
        "names": () if numbered else album.names,
        "captioned": numbered,
        "flips": images.flip,
    }
    plan = parse(cache.Plan, tree | options)
    with (
        threads.fewer_when_busy(here, teller(bar)),
        bar(f"encoding {images.root}", table.share(len(album), plan.shard_rows, *part)) as tick,
        below("data.images"),
    ):
        captions = images.all_captions() if numbered else None
        done = cache.encode(
            album, opened, plan, data.folder, captions=captions, batch=batch, rank=rank, world=world, tick=tick
        )
    return Made(data.folder, done, cache.Contents)


def ensure(data: Latents, *, device: str = "auto", bar: Bar = no_bar) -> None:
    """Make the cache if it is not there, or go on with it if it is not finished. Raises UserError as `encode` does."""
    contents = cache.read_contents(data.folder)
    if contents is None or not contents.shards:
        encode(data, device=device, bar=bar)


def table_of(net: Net) -> Tabled | None:
    """The table of texts that a net reads, if it reads one."""
    texts = net.texts
    return texts if isinstance(texts, Tabled) else None


def captions(data: Data) -> Sequence[str]:
    """The captions of the data, by number. Raises UserError where there are none, and as the data's `caption_texts`."""
    if isinstance(data, Moons) or data.captions is None:
        raise UserError(f"data '{data.kind}' give no captions to encode: set data.captions, or net.texts=null")
    return data.caption_texts()


def too_large(data: Data, spec: Tabled) -> str:
    """Why no table of the data's captions is made, in a line; empty: it is. Raises as `captions`."""
    return spec.too_large(len(captions(data))) if isinstance(spec, PipelineTexts) else ""


def encode_texts(
    data: Data,
    spec: Tabled,
    *,
    batch: int = 32,
    shard_rows: int = SHARD_ROWS,
    part: tuple[int, int] = (0, 1),
    device: str = "auto",
    bar: Bar = no_bar,
) -> Made:
    """Make shards k, k + n, k + 2 n ... of the table, `part` being (k, n). Raises as `texttable.encode`."""
    texts, (rank, world) = captions(data), part
    files = data.images.edited() if isinstance(data, Latents) and data.images.source else {}
    here = dist.device(device)
    with (
        threads.fewer_when_busy(here, teller(bar)),
        bar("encoding captions", table.share(len(texts) + 1, shard_rows, *part)) as tick,
    ):
        done = texttable.encode(
            texts,
            spec.by,
            spec.folder,
            shard_rows=shard_rows,
            batch=batch,
            sources=sources(data, here, files.__getitem__),
            rank=rank,
            world=world,
            device=here,
            tick=tick,
        )
    return Made(spec.folder, done, texttable.Contents)


def make_tokens(run: Run) -> None:
    """Make the ids of the captions' tokens where the run reads them and they are not there: they cost nothing.

    Raises UserError where the folder holds those of other captions.
    """
    spec = table_of(run.net)
    if isinstance(spec, Learned):
        lock = spec.folder.with_name(f".{spec.folder.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):  # runs that start together make it once
            encode_texts(run.data, spec)
