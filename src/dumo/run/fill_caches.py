"""Fill the caches of image latents and encoded captions for training.

Training calls `encode_what_is_missing` before it loads its net. `dumo encode` fills the same caches in advance:

1. `encoding_work` determines what to encode for a recipe, or for a folder of images with options, which
   `options_as_overrides` converts to overrides.
2. `encode` encodes the images.
3. `encode_texts` encodes the captions, unless `reason_without_cached_texts` returns a reason not to.

Any number of ranks can share the work, even at different times: rank k of n makes the shards k, k + n, k + 2 n ... A
killed rank can be restarted, and the result is bit-identical. Damaged shards are reported and encoded again
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

# Images per shard.
_SHARD_ROWS = 1024


class _LatentsOnly(Spec):
    """The parts of a run that are needed to encode a folder of images."""

    data: Latents
    # The pipeline of the codec.
    pipeline: Pipeline | None = None


@dataclass(frozen=True)
class EncodeResult:
    """The result of this rank's work on the cache of latents."""

    folder: Path
    make_result: MakeResult
    index_type: type[TableIndex]

    @property
    def is_finished(self) -> bool:
        """Whether all ranks have finished the cache."""
        return self.read_index() is not None

    def read_index(self) -> TableIndex | None:
        """Return the current index of the folder; None if other ranks have unfinished shards."""
        index = table.read_index(self.folder, self.index_type)
        return index if index and index.shards else None

    def lines(self) -> Iterator[str]:
        """Yield lines for the user: damaged shards that were encoded again, and the content of the folder."""
        made = self.make_result.made
        for damaged in self.make_result.damaged:
            yield f"encoded again: {damaged}"
        index = self.read_index()
        if index is None:
            yield f"{self.folder}: {made} shards made, {self.make_result.missing} remain for other processes"
            return
        yield f"{self.folder}: {index.summary()}, {made} shards made now"
        if isinstance(index, cache.CacheIndex) and index.sizes:
            yield f"images are in {cache.measure_crops(table.ShardTable(self.folder, index), index)}"


@dataclass(frozen=True)
class TextResult:
    """The result of this rank's work on the cache of captions."""

    folder: Path
    make_result: MakeResult
    num_captions: int

    @property
    def is_finished(self) -> bool:
        """Whether all ranks have encoded their captions."""
        return not self.make_result.missing

    def lines(self) -> Iterator[str]:
        """Yield lines for the user: damaged shards that were encoded again, and the content of the folder."""
        made = self.make_result.made
        for damaged in self.make_result.damaged:
            yield f"encoded again: {damaged}"
        if self.is_finished:
            yield f"{self.folder}: {self.num_captions:,} captions and the empty text, {made} shards made now"
        else:
            yield f"{self.folder}: {made} shards made, {self.make_result.missing} remain for other processes"


@dataclass(frozen=True)
class EncodingWork:
    """The data to encode: images for latents, captions for the text encoder of a run, or both."""

    data: Data
    # None if there are no captions to encode.
    run: Run | None = None


def encoding_work(
    source: str,
    overrides: Sequence[str] = (),
    *,
    out: str | None,
    codec: str | None,
    side: int | None,
    count: int | None = None,
) -> EncodingWork:
    """Determine what to encode, for a recipe or for a folder of images with options.

    Raise UserError if the recipe trains on neither latents nor encoded captions, if an option is missing, or if the
    text encoder or its tokenizer is missing.
    """
    settings = [*options_as_overrides(out, codec, side, count), *overrides]
    if choose(source).kind == "images":
        return _work_of_images(source, settings)
    return _work_of_recipe(source, settings)


def _work_of_images(root: str, settings: Sequence[str]) -> EncodingWork:
    """Determine the work for a folder of images: latents of the images and of their mirror images."""
    tree: dict[str, Any] = {"data": {"kind": "latents", "images": {"root": root, "flip": True}}}
    override(tree, settings)
    spec = parse(_LatentsOnly, tree)
    spec = with_commits(spec, find_commits(spec))
    spec.data.images.fetch()
    return EncodingWork(data_with_facts(with_pipeline(spec.data, spec.pipeline)))


