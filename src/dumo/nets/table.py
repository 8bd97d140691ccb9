"""Rows of text from a table that `dumo encode` made: in memory where there is room, else looked up pass by pass.

A spec (`TextTable`, `PipelineTexts`) says the sizes of a row without a file, so a net is outlined by them; its `build`
opens the table and gives `Rows`, in memory, or `Mapped`, on the disk. Where a table would be too large, `OnlineTexts`
makes the rows of `PipelineTexts` while the net is used.
"""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dumo.encoders.caption import parted
from dumo.encoders.pipeline import TRANSFORMER, PipelineSpec
from dumo.encoders.prompt import Prompts
from dumo.encoders.text import Encoder
from dumo.encoders.texttable import EncodedTexts, TextTableIndex, open_table, read_contents, require
from dumo.encoders.tokens import Tokenizer
from dumo.io.read import user_path
from dumo.nets.family import Family, family
from dumo.nets.live import OnlineTexts
from dumo.nets.rows import Reader, Rows, Source, TextRows, Texts, TextSizes, widened
from dumo.runtime.bound import CHANNELS, GIGABYTES
from dumo.runtime.progress import sized
from dumo.types import FREE, MACHINE, PINNED, PLACE, Cond, Spec, UserError

GIGABYTE = 1e9  # bytes


class Tabled(Spec):
    """Texts whose rows lie in a folder that `dumo encode` makes (`dumo.encoders.texttable`)."""

    kind: Any  # a literal of the subclass; declared here to come first
    root: str = Field(json_schema_extra=PLACE)  # may begin with ~ and hold $NAMES
    # Of captions and encoder: looked up once, so that a run keeps to its rows. None: there was no table.
    identity: str | None = Field(default=None, exclude_if=lambda identity: identity is None, json_schema_extra=PINNED)

    @property
    @abstractmethod
    def reader_spec(self) -> Encoder | Prompts | Tokenizer:
        """The encoder or tokenizer of the rows."""

    @property
    def folder(self) -> Path:
        """Raises UserError for a variable that is not set."""
        return user_path(self.root, "net.texts.root")

    def found(self) -> "Tabled":
        """The same with the identity of the table that is there, if one is."""
        if self.identity is None:
            index = self._index_of_whole_table()
            if index is not None:
                return self.model_copy(update={"identity": index.identity})
        return self

    def digest(self) -> str | None:
        """That of the captions of the table that is there; None: none is there, or it is damaged."""
        index = self._index_of_whole_table()
        return None if index is None else index.digest

    def _index_of_whole_table(self) -> TextTableIndex | None:
        """What the table says of itself; None: none is there, it is unfinished, or it is damaged."""
        with suppress(UserError):  # raised again when the net is built
            index = read_contents(self.folder)
            if index is not None and index.shards:
                return index
        return None

    def table(self, captions: int) -> EncodedTexts:
        """The table in the folder. Raises UserError where there is none, or it is of other captions or encoders."""
        table = open_table(self.folder)
        require(table, self.reader_spec, captions, self.identity)
        return table


class Embedded(Tabled):
    """Texts through an encoder, from a table. Their sizes are known without it, so a net is outlined by them."""

    # GB that the rows may take on the device; above, they are looked up on the host, which keeps as many. Ours.
    memory: float = Field(default=4.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)

    @property
    @abstractmethod
    def reader_spec(self) -> Encoder | Prompts:
        """What reads the texts."""

    @property
    @abstractmethod
    def sizes(self) -> TextSizes:
        """Those of a row, at most."""

    def bytes(self, classes: int, source: tuple[int, ...] = ()) -> int:
        """What the rows of this number of captions, and of none, take at most, with latents of what they edit."""
        sizes = self.sizes
        numbers = sizes.length * sizes.width + sizes.pooled
        if source:
            numbers += prod(source)
        mask = sizes.length  # a byte for each token
        return (classes + 1) * (numbers * sizes.dtype.itemsize + mask)

    def is_mapped(self, classes: int, source: tuple[int, ...] = ()) -> bool:
        """Whether rows come from the host, pass by pass, for this number of captions."""
        return self.is_online(classes) or self.bytes(classes, source) > self.memory * GIGABYTE

    def is_online(self, classes: int) -> bool:
        """Whether encoders make the rows while the net is used, for this number of captions, and there is no table."""
        return False

    def build(self, classes: int, source: tuple[int, ...] = ()) -> Texts:
        """The rows, on the default device; on the meta device their sizes alone, and no file is read.

        `source` is the shape of the latents of images that they edit; (): they edit none.

        Raises UserError where there is no table, or it is of other captions or of another encoder.
        """
        device = torch.get_default_device()
        if device.type == "meta":
            return self.outline(classes, source)
        table = self.open(classes)
        if table.contents.source != source:
            raise UserError(
                f"net.texts.root: {self.root} has {source_words(table.contents.source)}, and the model takes "
                f"{source_words(source)}: encode into another folder"
            )
        if self.is_mapped(classes, source):
            return Mapped(table, self)
        tokens, mask, pooled = table.padded()
        sources = table.sources()
        return Rows(
            tokens.to(device),
            mask.to(device) if self.sizes.masked else None,
            None if pooled is None else pooled.to(device),
            lambda reader_device: self.reader(table, reader_device),
            None if sources is None else sources.to(device),
        )

    def outline(self, classes: int, source: tuple[int, ...] = ()) -> Rows:
        """Rows without numbers; a single one where they are mapped."""
        sizes = self.sizes
        n = 1 if self.is_mapped(classes, source) else classes + 1
        return Rows(
            torch.empty(n, sizes.length, sizes.width, dtype=sizes.dtype),
            torch.empty(n, sizes.length, dtype=torch.bool) if sizes.masked else None,
            torch.empty(n, sizes.pooled, dtype=sizes.dtype) if sizes.pooled else None,
            source=torch.empty(n, *source, dtype=sizes.dtype) if source else None,
        )

    def open(self, classes: int) -> EncodedTexts:
        """The table. Raises UserError as `build`."""
        return self.table(classes)

    def reader(self, table: EncodedTexts, device: torch.device) -> Reader:
        """The reader of prompts, on a device. Raises UserError for an encoder of other weights."""
        spec = self.reader_spec
        read = spec.open(device)
        if read.sha256 != table.contents.sha256:
            raise UserError(
                f"net.texts: the encoder in {spec.source} has the hash {read.sha256}, and the captions were encoded by "
                f"{table.contents.sha256}: name the folder of that encoder"
            )
        dtype = table.contents.dtype
        keeps_padding = "mask" in table.contents.columns

        def rows(texts: Sequence[str]) -> TextRows:
            embeddings = read([parted(text)[0] for text in texts])
            tokens = embeddings.tokens
            if not keeps_padding:
                tokens = tokens * embeddings.mask[..., None]
            pooled = None if embeddings.pooled is None else embeddings.pooled.to(dtype)
            return tokens.to(dtype), embeddings.mask, pooled

        return rows


