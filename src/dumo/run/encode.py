"""Make the folders that a recipe trains on: a cache of latents of images, and a table of encoded captions.

For `dumo encode`, in this order:

1. `encoding_work` says what a recipe, or a folder of images with options, has to encode; `options_as_settings` writes
   the options as settings.
2. `encode` makes the cache.
3. `encode_texts` makes the table, unless `reason_without_text_table` says why there is none. `captions` are its texts.

`encode` and `encode_texts` return an `EncodeResult`. Training makes what it lacks by `ensure_cache` and `make_tokens`.

Any number of ranks may share the work, and need not run at once: rank k of n makes the shards k, k + n, k + 2 n ... A
killed rank is started again, and the folder is the same to the last bit. What is damaged is named and made again
(`dumo.io.table`).
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dumo.config.change import override, yaml_text
from dumo.config.load import parse
from dumo.config.source import choose
from dumo.config.spec import Run, with_pipeline
from dumo.data import Data, Latents, cache, encoding
from dumo.data.caption import CaptionFiles
from dumo.data.images import errors_of_latents
from dumo.encoders import texttable
from dumo.encoders.pipeline import Pipeline
from dumo.io import table
from dumo.io.guard import locked
from dumo.io.table import MakeResult, TableIndex
from dumo.nets import Net
from dumo.nets.table import EmbeddedTexts, PipelineTexts, TableTexts
from dumo.nets.text import LearnedTexts
from dumo.run.prompt import open_source_images
from dumo.run.resolve import data_with_facts, load_resolved
from dumo.runtime import signals
from dumo.runtime.device import choose_device
from dumo.runtime.progress import Bar, no_bar
from dumo.types import Spec, UserError

_SHARD_ROWS = 1024  # images or captions to a shard: ours


class _LatentsOnly(Spec):
    """The parts of a run that are needed to encode a folder of images."""

    data: Latents
    pipeline: Pipeline | None = None  # of the codec


@dataclass(frozen=True)
class EncodeResult:
    """What this rank did in a folder."""

    folder: Path
    make_result: MakeResult
    index_type: type[TableIndex]

    def read_index(self) -> TableIndex | None:
        """The index of what is in the folder now; None: other ranks have shards to make."""
        index = table.read_index(self.folder, self.index_type)
        return index if index and index.shards else None

    def lines(self) -> Iterator[str]:
        """What was done, in lines: what was made again and why, and what is in the folder."""
        made = self.make_result.made
        for damaged in self.make_result.damaged:
            yield f"made again: {damaged}"
        index = self.read_index()
        if index is None:
            yield f"{self.folder}: {made} shards made, {self.make_result.missing} are still to be made by others"
            return
        yield f"{self.folder}: {index.summary()}, {made} shards made now"
        if isinstance(index, cache.CacheIndex) and index.sizes:
            yield f"images are in {cache.measure_crops(table.ShardTable(self.folder, index), index)}"


@dataclass(frozen=True)
class EncodingWork:
    """What there is to encode: the images of latents, the captions of data for a table of texts, or both."""

    data: Data
    texts: TableTexts | None = None


def encoding_work(
    source: str,
    overrides: Sequence[str] = (),
    *,
    out: str | None,
    codec: str | None,
    side: int | None,
    count: int | None = None,
) -> EncodingWork:
    """What to encode, and into which folders: as a recipe says, or a folder of images and options.

    Raises UserError where the recipe trains on neither latents nor a table of texts, an option is missing, or the
    text encoder or its tokenizer is missing.
    """
    settings = [*options_as_settings(out, codec, side, count), *overrides]
    if choose(source).kind == "images":
        return _work_of_images(source, settings)
    return _work_of_recipe(source, settings)


def _work_of_images(root: str, settings: Sequence[str]) -> EncodingWork:
    """What to encode of a folder of images: their latents, and mirrored ones, too."""
    tree: dict[str, Any] = {"data": {"kind": "latents", "images": {"root": root, "flip": True}}}
    override(tree, settings)
    spec = parse(_LatentsOnly, tree)
    return EncodingWork(data_with_facts(with_pipeline(spec.data, spec.pipeline)))


def _work_of_recipe(source: str, settings: Sequence[str]) -> EncodingWork:
    """What to encode for a recipe, a file or a run. Raises UserError where there is nothing."""
    run = load_resolved(source, settings)
    texts = _text_table_spec(run.net)
    if not isinstance(run.data, Latents) and texts is None:
        raise UserError(
            f"{source} trains on data '{run.data.kind}', not on latents, and its net reads no captions: there is "
            "nothing to encode"
        )
    if isinstance(texts, EmbeddedTexts):  # now, as images may take hours, and captions come after them
        if isinstance(texts, PipelineTexts):
            texts.pipeline.require_text_files()
        texts.reader_spec.require_tokenizers()
    return EncodingWork(run.data, texts)


def options_as_settings(out: str | None, codec: str | None, side: int | None, count: int | None) -> list[str]:
    """The options of `dumo encode` as settings of a recipe: FIELD=VALUE, as --set takes them."""
    fields = {"data.root": out, "data.codec.kind": codec, "data.images.side": side, "data.images.count": count}
    return [f"{field}={yaml_text(value)}" for field, value in fields.items() if value is not None]


def encode(
    data: Latents,
    *,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    store: str | None = None,
    dtype: str | None = None,
    shard_rows: int | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> EncodeResult:
    """Make this rank's shards of the cache, with mirrored images where data are flipped.

    `store`, `dtype` and `shard_rows` are fields of the `CachePlan`. None: a cache that is begun keeps its own; a new
    one takes the plan's defaults. Raises UserError
    where the images or the codec cannot be opened, a field of the plan is refused, or the folder holds something else,
    or a cache of other images.
    """
    torch_device = choose_device(device)
    images = data.images
    codec = data.codec.open(torch_device)
    image_rows = data.rows()
    existing_index = cache.read_index(data.folder)
    if existing_index:
        store = store or existing_index.store
        dtype = dtype or existing_index.dtype
        shard_rows = shard_rows or existing_index.shard_rows
    is_captioned = isinstance(data.captions, CaptionFiles)
    plan_fields: dict[str, Any] = {
        "shard_rows": shard_rows or _SHARD_ROWS,
        "source": " ".join(word for word in (images.root, images.split) if word),
        "fingerprint": image_rows.ledger.names_digest(),
        "resolution": images.side,
        "sizes": images.sizes,
        "crop": images.crop,
        "classes": images.labels,
        "names": () if is_captioned else image_rows.names,
        "captioned": is_captioned,
        "first_images": images.count or 0,
        "flips": images.flip,
    }
    if store is not None:
        plan_fields["store"] = store
    if dtype is not None:
        plan_fields["dtype"] = dtype
    plan = parse(cache.CachePlan, plan_fields)
    num_rows = table.rows_of_rank(len(image_rows), plan.shard_rows, rank, world)
    with (
        bar(f"encoding {images.root}", num_rows) as tick,
        errors_of_latents(),
    ):
        make_result = encoding.encode(
            image_rows,
            codec,
            plan,
            data.folder,
            captions=images.all_captions() if is_captioned else None,
            batch=batch,
            rank=rank,
            world=world,
            tick=tick,
        )
    return EncodeResult(data.folder, make_result, cache.CacheIndex)


def ensure_cache(data: Latents, *, device: str, bar: Bar) -> None:
    """Make the cache if it is missing, or finish it. A finished cache, and one whose images are not here, stay as is.

    Processes that start together make it once: the others wait. Raises UserError and Stopped as `encode`; finished
    shards are kept.
    """
    if cache.is_finished(data.folder) or not data.images.is_here:
        return
    with _locked_to_fill(data.folder):
        # Another process may have made it while this one waited.
        if not cache.is_finished(data.folder):
            encode(data, device=device, bar=bar)


@contextmanager
def _locked_to_fill(folder: Path) -> Generator[None, None, None]:
    """Hold the lock of a folder that is to be filled, a file next to it. Waits while another process holds it."""
    lock = folder.with_name(f".{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, while_waiting=signals.check):
        yield


def _text_table_spec(net: Net) -> TableTexts | None:
    """The spec of the table of texts that a net reads; None: it reads none."""
    texts = net.texts
    return texts if isinstance(texts, TableTexts) else None


def captions(data: Data) -> Sequence[str]:
    """The captions of the data, by number. Raises UserError where there are none, or they cannot be read."""
    if data.captions is None:
        raise UserError(f"data '{data.kind}' give no captions to encode: set data.captions, or net.texts=null")
    return data.caption_texts()


def reason_without_text_table(data: Data, spec: TableTexts) -> str:
    """A line that says why no table of the data's captions is made: it would be too large. "": it is made.

    Raises UserError where the data have no captions.
    """
    if not isinstance(spec, PipelineTexts):
        return ""
    return spec.reason_without_table(len(captions(data)))


def encode_texts(
    data: Data,
    spec: TableTexts,
    *,
    batch: int = 32,
    rank: int = 0,
    world: int = 1,
    shard_rows: int | None = None,
    device: str = "auto",
    bar: Bar = no_bar,
) -> EncodeResult:
    """Make this rank's shards of the table of the data's captions.

    `shard_rows` None: a table that is begun keeps its own. Raises UserError where the data have no captions,
    `shard_rows` is too large, the encoder cannot be opened, or the folder holds something else, or another table.
    """
    torch_device = choose_device(device)
    texts = captions(data)
    files_by_hash: Mapping[str, Path] = {}  # of the images that captions edit
    if isinstance(data, Latents) and data.images.source:
        files_by_hash = data.images.source_images()
    if shard_rows is None:
        existing_index = texttable.read_index(spec.folder)
        shard_rows = existing_index.shard_rows if existing_index else _SHARD_ROWS
    num_rows = table.rows_of_rank(len(texts) + 1, shard_rows, rank, world)  # the empty text, too
    with bar("encoding captions", num_rows) as tick:
        make_result = texttable.encode(
            texts,
            spec.reader_spec,
            spec.folder,
            shard_rows=shard_rows,
            batch=batch,
            sources=open_source_images(data, torch_device, files_by_hash.__getitem__),
            rank=rank,
            world=world,
            device=torch_device,
            tick=tick,
        )
    return EncodeResult(spec.folder, make_result, texttable.TextTableIndex)


def make_tokens(run: Run) -> None:
    """Make the table of the captions' token ids, if the run's net reads one and it is missing. That takes no encoder.

    Processes that start together make it once. Raises UserError where the folder holds the tokens of other captions.
    """
    spec = _text_table_spec(run.net)
    if not isinstance(spec, LearnedTexts):
        return
    with _locked_to_fill(spec.folder):
        encode_texts(run.data, spec)
