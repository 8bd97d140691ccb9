"""Make the folders that a recipe trains on: a cache of latents of images, and a table of encoded captions.

`encoding_work` says what a recipe, or a folder of images with options, has to encode. `encode` makes the cache,
`encode_texts` the table, and both return an `EncodeResult`. Any number of ranks may share the work, and need not run at
once; a killed one is started again, and the folder is the same to the last bit. What is damaged is named and made again
(`dumo.io.table`).
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dumo.config.change import override
from dumo.config.load import load, parse
from dumo.config.source import RunText, choose
from dumo.config.spec import Run
from dumo.data import Data, Latents, Moons, cache, encoding
from dumo.data.caption import CaptionFiles
from dumo.data.image import errors_of_latents
from dumo.encoders import texttable
from dumo.io import table
from dumo.io.file import locked
from dumo.io.read import brief
from dumo.io.table import MakeResult, TableIndex
from dumo.nets import Net
from dumo.nets.table import PipelineTexts, TableTexts
from dumo.nets.text import LearnedTexts
from dumo.run.prompt import open_source_images
from dumo.run.resolve import resolve
from dumo.runtime import dist, signals, threads
from dumo.runtime.device import choose_device
from dumo.runtime.progress import Bar, line_printer, no_bar
from dumo.types import Spec, UserError

MAX_PART_CHARACTERS = 40  # of --part: ours
SHARD_ROWS = 1024  # images or captions to a shard: ours


class _LatentsOnly(Spec):
    """The part of a run that is needed to encode a folder of images."""

    data: Latents


@dataclass(frozen=True)
class EncodeResult:
    """What this rank did in a folder."""

    folder: Path
    done: MakeResult
    kind: type[TableIndex]

    @property
    def contents(self) -> TableIndex | None:
        """What is in the folder now; None: other ranks have shards to make."""
        index = table.read(self.folder, self.kind)
        return index if index and index.shards else None

    def lines(self) -> Iterator[str]:
        """What was done, in lines: what was damaged, and what is in the folder."""
        for damaged in self.done.damaged:
            yield f"was damaged and is made again: {damaged}"
        contents = self.contents
        if contents is None:
            yield f"{self.folder}: {self.done.made} shards made, {self.done.missing} are still to be made by others"
            return
        yield f"{self.folder}: {contents.summary()}, {self.done.made} shards made now"
        if isinstance(contents, cache.CacheIndex) and contents.sizes:
            yield f"images are in {cache.measure_crops(table.ShardTable(self.folder, contents), contents)}"


@dataclass(frozen=True)
class EncodingWork:
    """What there is to encode: the images of latents, the captions of data for a table of texts, or both."""

    data: Data
    texts: TableTexts | None = None


def encoding_work(
    source: str,
    overrides: Sequence[str] = (),
    *,
    text: RunText | None = None,
    out: str | None,
    codec: str | None,
    side: int | None,
    count: int | None = None,
) -> EncodingWork:
    """What to encode, and into which folders: as a recipe says, or a folder of images and options.

    `text` is that of the recipe or run, where it has been read.
    Raises UserError where the recipe trains on neither latents nor a table of texts, an option is missing, or the
    pipeline lacks a text encoder: images may take hours, and captions come after them.
    """
    settings = [*options_as_settings(out, codec, side, count), *overrides]
    if choose(source).kind != "images":
        run = resolve(load(text or source, settings))
        texts = _table_of(run.net)
        if not isinstance(run.data, Latents) and texts is None:
            raise UserError(
                f"{source} trains on data '{run.data.kind}', not on latents, and its net reads no captions: there is "
                "nothing to encode"
            )
        if isinstance(texts, PipelineTexts):
            texts.pipeline.require_text_files()
        return EncodingWork(run.data, texts)
    if None in (out, codec, side):
        raise UserError(
            f"a folder of images needs OUT, --codec and --side: dumo encode {source} OUT --codec taef2 --side 256"
        )
    tree: dict[str, Any] = {"data": {"kind": "latents", "images": {"root": source, "flip": True}}}
    override(tree, settings)
    return EncodingWork(parse(_LatentsOnly, tree).data.with_facts())


def options_as_settings(out: str | None, codec: str | None, side: int | None, count: int | None) -> list[str]:
    """The options of `dumo encode` as settings of a recipe: FIELD=VALUE, as --set takes them."""
    fields = {"data.root": out, "data.codec.kind": codec, "data.images.side": side, "data.images.count": count}
    return [f"{field}={value}" for field, value in fields.items() if value is not None]


def parse_part(text: str | None) -> tuple[int, int]:
    """'2/8' as (2, 8); None: this process's rank and how many there are, as torchrun says. Raises UserError."""
    if text is None:
        return dist.torchrun_rank_and_world()
    k, _, n = text.partition("/")
    is_part = len(text) <= MAX_PART_CHARACTERS and k.isdecimal() and n.isdecimal() and int(k) < int(n)
    if not is_part:
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
    new_shard_rows: int = SHARD_ROWS,
    **options: object,
) -> EncodeResult:
    """Make shards k, k + n, k + 2 n ... of the cache, `part` being (k, n), with mirrored images where data are flipped.

    `verify`: all images are hashed first, whatever is noted of them. `options` are fields of the `CachePlan`: store,
    dtype, shard_rows, seed. Without `shard_rows` a cache that is begun keeps its own, and a new one takes
    `new_shard_rows`. Raises UserError where the images or the codec cannot be opened, an option is no field of the
    plan, or the folder holds something else, or a cache of other images.
    """
    rank, world_size = part
    torch_device = choose_device(device)
    images = data.images
    codec = data.codec.open(torch_device)
    album = data.rows()
    if verify:
        album.hashes.forget()
        album.hashes.hash(range(len(album)))
    is_captioned = isinstance(data.captions, CaptionFiles)
    begun = cache.read_index(data.folder)
    plan_fields = {
        "shard_rows": begun.shard_rows if begun else new_shard_rows,
        "source": " ".join(word for word in (images.root, images.split) if word),
        "fingerprint": album.hashes.fingerprint(),
        "resolution": images.side,
        "sizes": images.sizes,
        "crop": images.crop,
        "classes": images.labels,
        "names": () if is_captioned else album.names,
        "captioned": is_captioned,
        "first_images": images.count or 0,
        "flips": images.flip,
    }
    plan = parse(cache.CachePlan, plan_fields | options)
    rows_to_read = table.rows_of_rank(len(album), plan.shard_rows, rank, world_size)
    with (
        threads.fewer_when_busy(torch_device, line_printer(bar)),
        bar(f"encoding {images.root}", rows_to_read) as tick,
        errors_of_latents(),
    ):
        done = encoding.encode(
            album,
            codec,
            plan,
            data.folder,
            captions=images.all_captions() if is_captioned else None,
            batch=batch,
            rank=rank,
            world=world_size,
            tick=tick,
        )
    return EncodeResult(data.folder, done, cache.CacheIndex)