def source_words(shape: tuple[int, ...]) -> str:
    """What a table holds, in words, by the shape of its latents of images to edit."""
    return f"latents {shape} of images to edit" if shape else "texts alone"


class TextTable(Embedded):
    """Texts through an encoder of a folder, which names its sizes."""

    kind: Literal["table"] = "table"
    encoder: Encoder
    width: int = Field(ge=1, le=CHANNELS)  # numbers of a token's embedding
    pooled: int = Field(default=0, ge=0, le=CHANNELS)  # numbers of a text's; 0: there is none

    @model_validator(mode="after")
    def _pooled(self) -> "TextTable":
        if bool(self.pooled) != self.encoder.pooled:
            raise ValueError("pooled is the width of the embedding that encoder.pooled keeps: set both, or neither")
        return self

    @property
    def reader_spec(self) -> Encoder:
        """The encoder."""
        return self.encoder

    @property
    def sizes(self) -> TextSizes:
        """As its fields say."""
        return TextSizes(
            length=self.encoder.length,
            width=self.width,
            pooled=self.pooled,
            masked=not self.encoder.pad,
            dtype=getattr(torch, self.encoder.dtype),
        )

    def open(self, classes: int) -> EncodedTexts:
        """The table. Raises UserError as `build`."""
        table = self.table(classes)
        contents = table.contents
        if (contents.width, contents.pooled) != (self.width, self.pooled):
            raise UserError(
                f"net.texts.root: {self.root} has tokens of width {contents.width} and pooled {contents.pooled}: set "
                f"net.texts.width={contents.width} net.texts.pooled={contents.pooled}"
            )
        return table


class PipelineTexts(PipelineSpec, Embedded):
    """Texts as the run's pipeline reads them (`dumo.encoders.prompt`)."""

    kind: Literal["pipeline"] = "pipeline"
    # Of the encoders and of the rows: what a pipeline in this precision gives its transformer.
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # GB that a table may take on the disk; above, there is none, and texts are encoded in training. Ours.
    budget: float = Field(default=100.0, ge=0, le=GIGABYTES, json_schema_extra=MACHINE)

    def is_online(self, classes: int) -> bool:
        """As `Embedded.is_online`; a table that is there is read, and images to edit always have one."""
        return self.identity is None and not self.family.edits and self.bytes(classes) > self.budget * GIGABYTE

    def build(self, classes: int, source: tuple[int, ...] = ()) -> Texts:
        """Raises as `Embedded.build`, and where the encoders are others than when the run began."""
        if not self.is_online(classes) or torch.get_default_device().type == "meta":
            return super().build(classes, source)
        sha256 = self.pipeline.texts_hash()
        self.pipeline.require("texts", sha256, "text encoders or tokenizers")
        most = max(1, int(self.memory * GIGABYTE / self.bytes(0)))
        return OnlineTexts(self.reader_spec, sha256, self.sizes, classes, most=most)

    def too_large(self, captions: int) -> str:
        """Why no table of these captions is written; empty: it is."""
        if not self.is_online(captions):
            return ""
        return (
            f"a table of {captions:,} captions may take {sized(self.bytes(captions))}, more than net.texts.budget = "
            f"{self.budget:g} GB: texts are encoded in training"
        )

    @property
    def encoders(self) -> int | None:
        """Bytes of the encoders; None: not known, for they are not here."""
        return self.pipeline.text_encoder_bytes(self.sizes.dtype.itemsize)

    @property
    def family(self) -> Family:
        """The family of the pipeline. Raises UserError as `family`."""
        return family(self.pipeline.config(TRANSFORMER), self.pipeline.class_name)

    @property
    def reader_spec(self) -> Prompts:
        """The pipeline."""
        family = self.family
        return Prompts(
            source=self.pipeline.source,
            pipeline=family.pipeline,
            encodes=family.encodes,
            dtype=self.dtype,
            padded=family.adds_mask,
        )

    @property
    def sizes(self) -> TextSizes:
        """As the config of the model says."""
        family = self.family
        config = self.pipeline.config(TRANSFORMER)
        return TextSizes(
            length=family.length,
            width=config[family.text_width],
            pooled=family.pooled_width(config),
            masked=family.takes_mask or family.one_by_one,
            dtype=getattr(torch, self.dtype),
        )


