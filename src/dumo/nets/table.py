"""Specs of texts whose rows lie in a table that `dumo encode` makes: `TextTable` and `PipelineTexts`.

A spec knows the sizes of a row (`sizes`) without any file, so a net is outlined before its table exists. The order of
events:

1. `with_identity` keeps, once, which table is in the folder, so that a run refuses another one later;
2. `memory_bytes` says what all rows take, and `is_mapped` and `is_online` where they will come from;
3. `build` opens the table, compares it with the spec, and makes the module that a net looks rows up in: `Rows`, in
   memory; `MappedRows`, on the disk, above `memory` GB; or `OnlineTexts`, which encodes while the net is used, where a
   pipeline's table would be above `budget` GB. On the meta device `build` reads no file.

`TableTexts` is the base of all texts that have a table, also of `LearnedTexts` (`dumo.nets.text`), whose table has ids
of tokens. `EmbeddedTexts` is the base of those whose table has embeddings. The fields are those of run.yaml.
"""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from dumo.encoders import texttable
from dumo.encoders.caption import split_caption
from dumo.encoders.pipeline import TRANSFORMER, PipelineSpec
from dumo.encoders.prompt import PromptReader, PromptReaderSpec
from dumo.encoders.text import EncoderModel, TextEncoder
from dumo.encoders.texttable import EncodedTexts, TextTableIndex
from dumo.encoders.tokens import ByteTokenizer, warn_of_cuts
from dumo.io.read import user_path
from dumo.nets.family import Family, find_family
from dumo.nets.live import OnlineTexts
from dumo.nets.mapped import MappedRows
from dumo.nets.rows import Rows, TextRows, Texts, TextSizes, pad_tokens
from dumo.runtime.limits import CHANNELS, GIGABYTE, GIGABYTES
from dumo.runtime.text import bytes_text
from dumo.types import FREE, MACHINE, PINNED, PLACE, Spec, UserError

_TEXTS_PER_BATCH = 32  # prompts that are encoded at a time: ours


class TableTexts(Spec):
    """Texts whose rows lie in a folder that `dumo encode` makes (`dumo.encoders.texttable`)."""

    kind: Any  # a literal of the subclass; declared here to come first
    root: str = Field(json_schema_extra=PLACE)  # may begin with ~ and hold $NAMES
    # Of captions and encoder: looked up once, so that a run keeps to its rows. None: there was no table.
    identity: str | None = Field(default=None, exclude_if=lambda identity: identity is None, json_schema_extra=PINNED)

    @property
    @abstractmethod
    def reader_spec(self) -> TextEncoder | PromptReaderSpec | ByteTokenizer:
        """The encoder or tokenizer that makes the rows."""

    @property
    def folder(self) -> Path:
        """The table's folder. Raises UserError for an environment variable that is not set."""
        return user_path(self.root, "net.texts.root")

    def with_identity(self) -> "TableTexts":
        """Return the spec with the identity of its table. It stays as it is if it has one, or there is no table."""
        if self.identity is None:
            index = self._read_index()
            if index is not None:
                return self.model_copy(update={"identity": index.identity})
        return self

    def captions_digest(self) -> str | None:
        """Return the digest of the captions of the table in the folder; None where there is no finished table."""
        index = self._read_index()
        return None if index is None else index.digest

    def open_table(self, captions: int) -> EncodedTexts:
        """Open the table, of this number of captions.

        Raises UserError where there is none, or it is of other captions or of another encoder than the spec's.
        """
        table = texttable.open_table(self.folder)
        table.require(self.reader_spec, captions, self.identity)
        return table

    def _read_index(self) -> TextTableIndex | None:
        """Return the index of the table; None where there is none, it is unfinished, or it is damaged."""
        with suppress(UserError):  # raised again when the net is built
            index = texttable.read_index(self.folder)
            if index is not None and index.shards:
                return index
        return None