def ensure_cache(
    data: Latents,
    *,
    device: str,
    bar: Bar,
    new_shard_rows: int = SHARD_ROWS,
    while_waiting: Callable[[], object] = signals.check,
) -> None:
    """Make the cache if it is missing, or finish one that is not whole. Takes and raises as `encode`.

    Processes that start together make it once. The others wait, and call `while_waiting` again and again; what that
    raises ends the wait.
    """
    if cache.is_whole(data.folder):
        return
    with _locked_to_fill(data.folder, while_waiting):
        if not cache.is_whole(data.folder):  # nobody made it while this process waited
            encode(data, device=device, bar=bar, new_shard_rows=new_shard_rows)


@contextmanager
def _locked_to_fill(folder: Path, while_waiting: Callable[[], object] = signals.check) -> Generator[None, None, None]:
    """Hold the lock of a folder that is to be filled, a file next to it.

    Waits while another process holds it, and calls `while_waiting` meanwhile, which ends the wait by raising.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, while_waiting=while_waiting):
        yield


def _table_of(net: Net) -> TableTexts | None:
    """The spec of the table of texts that a net reads; None: it reads none."""
    texts = net.texts
    return texts if isinstance(texts, TableTexts) else None


def captions(data: Data) -> Sequence[str]:
    """The captions of the data, by number. Raises UserError where there are none, and as the data's `caption_texts`."""
    if isinstance(data, Moons) or data.captions is None:
        raise UserError(f"data '{data.kind}' give no captions to encode: set data.captions, or net.texts=null")
    return data.caption_texts()


def reason_not_to_encode(data: Data, spec: TableTexts) -> str:
    """A line that says why no table of the data's captions is made, because it would be too large; empty: it is made.

    Raises as `captions`.
    """
    if not isinstance(spec, PipelineTexts):
        return ""
    return spec.reason_without_table(len(captions(data)))


def encode_texts(
    data: Data,
    spec: TableTexts,
    *,
    batch: int = 32,
    shard_rows: int = SHARD_ROWS,
    part: tuple[int, int] = (0, 1),
    device: str = "auto",
    bar: Bar = no_bar,
) -> EncodeResult:
    """Make shards k, k + n, k + 2 n ... of the table, `part` being (k, n). Raises as `texttable.encode`."""
    rank, world_size = part
    torch_device = choose_device(device)
    texts = captions(data)
    files_by_hash: Mapping[str, Path] = {}  # of the images that captions edit
    if isinstance(data, Latents) and data.images.source:
        files_by_hash = data.images.source_images()
    rows_to_read = table.rows_of_rank(len(texts) + 1, shard_rows, rank, world_size)  # the empty text, too
    with threads.fewer_when_busy(torch_device, line_printer(bar)), bar("encoding captions", rows_to_read) as tick:
        done = texttable.encode(
            texts,
            spec.reader_spec,
            spec.folder,
            shard_rows=shard_rows,
            batch=batch,
            sources=open_source_images(data, torch_device, files_by_hash.__getitem__),
            rank=rank,
            world=world_size,
            device=torch_device,
            tick=tick,
        )
    return EncodeResult(spec.folder, done, texttable.TextTableIndex)


def make_tokens(run: Run) -> None:
    """Make the table of the captions' token ids, if the run's net reads one and it is missing. That takes no encoder.

    Processes that start together make it once. Raises UserError where the folder holds the tokens of other captions.
    """
    spec = _table_of(run.net)
    if not isinstance(spec, LearnedTexts):
        return
    with _locked_to_fill(spec.folder):
        encode_texts(run.data, spec)