class Mapped(Texts):
    """Rows of a table on disk, mapped: read, padded and sent to the net's device at every pass.

    Raises UserError for a shard that has changed, from the beginning or from a pass (`dumo.io.audit`).
    """

    like: Tensor  # its device and type are those of the rows

    def __init__(self, table: EncodedTexts, spec: Embedded) -> None:
        """Holds no rows."""
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.table = table
        self.spec = spec
        self.width = spec.sizes.width
        self.length = table.longest
        self.pooled_width = spec.sizes.pooled
        self.masked = spec.sizes.masked
        self.table.audit.require()
        self.added: Rows | None = None  # prompts, which are in memory
        self._update_lengths()

    def forward(self, c: Cond) -> TextRows:
        """The rows of c (b,). Waits for the device of c."""
        self.table.audit.require()
        numbers: list[int] = c.tolist()
        tokens, mask, pooled = self.table.padded(self._in_table(numbers))
        prompts = self._prompts_among(numbers)
        if self.added is not None and prompts:
            prompt_tokens, prompt_mask, prompt_pooled = self.added(self._numbers_of_added(numbers, prompts))
            tokens = widened(tokens, prompt_tokens.shape[1])
            tokens[prompts] = prompt_tokens.to(tokens)
            if prompt_mask is not None:
                mask = widened(mask, prompt_mask.shape[1])
                mask[prompts] = prompt_mask.to(mask)
            if pooled is not None and prompt_pooled is not None:
                pooled[prompts] = prompt_pooled.to(pooled)
        return (
            tokens.to(self.like),
            mask.to(self.like.device) if self.masked else None,
            None if pooled is None else pooled.to(self.like),
        )

    def sources(self, c: Cond) -> Source | None:
        """As `Texts.sources`; those of the table are read as its rows are."""
        numbers: list[int] = c.tolist()
        sources = self.table.sources(self._in_table(numbers))
        if sources is None:
            return None
        prompts = self._prompts_among(numbers)
        if self.added is not None and prompts:
            prompt_sources = self.added.sources(self._numbers_of_added(numbers, prompts))
            assert prompt_sources is not None
            sources[prompts] = prompt_sources.to(sources)
        return sources.to(self.like)

    def _in_table(self, numbers: Sequence[int]) -> list[int]:
        """Rows of the table; in place of a prompt, the one for no caption."""
        last = len(self.table) - 1
        return [min(number, last) for number in numbers]

    def _prompts_among(self, numbers: Sequence[int]) -> list[int]:
        """The places in a batch of what is a prompt, so in no table."""
        return [i for i, number in enumerate(numbers) if number >= len(self.table)]

    def _numbers_of_added(self, numbers: Sequence[int], prompts: Sequence[int]) -> Tensor:
        """The rows of `added` of the prompts at these places of a batch."""
        return torch.tensor([numbers[i] - len(self.table) for i in prompts])

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """As `Texts.lengths`."""
        if not self.masked:
            return None
        return tuple(self._lengths[number] for number in c.tolist())

    def append(self, texts: Sequence[str], source: Source | None = None) -> int:
        """Only prompts are kept in memory. Raises as `Texts.append`."""
        if self.added is None:
            tokens, mask, pooled = self.table.padded([])
            read = self.spec.reader(self.table, self.like.device)
            no_sources = self.table.sources([])
            self.added = Rows(tokens, mask if self.masked else None, pooled, lambda _: read, no_sources)
        first = len(self.table) + self.added.append(texts, source)
        self._update_lengths()
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """As `Texts.keep`."""
        if self.added is not None:
            n = len(self.table)
            self.added.keep(first - n, [row - n for row in rows])
            self._update_lengths()

    def _update_lengths(self) -> None:
        """After prompts came or went."""
        if self.added is not None:
            self.length = self.added.length
        if self.masked:
            added_lengths: tuple[int, ...] = ()
            if self.added is not None:
                added_lengths = self.added.lengths(torch.arange(len(self.added.tokens))) or ()
            self._lengths = (*self.table.lengths, *added_lengths)
            self.several = len(set(self._lengths)) > 1
