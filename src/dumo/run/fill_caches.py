"""Fill the two caches that a recipe trains on: of latents of images, and of encoded captions.

Training calls `encode_what_is_missing` before it loads its net. `dumo encode` fills the same caches ahead:

1. `encoding_work` says what a recipe, or a folder of images with options, has to encode; `options_as_overrides` writes
   the options as overrides.
2. `encode` makes the latents.
3. `encode_texts` encodes the captions, unless `reason_without_cached_texts` says why not.

Any number of ranks may share the work, and need not run at once: rank k of n makes the shards k, k + n, k + 2 n ... A
killed rank is started again, and the folder is the same to the last bit. What is damaged is named and made again
(`dumo.io.table`).
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dumo.config.load import parse
from dumo.config.overrides import override
from dumo.config.source import choose
from dumo.config.spec import Run, with_pipeline
from dumo.data import Data, Latents, cache, encoding
from dumo.data.caption import CaptionFiles
from dumo.data.images import rename_fields_in_errors
from dumo.encoders import textcache
from dumo.encoders.pipeline_folder import Pipeline
from dumo.io import table
from dumo.io.guard import locked
from dumo.io.table import MakeResult, TableIndex
from dumo.io.yaml import yaml_text
from dumo.nets.text_spec import EmbeddedTexts, PipelineTexts
from dumo.run.prompt_rows import open_source_images, sources_identity
from dumo.run.resolve import data_with_facts, find_commits, load_resolved, with_commits
from dumo.runtime import dist, signals
from dumo.runtime.device import choose_device, free_memory
from dumo.runtime.progress import Bar, no_bar
from dumo.training import agreement
from dumo.types import Spec, UserError

_SHARD_ROWS = 1024  # images to a shard: ours


class _LatentsOnly(Spec):
    """The parts of a run that are needed to encode a folder of images."""

    data: Latents
    pipeline: Pipeline | None = None  # of the codec


@dataclass(frozen=True)
class EncodeResult:
    """What this rank did in the cache of latents."""

    folder: Path
    make_result: MakeResult
    index_type: type[TableIndex]

    @property
    def is_finished(self) -> bool:
        """Whether the cache is finished, also by other ranks."""
        return self.read_index() is not None

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
class TextResult:
    """What this rank did in the cache of texts."""

    folder: Path
    make_result: MakeResult
    num_captions: int

    @property
    def is_finished(self) -> bool:
        """Whether all captions are encoded, also those of other ranks."""
        return not self.make_result.missing

    def lines(self) -> Iterator[str]:
        """What was done, in lines: what was made again and why, and what is in the folder."""
        made = self.make_result.made
        for damaged in self.make_result.damaged:
            yield f"made again: {damaged}"
        if self.is_finished:
            yield f"{self.folder}: {self.num_captions:,} captions and the empty text, {made} shards made now"
        else:
            yield f"{self.folder}: {made} shards made, {self.make_result.missing} are still to be made by others"


@dataclass(frozen=True)
class EncodingWork:
    """What there is to encode: the images of latents, the captions of a run whose net reads them, or both."""

    data: Data
    run: Run | None = None  # None: there are no captions to encode


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

    Raises UserError if the recipe trains on neither latents nor encoded captions, an option is missing, or the text
    encoder or its tokenizer is missing.
    """
    settings = [*options_as_overrides(out, codec, side, count), *overrides]
    if choose(source).kind == "images":
        return _work_of_images(source, settings)
    return _work_of_recipe(source, settings)


def _work_of_images(root: str, settings: Sequence[str]) -> EncodingWork:
    """What to encode of a folder of images: their latents, and mirrored ones, too."""
    tree: dict[str, Any] = {"data": {"kind": "latents", "images": {"root": root, "flip": True}}}
    override(tree, settings)
    spec = parse(_LatentsOnly, tree)
    spec = with_commits(spec, find_commits(spec))
    spec.data.images.fetch()
    return EncodingWork(data_with_facts(with_pipeline(spec.data, spec.pipeline)))


