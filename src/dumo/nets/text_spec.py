"""Specs of texts that a frozen encoder embeds: `EncoderTexts` and `PipelineTexts`, the fields of net.texts in run.yaml.

A spec knows the sizes of a row (`sizes`) without any file. The order of events:

1. `find_identity` says which folder of the cache the encoder has; a run notes it when it begins, as `identity`.
2. Before the net is loaded, `dumo.run.fill_caches` encodes captions that the cache lacks, unless `is_online`.
3. `build` makes the module that a net looks rows up in, `Rows`. It reads no file.
4. `load` opens the cache and hands the rows of the captions to the module: copied to the device if they take at most
   `memory` GB, else read from the host pass by pass.

`EmbeddedTexts` is their base. `dumo.nets.learned` has texts whose encoder is trained with the net.
"""

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from dumo.encoders import textcache, textreader
from dumo.encoders.encode_prompt import PromptReaderSpec
from dumo.encoders.pipeline_folder import TRANSFORMER, PipelineSpec
from dumo.encoders.transformers_text import TextEncoder
from dumo.io.read import user_path
from dumo.nets.family import Family, family_of
from dumo.nets.learned import LearnedTexts
from dumo.nets.text_rows import CachedStore, RandomStore, Rows, Texts, TextSizes, TextsSpec
from dumo.runtime.formatting import bytes_text
from dumo.runtime.limits import CHANNELS, GIGABYTE, GIGABYTES
from dumo.types import FREE, MACHINE, PINNED, PLACE, UserError


class EmbeddedTexts(TextsSpec):
    """Texts embedded by a frozen encoder.

    Methods take the number of `captions`, without the empty one, and `source_shape`, the shape of the latents of images
    that captions edit; (): they edit none.
    """

    kind: Any  # a literal of the subclass; declared here to come first
    # The cache of encoded texts, for all encoders and data sets. May begin with ~ and hold $NAMES.
    root: str = Field(default="runs/texts", json_schema_extra=PLACE)
    # The encoder's folder in the cache (`textcache.identity_of`), noted when the run begins; None before that.
    identity: str | None = Field(default=None, exclude_if=lambda identity: identity is None, json_schema_extra=PINNED)
    # GB that the rows may take on the device; above, each pass reads its rows from the host. Ours.
    memory: float = Field(default=4.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)

    @property
    @abstractmethod
    def reader_spec(self) -> TextEncoder | PromptReaderSpec:
        """The encoder that makes the rows."""

    @property
    @abstractmethod
    def sizes(self) -> TextSizes:
        """The largest sizes that a row may have."""

    @property
    def padded_length(self) -> int | None:
        """The number of tokens that all rows are padded to; None: that of the longest."""
        return None

    @property
    def cache_root(self) -> Path:
        """The folder of the cache. Raises UserError for an environment variable that is not set."""
        return user_path(self.root, "net.texts.root")

    def find_identity(self, sources: str = "") -> str:
        """Return the identity of the encoder in the cache: the noted one, or else that of the encoder's files.

        sources: the identity of the images that captions edit. On a machine without the encoder it is the only one
        whose rows the cache has. Raises UserError if there is none.
        """
        if self.identity is not None:
            return self.identity
        try:
            return textcache.identity_of(self.reader_spec, sources)
        except (UserError, OSError):
            identity = textcache.find_identity(self.cache_root, self.reader_spec)
            if identity is None:
                raise
            return identity

    def memory_bytes(self, captions: int, source_shape: tuple[int, ...] = ()) -> int:
        """Return the most bytes that the rows of all captions and of the empty one take."""
        sizes = self.sizes
        values = sizes.length * sizes.width + sizes.pooled_width
        if source_shape:
            values += prod(source_shape)
        mask_bytes = sizes.length  # one for each token
        return (captions + 1) * (values * sizes.dtype.itemsize + mask_bytes)

    def fits_device(self, captions: int, source_shape: tuple[int, ...] = ()) -> bool:
        """Whether all rows are copied to the device."""
        return not self.is_online(captions) and self.memory_bytes(captions, source_shape) <= self.memory * GIGABYTE

    def is_online(self, captions: int) -> bool:
        """Whether captions are encoded in training, because a cache of them would be too large."""
        return False

    def build(self, captions: int, source_shape: tuple[int, ...] = ()) -> Rows:
        """Make the module, on the default device, without rows (`load`); on the meta device with rows without values.

        If rows are read from the host, the meta device has a single one.
        """
        sizes = self.sizes
        texts = Rows(sizes, captions, source_shape)
        if texts.like.is_meta:
            num_rows = captions + 1 if self.fits_device(captions, source_shape) else 1
            texts.hold_tensors(
                torch.empty(num_rows, sizes.length, sizes.width, dtype=sizes.dtype),
                torch.empty(num_rows, sizes.length, dtype=torch.bool) if sizes.has_mask else None,
                torch.empty(num_rows, sizes.pooled_width, dtype=sizes.dtype) if sizes.pooled_width else None,
                torch.empty(num_rows, *source_shape, dtype=sizes.dtype) if source_shape else None,
            )
        return texts

    def load(self, texts: Texts, captions: Sequence[str]) -> None:
        """Hand the module that `build` made the rows of these captions; () if they are not on this machine.

        What the cache lacks is encoded when it is read. Raises UserError if rows have other sizes than the spec's, or a
        shard is damaged.
        """
        assert isinstance(texts, Rows)
        if self._has_random_rows:
            texts.hold(RandomStore(self.sizes, texts.source_shape), on_device=False)
            return
        identity = self.find_identity()
        tables = textcache.open_tables(self.cache_root / identity)
        for text_table in tables:
            self.require_sizes(text_table.index, texts.source_shape)
        num_kept = 0
        if self.is_online(texts.count):
            num_kept = max(1, int(self.memory * GIGABYTE / self.memory_bytes(0)))
        reader = textreader.shared_reader(self.reader_spec, identity, num_kept)
        store = CachedStore(
            tables,
            textcache.find_rows(tables, [*captions, ""]),
            captions,
            texts.count,
            reader,
            self.padded_length,
        )
        if self.is_online(texts.count) and not store.is_whole:
            reader.require_identity()
        on_device = store.is_whole and self.fits_device(texts.count, texts.source_shape)
        if on_device:
            store.verify()
        else:
            store.begin_audit()
        texts.hold(store, on_device=on_device)

    def require_sizes(self, index: textcache.TextIndex, source_shape: tuple[int, ...]) -> None:
        """Raise UserError if the rows of a table have other sizes than those that the net was built for."""