class EmbeddedTexts(TableTexts):
    """Texts whose table has embeddings, by a pretrained encoder.

    Methods take the number of `captions`, without the empty one, and `source_shape`, the shape of the latents of images
    that captions edit; (): they edit none.
    """

    # GB that the rows may take on the device; above, they are looked up on the host, which keeps as many. Ours.
    memory: float = Field(default=4.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)

    @property
    @abstractmethod
    def reader_spec(self) -> TextEncoder | PromptReaderSpec:
        """The encoder that makes the rows."""

    @property
    @abstractmethod
    def sizes(self) -> TextSizes:
        """The largest sizes that a row may have."""

    def memory_bytes(self, captions: int, source_shape: tuple[int, ...] = ()) -> int:
        """Return the most bytes that the rows of all captions and of the empty one take."""
        sizes = self.sizes
        values = sizes.length * sizes.width + sizes.pooled_width
        if source_shape:
            values += prod(source_shape)
        mask_bytes = sizes.length  # one for each token
        return (captions + 1) * (values * sizes.dtype.itemsize + mask_bytes)

    def is_mapped(self, captions: int, source_shape: tuple[int, ...] = ()) -> bool:
        """Whether rows come from the host, pass by pass: from the disk, or from encoders."""
        return self.is_online(captions) or self.memory_bytes(captions, source_shape) > self.memory * GIGABYTE

    def is_online(self, captions: int) -> bool:
        """Whether there is no table, and encoders make the rows while the net is used."""
        return False

    def build(self, captions: int, source_shape: tuple[int, ...] = ()) -> Texts:
        """Make the rows, on the default device; on the meta device without values, and no file is read.

        Raises UserError where there is no table, or it is of other captions, another encoder or other images.
        """
        device = torch.get_default_device()
        if device.type == "meta":
            return self._outline(captions, source_shape)
        table = self.open_table(captions)
        if table.index.source_shape != source_shape:
            raise UserError(
                f"net.texts.root: {self.root} has {_source_text(table.index.source_shape)}, and the model takes "
                f"{_source_text(source_shape)}: encode into another folder"
            )
        reader = RowReader(self.reader_spec, table.index)
        if self.is_mapped(captions, source_shape):
            return MappedRows(table, self.sizes, reader)
        tokens, mask, pooled = table.read_rows()
        sources = table.read_sources()
        return Rows(
            tokens.to(device),
            mask.to(device) if self.sizes.has_mask else None,
            None if pooled is None else pooled.to(device),
            reader=reader,
            source=None if sources is None else sources.to(device),
        )

    def _outline(self, captions: int, source_shape: tuple[int, ...]) -> Rows:
        """Make rows on the meta device: of all captions and the empty one, or a single row where they are mapped."""
        sizes = self.sizes
        num_rows = 1 if self.is_mapped(captions, source_shape) else captions + 1
        return Rows(
            torch.empty(num_rows, sizes.length, sizes.width, dtype=sizes.dtype),
            torch.empty(num_rows, sizes.length, dtype=torch.bool) if sizes.has_mask else None,
            torch.empty(num_rows, sizes.pooled_width, dtype=sizes.dtype) if sizes.pooled_width else None,
            source=torch.empty(num_rows, *source_shape, dtype=sizes.dtype) if source_shape else None,
        )


class RowReader:
    """Makes rows of prompts as a table has them, by the encoder that made the table.

    The encoder is opened at the first call, and lies on the host between calls.
    """

    def __init__(self, spec: TextEncoder | PromptReaderSpec, index: TextTableIndex) -> None:
        """`index` is the table's."""
        self.spec = spec
        self.index = index
        self.encoder: EncoderModel | PromptReader | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowReader":
        """Return itself: a net and its averages share the encoder."""
        return self

    def __call__(self, texts: Sequence[str], device: torch.device) -> TextRows:
        """Encode texts on a device, and return their rows, on the CPU. Warns where texts are cut.

        Raises UserError where the encoder cannot be opened, is not that of the table, or gives numbers that the type of
        the table cannot hold.
        """
        encoder = self._opened_encoder()
        texts = [split_caption(text)[0] for text in texts]
        encoder.to(device)
        try:
            batches = [encoder(texts[i : i + _TEXTS_PER_BATCH]) for i in range(0, len(texts), _TEXTS_PER_BATCH)]
        finally:
            encoder.to(torch.device("cpu"))
        warn_of_cuts([text for batch in batches for text in batch.cut_texts], texttable.cut_place(self.spec))

        longest = max(batch.tokens.shape[1] for batch in batches)
        mask = torch.cat([pad_tokens(batch.mask, longest) for batch in batches])
        tokens = torch.cat([pad_tokens(batch.tokens, longest) for batch in batches])
        if "mask" not in self.index.columns:  # else padding is read, too
            tokens = tokens * mask[..., None]
        columns = {"tokens": tokens}
        pooled = [batch.pooled for batch in batches if batch.pooled is not None]
        if pooled:
            columns["pooled"] = torch.cat(pooled)
        stored = texttable.to_stored_types(columns, dict.fromkeys(columns, self.index.dtype))
        return stored["tokens"], mask, stored.get("pooled")

    def _opened_encoder(self) -> EncoderModel | PromptReader:
        """The encoder, which the first call opens. Raises UserError for other weights, or another tokenizer."""
        if self.encoder is None:
            encoder = self.spec.open()
            self.index.require_encoder(encoder, self.spec.source)
            self.encoder = encoder
        return self.encoder