def _work_of_recipe(source: str, settings: Sequence[str]) -> EncodingWork:
    """Determine the work for a recipe, a file or a run. Raise UserError if there is nothing to encode."""
    run = load_resolved(source, settings, fetches=True)
    texts = run.net.texts
    if not isinstance(run.data, Latents) and not isinstance(texts, EmbeddedTexts):
        raise UserError(
            f"{source} trains on data '{run.data.kind}', not on latents, and its net reads no captions through a "
            "frozen encoder: there is nothing to encode"
        )
    if not isinstance(texts, EmbeddedTexts):
        return EncodingWork(run.data)
    # Fail now if files are missing, because captions are encoded after the images, which may take hours.
    if isinstance(texts, PipelineTexts):
        texts.pipeline.require_text_files()
    texts.reader_spec.require_tokenizers()
    return EncodingWork(run.data, run)


def options_as_overrides(out: str | None, codec: str | None, side: int | None, count: int | None) -> list[str]:
    """Return the options of `dumo encode` as overrides of a recipe, each a.b=c."""
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
    """Encode this rank's shards of the cache, with mirror images if the data are flipped.

    `store`, `dtype` and `shard_rows` are fields of the `CachePlan`. None means the value of an existing cache, or else
    the default. Raise UserError if the images or the codec cannot be opened, if a field is invalid, or if the folder
    contains other files or a cache of other images.
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
    """Fill the cache if it is missing or unfinished and its images are on this machine.

    If several processes start together, one fills the cache and the others wait. Finished shards are kept after an
    error.
    """
    if cache.is_finished(data.folder) or not data.images.is_here:
        return
    with _locked_to_fill(data.folder):
        # Another process may have filled it while this one waited.
        if not cache.is_finished(data.folder):
            encode(data, device=device, bar=bar)


@contextmanager
def _locked_to_fill(folder: Path) -> Generator[None, None, None]:
    """Lock a folder by a file next to it. Wait while another process holds the lock."""
    lock = folder.with_name(f".{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock, while_waiting=signals.check):
        yield


def captions(data: Data) -> Sequence[str]:
    """Return the captions of the data, by number. Raise UserError if there are none or they cannot be read."""
    if data.captions is None:
        raise UserError(f"data '{data.kind}' has no captions to encode: set data.captions, or net.texts=null")
    return data.caption_texts()


def reason_without_cached_texts(run: Run) -> str:
    """Return the reason that the captions of a run are not encoded before training; "" if they are.

    Raise UserError if the data have no captions.
    """
    texts = run.net.texts
    return texts.reason_without_cache(len(captions(run.data))) if isinstance(texts, PipelineTexts) else ""


def _text_folder(run: Run, texts: EmbeddedTexts) -> Path:
    """Return the cache folder of a run's text encoder. Raise UserError if the encoder is missing."""
    return texts.cache_root / texts.find_identity(sources_identity(run.data))


def encode_texts(
    run: Run, *, deep: bool, rank: int = 0, world: int = 1, device: str = "auto", bar: Bar = no_bar
) -> TextResult | None:
    """Encode this rank's share of missing captions and damaged shards. Return None if the run needs no text cache.

    With `deep`, all shards are compared with their checksums. The encoder is freed at the end. Raise UserError if the
    data have no captions, or if the encoder cannot be opened.
    """
    spec = run.net.texts
    if not isinstance(spec, EmbeddedTexts) or reason_without_cached_texts(run):
        return None
    torch_device = choose_device(device)
    texts = [*captions(run.data), ""]
    folder = _text_folder(run, spec)
    # The source images of captions that edit images.
    files_by_hash: Mapping[str, Path] = {}
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
    """Encode missing latents and captions of a run, before its net is loaded. Every rank must call it.

    Rank 0 encodes the images, and all ranks share the captions. `print_line` receives a line for each damaged shard
    that was encoded again. If several processes start together, one does the work. Finished shards are kept after an
    error.
    """
    if isinstance(run.data, Latents):
        agreement.on_main_rank(partial(ensure_cache, run.data, device=device, bar=bar), is_long=True)
    texts = run.net.texts
    if not isinstance(texts, EmbeddedTexts):
        return
    if reason_without_cached_texts(run):
        return
    # Compare checksums only if the cache is small.
    deep = texts.fits_device(run.data.classes)
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
            print_line(f"encoded again: {line}")