class EncoderTexts(EmbeddedTexts):
    """Texts through an encoder in a folder of its own, as transformers saves it."""

    kind: Literal["encoder"] = "encoder"
    encoder: TextEncoder
    width: int = Field(ge=1, le=CHANNELS)  # channels of a token's embedding
    pooled: int = Field(default=0, ge=0, le=CHANNELS)  # channels of the whole text's embedding; 0: there is none

    @model_validator(mode="after")
    def _require_pooled_width(self) -> "EncoderTexts":
        if bool(self.pooled) != self.encoder.pooled:
            raise ValueError("pooled is the width of the embedding that encoder.pooled keeps: set both, or neither")
        return self

    @property
    def reader_spec(self) -> TextEncoder:
        """The encoder."""
        return self.encoder

    @property
    def padded_length(self) -> int:
        """The length of the encoder, whatever that of the longest caption."""
        return self.encoder.length

    @property
    def sizes(self) -> TextSizes:
        """The sizes of a row, by the fields of the spec."""
        return TextSizes(
            length=self.encoder.length,
            width=self.width,
            pooled_width=self.pooled,
            has_mask=not self.encoder.pad,
            dtype=getattr(torch, self.encoder.dtype),
        )

    def require_sizes(self, index: textcache.TextIndex, source_shape: tuple[int, ...]) -> None:
        """Raise UserError if the embeddings have other widths than the fields say."""
        width = sum(index.columns["tokens"].shape)
        pooled = sum(index.columns["pooled"].shape) if "pooled" in index.columns else 0
        if (width, pooled) != (self.width, self.pooled):
            raise UserError(
                f"net.texts: {self.encoder.source} gives tokens of width {width} and pooled {pooled}: set "
                f"net.texts.width={width} net.texts.pooled={pooled}"
            )


class PipelineTexts(PipelineSpec, EmbeddedTexts):
    """Texts as the run's pretrained pipeline reads them (`dumo.encoders.encode_prompt`)."""

    kind: Literal["pipeline"] = "pipeline"
    # Of the encoders and of the rows: what a pipeline in this precision gives its transformer.
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # GB that the captions may take in the cache; above, they are encoded in training instead. Ours.
    budget: float = Field(default=100.0, ge=0, le=GIGABYTES, json_schema_extra=MACHINE)

    def is_online(self, captions: int) -> bool:
        """Whether captions are encoded in training, because in the cache they would take more than `budget`.

        Captions that edit images are always encoded before.
        """
        return not self.family.edits_images and self.memory_bytes(captions) > self.budget * GIGABYTE

    def reason_without_cache(self, captions: int) -> str:
        """Return why this number of captions is not encoded before training; "" if it is."""
        if not self.is_online(captions):
            return ""
        return (
            f"{captions:,} captions may take {bytes_text(self.memory_bytes(captions))}, more than net.texts.budget = "
            f"{self.budget:g} GB: they are encoded in training"
        )

    @property
    def encoder_bytes(self) -> int | None:
        """Bytes of the text encoders' weights; None: not known, because they are not here."""
        return self.pipeline.text_encoder_bytes(self.sizes.dtype.itemsize)

    @property
    def family(self) -> Family:
        """The family of the pipeline's model. Raises UserError if it is none that dumo knows."""
        return family_of(self.pipeline)

    @property
    def reader_spec(self) -> PromptReaderSpec:
        """The pipeline's text encoders, as its family reads them."""
        family = self.family
        return PromptReaderSpec(
            source=self.pipeline.source,
            without=self.pipeline.without,
            pipeline=family.pipeline,
            encodes=family.encodes,
            dtype=self.dtype,
            padded=family.adds_mask,
        )

    @property
    def sizes(self) -> TextSizes:
        """The sizes of a row, by the config of the pipeline's model."""
        family = self.family
        config = self.pipeline.config(TRANSFORMER)
        return TextSizes(
            length=family.max_text_tokens,
            width=config[family.text_width],
            pooled_width=family.pooled_width(config),
            has_mask=family.takes_mask or family.one_by_one,
            dtype=getattr(torch, self.dtype),
        )


Text = Annotated[LearnedTexts | PipelineTexts | EncoderTexts, Field(discriminator="kind")]  # texts that a net may read