class TextTable(EmbeddedTexts):
    """Texts through an encoder in a folder of its own, as transformers saves it."""

    kind: Literal["table"] = "table"
    encoder: TextEncoder
    width: int = Field(ge=1, le=CHANNELS)  # channels of a token's embedding
    pooled: int = Field(default=0, ge=0, le=CHANNELS)  # channels of the whole text's embedding; 0: there is none

    @model_validator(mode="after")
    def _require_pooled_width(self) -> "TextTable":
        if bool(self.pooled) != self.encoder.pooled:
            raise ValueError("pooled is the width of the embedding that encoder.pooled keeps: set both, or neither")
        return self

    @property
    def reader_spec(self) -> TextEncoder:
        """The encoder."""
        return self.encoder

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

    def open_table(self, captions: int) -> EncodedTexts:
        """Open the table. Raises UserError as `TableTexts.open_table`, and where its embeddings have other widths."""
        table = super().open_table(captions)
        index = table.index
        if (index.width, index.pooled_width) != (self.width, self.pooled):
            raise UserError(
                f"net.texts.root: {self.root} has tokens of width {index.width} and pooled {index.pooled_width}: "
                f"set net.texts.width={index.width} net.texts.pooled={index.pooled_width}"
            )
        return table


class PipelineTexts(PipelineSpec, EmbeddedTexts):
    """Texts as the run's pretrained pipeline reads them (`dumo.encoders.prompt`)."""

    kind: Literal["pipeline"] = "pipeline"
    # Of the encoders and of the rows: what a pipeline in this precision gives its transformer.
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # GB that a table may take on the disk; above, there is none, and texts are encoded in training. Ours.
    budget: float = Field(default=100.0, ge=0, le=GIGABYTES, json_schema_extra=MACHINE)

    def is_online(self, captions: int) -> bool:
        """Whether encoders make the rows while the net is used, because a table would take more than `budget`.

        A table that is there is read, however large, and images to edit always have one.
        """
        if self.identity is not None or self.family.edits_images:
            return False
        return self.memory_bytes(captions) > self.budget * GIGABYTE

    def build(self, captions: int, source_shape: tuple[int, ...] = ()) -> Texts:
        """Make the rows, or open the encoders that make them.

        Raises UserError as `EmbeddedTexts.build`, and where the encoders are others than when the run began.
        """
        if not self.is_online(captions) or torch.get_default_device().type == "meta":
            return super().build(captions, source_shape)
        sha256 = self.pipeline.texts_hash()
        self.pipeline.require_fact("texts", sha256, "text encoders or tokenizers")
        row_bytes = self.memory_bytes(0)  # of the empty caption alone
        max_rows = max(1, int(self.memory * GIGABYTE / row_bytes))
        return OnlineTexts(self.reader_spec, sha256, self.sizes, captions, max_rows=max_rows)

    def reason_without_table(self, captions: int) -> str:
        """Return why no table of this number of captions is written; "" if one is."""
        if not self.is_online(captions):
            return ""
        return (
            f"a table of {captions:,} captions may take {bytes_text(self.memory_bytes(captions))}, more than "
            f"net.texts.budget = {self.budget:g} GB: texts are encoded in training"
        )

    @property
    def encoder_bytes(self) -> int | None:
        """Bytes of the text encoders' weights; None: not known, because they are not here."""
        return self.pipeline.text_encoder_bytes(self.sizes.dtype.itemsize)

    @property
    def family(self) -> Family:
        """The family of the pipeline's model. Raises UserError where it is none that dumo knows."""
        return find_family(self.pipeline.config(TRANSFORMER), self.pipeline.class_name)

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


def _source_text(shape: tuple[int, ...]) -> str:
    """What a table with latents of this shape, of images to edit, holds; (): it has none."""
    return f"latents {shape} of images to edit" if shape else "texts alone"