def _work_of_recipe(source: str, settings: Sequence[str]) -> EncodingWork:
    """What to encode for a recipe, a file or a run. Raises UserError where there is nothing."""
    run = load_resolved(source, settings, fetches=True)
    texts = run.net.texts
    if not isinstance(run.data, Latents) and not isinstance(texts, EmbeddedTexts):
        raise UserError(
            f"{source} trains on data '{run.data.kind}', not on latents, and its net reads no captions through a "
            "frozen encoder: there is nothing to encode"
        )
    if not isinstance(texts, EmbeddedTexts):
        return EncodingWork(run.data)
    if isinstance(texts, PipelineTexts):  # now, as images may take hours, and captions come after them
        texts.pipeline.require_text_files()
    texts.reader_spec.require_tokenizers()
    return EncodingWork(run.data, run)


def options_as_overrides(out: str | None, codec: str | None, side: int | None, count: int | None) -> list[str]:
    """The options of `dumo encode` as overrides of a recipe, each a.b=c."""
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
    one takes the plan's defaults. Raises UserError if the images or the codec cannot be opened, a field of the plan is
    refused, or the folder holds something else, or a cache of other images.
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
        rename_fields_in_errors(),
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


def captions(data: Data) -> Sequence[str]:
    """The captions of the data, by number. Raises UserError if there are none, or they cannot be read."""
    if data.captions is None:
        raise UserError(f"data '{data.kind}' give no captions to encode: set data.captions, or net.texts=null")
    return data.caption_texts()


def reason_without_cached_texts(run: Run) -> str:
    """A line that says why the captions of a run are not encoded before training; "" if they are.

    Raises UserError if the data have no captions.
    """
    texts = run.net.texts
    return texts.reason_without_cache(len(captions(run.data))) if isinstance(texts, PipelineTexts) else ""


def _text_folder(run: Run, texts: EmbeddedTexts) -> Path:
    """The folder of a run's text encoder in the cache. Raises UserError if the encoder is missing."""
    return texts.cache_root / texts.find_identity(sources_identity(run.data))


def encode_texts(
    run: Run, *, deep: bool, rank: int = 0, world: int = 1, device: str = "auto", bar: Bar = no_bar
) -> TextResult | None:
    """Encode this rank's share of the captions that the cache lacks, and of its damaged shards; None: no net reads any.

    `deep` compares all shards with their checksums. The encoder is let go of at the end. Raises UserError if the data
    have no captions, or the encoder cannot be opened.
    """
    spec = run.net.texts
    if not isinstance(spec, EmbeddedTexts) or reason_without_cached_texts(run):
        return None
    torch_device = choose_device(device)
    texts = [*captions(run.data), ""]
    folder = _text_folder(run, spec)
    files_by_hash: Mapping[str, Path] = {}  # of the images that captions edit
    if isinstance(run.data, Latents) and run.data.images.source:
        files_by_hash = run.data.images.source_images()
    make_result = textcache.fill_cache(
        folder,
        texts,
        spec.reader_spec,
        sources=open_source_images(run.data, torch_device, files_by_hash.__getitem__),
        deep=deep,
        rank=rank,
        world=world,
        device=torch_device,
        bar=bar,
    )
    free_memory(torch_device)
    return TextResult(folder, make_result, len(texts) - 1)


def encode_what_is_missing(run: Run, *, device: str, bar: Bar, print_line: Callable[[str], None]) -> None:
    """Make latents and texts that a run lacks, before its net is loaded. Every rank must call it.

    Rank 0 makes the latents, and all ranks share the captions. `print_line` is called with a line for each damaged
    shard that was made again. Processes that start together make everything once. Raises UserError and Stopped as
    `encode` and `encode_texts`; finished shards are kept.
    """
    if isinstance(run.data, Latents):
        agreement.on_main_rank(partial(ensure_cache, run.data, device=device, bar=bar), is_long=True)
    texts = run.net.texts
    if not isinstance(texts, EmbeddedTexts):
        return
    if reason_without_cached_texts(run):
        return
    deep = texts.fits_device(run.data.classes)  # then few shards are compared with their checksums
    folder = _text_folder(run, texts)
    if agreement.on_main_rank(lambda: textcache.is_filled(folder, [*captions(run.data), ""], deep=deep), is_long=True):
        return
    with ExitStack() as stack:
        lock = _locked_to_fill(texts.cache_root)
        agreement.on_main_rank(lambda: stack.enter_context(lock), is_long=True)
        rank, world = dist.rank(), dist.world()
        results = agreement.gather_results(
            lambda: encode_texts(run, deep=deep, rank=rank, world=world, device=device, bar=bar), is_long=True
        )
    for result in results:
        for line in result.make_result.damaged if result else ():
            print_line(f"made again: {line}")
