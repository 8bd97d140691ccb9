"""Specs of text conditions with a frozen encoder: `EncoderTexts` and `PipelineTexts`, for net.texts in run.yaml.

1. `find_identity` returns the encoder's folder in the cache; a run stores it as `identity` when it starts.
2. Before the network is loaded, `dumo.run.fill_caches` encodes captions that are not in the cache, unless `is_online`.
3. `build` creates the module, `Rows`, without opening files.
4. `load` opens the cache and loads the rows of the captions: onto the device if they take at most `memory` GB, and
   otherwise from host memory, in training once for each step.

`EmbeddedTexts` is their base class. `dumo.nets.learned` trains the encoder with the network.
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

    Methods take the number of `captions`, without the empty text, and `source_shape`, the shape of the source images'
    latents, or () without source images.
    """

    # A literal in subclasses. It is declared here to be the first field.
    kind: Any
    # The cache of encoded texts, for all encoders and data sets. It may start with ~ and contain $NAMES.
    root: str = Field(default="runs/texts", json_schema_extra=PLACE)
    # The encoder's folder in the cache (`textcache.identity_of`), stored when the run starts.
    identity: str | None = Field(default=None, exclude_if=lambda identity: identity is None, json_schema_extra=PINNED)
    # The largest size of the rows on the device, in GB (our choice). Larger rows are read from host memory.
    memory: float = Field(default=4.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)

    @property
    @abstractmethod
    def reader_spec(self) -> TextEncoder | PromptReaderSpec:
        """The encoder of the rows."""

    @property
    @abstractmethod
    def sizes(self) -> TextSizes:
        """The largest sizes that a row may have."""

    @property
    def padded_length(self) -> int | None:
        """The number of tokens to pad rows to; None means that of the longest."""
        return None

    @property
    def cache_root(self) -> Path:
        """The folder of the cache. Raises UserError if an environment variable is not set."""
        return user_path(self.root, "net.texts.root")

    def find_identity(self, sources: str = "") -> str:
        """Return the identity of the encoder in the cache: the stored one, or that of the encoder's files.

        On a machine without the encoder's files, it is the only matching one in the cache.

        sources: the identity of the source images.

        Raises UserError if there is none.
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
        """Return the largest number of bytes of the rows of all captions and the empty text."""
        sizes = self.sizes
        values = sizes.length * sizes.width + sizes.pooled_width
        if source_shape:
            values += prod(source_shape)
        # The mask has one byte per token.
        mask_bytes = sizes.length
        return (captions + 1) * (values * sizes.dtype.itemsize + mask_bytes)

    def fits_device(self, captions: int, source_shape: tuple[int, ...] = ()) -> bool:
        """Whether all rows are copied to the device."""
        return not self.is_online(captions) and self.memory_bytes(captions, source_shape) <= self.memory * GIGABYTE

    def is_online(self, captions: int) -> bool:
        """Whether captions are encoded during training, because a cache would be too large."""
        return False

    def build(self, captions: int, source_shape: tuple[int, ...] = ()) -> Rows:
        """Create the module on the default device, without rows (`load`).

        On the meta device, it has rows without values, or a single row if rows are read from host memory.
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
        """Load the rows of these captions into the module that `build` returned; () if they are not on this machine.

        Missing rows are encoded on demand. Raises UserError if rows have other sizes than the spec, or a shard is
        damaged.
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
        """Raise UserError if the rows of a table have other sizes than the spec."""


class EncoderTexts(EmbeddedTexts):
    """Texts embedded by a transformers encoder in its own folder."""

    kind: Literal["encoder"] = "encoder"
    encoder: TextEncoder
    # Channels of a token's embedding, and of the pooled embedding, or 0.
    width: int = Field(ge=1, le=CHANNELS)
    pooled: int = Field(default=0, ge=0, le=CHANNELS)

    @model_validator(mode="after")
    def _require_pooled_width(self) -> "EncoderTexts":
        if bool(self.pooled) != self.encoder.pooled:
            raise ValueError("pooled is the width of the embedding that encoder.pooled enables: set both, or neither")
        return self

    @property
    def reader_spec(self) -> TextEncoder:
        """The encoder."""
        return self.encoder

    @property
    def padded_length(self) -> int:
        """The length of the encoder."""
        return self.encoder.length

    @property
    def sizes(self) -> TextSizes:
        """The sizes of a row, from the fields of the spec."""
        return TextSizes(
            length=self.encoder.length,
            width=self.width,
            pooled_width=self.pooled,
            has_mask=not self.encoder.pad,
            dtype=getattr(torch, self.encoder.dtype),
        )

    def require_sizes(self, index: textcache.TextIndex, source_shape: tuple[int, ...]) -> None:
        """Raise UserError if the embeddings have other widths than the fields."""
        width = sum(index.columns["tokens"].shape)
        pooled = sum(index.columns["pooled"].shape) if "pooled" in index.columns else 0
        if (width, pooled) != (self.width, self.pooled):
            raise UserError(
                f"net.texts: {self.encoder.source} has tokens of width {width} and pooled width {pooled}: set "
                f"net.texts.width={width} net.texts.pooled={pooled}"
            )


class PipelineTexts(PipelineSpec, EmbeddedTexts):
    """Texts embedded by the run's pretrained pipeline (`dumo.encoders.encode_prompt`)."""

    kind: Literal["pipeline"] = "pipeline"
    # The dtype of the encoders and of the rows.
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # The largest size of the captions in the cache, in GB (our choice). Above, they are encoded during training.
    budget: float = Field(default=100.0, ge=0, le=GIGABYTES, json_schema_extra=MACHINE)

    def is_online(self, captions: int) -> bool:
        """Whether captions are encoded during training, because in the cache they would take more than `budget`.

        Captions of editing models are always encoded before.
        """
        return not self.family.edits_images and self.memory_bytes(captions) > self.budget * GIGABYTE

    def reason_without_cache(self, captions: int) -> str:
        """Return why this number of captions is not encoded before training, or ""."""
        if not self.is_online(captions):
            return ""
        return (
            f"{captions:,} captions may take {bytes_text(self.memory_bytes(captions))}, more than net.texts.budget = "
            f"{self.budget:g} GB: they are encoded during training"
        )

    @property
    def encoder_bytes(self) -> int | None:
        """Bytes of the text encoders' weights, or None if they are not on this machine."""
        return self.pipeline.text_encoder_bytes(self.sizes.dtype.itemsize)

    @property
    def family(self) -> Family:
        """The family of the pipeline's model. Raises UserError if dumo does not support it."""
        return family_of(self.pipeline)

    @property
    def reader_spec(self) -> PromptReaderSpec:
        """The pipeline's text encoders, as its family uses them."""
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
        """The sizes of a row, from the config of the pipeline's model."""
        family = self.family
        config = self.pipeline.config(TRANSFORMER)
        return TextSizes(
            length=family.max_text_tokens,
            width=config[family.text_width],
            pooled_width=family.pooled_width(config),
            has_mask=family.takes_mask or family.one_by_one,
            dtype=getattr(torch, self.dtype),
        )


Text = Annotated[LearnedTexts | PipelineTexts | EncoderTexts, Field(discriminator="kind")]
