"""Rows of text from a table that `dumo encode` made: in memory where there is room, else looked up pass by pass."""

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
from dumo.encoders.texttable import EncodedTexts, open_table, read_contents, require
from dumo.encoders.tokens import Tokenizer
from dumo.io.read import user_path
from dumo.nets.family import Family, family
from dumo.nets.live import OnlineTexts
from dumo.nets.rows import Reader, Rows, Source, TextRows, Texts, TextSizes, widened
from dumo.runtime.bound import CHANNELS, GIGABYTES
from dumo.runtime.progress import sized
from dumo.types import FREE, MACHINE, PINNED, PLACE, Cond, Spec, UserError

GIGABYTE = 1e9
POOLED = 2  # its place in `TextRows`


class Tabled(Spec):
    """Texts whose rows lie in a folder that `dumo encode` makes (`dumo.encoders.texttable`)."""

    kind: Any  # a literal of the subclass; declared here to come first
    root: str = Field(json_schema_extra=PLACE)  # may begin with ~ and hold $NAMES
    # Of captions and encoder: looked up once, so that a run keeps to its rows. None: there was no table.
    identity: str | None = Field(default=None, exclude_if=lambda identity: identity is None, json_schema_extra=PINNED)

    @property
    @abstractmethod
    def by(self) -> Encoder | Prompts | Tokenizer:
        """The encoder or tokenizer of the rows."""

    @property
    def folder(self) -> Path:
        """Raises UserError for a variable that is not set."""
        return user_path(self.root, "net.texts.root")

    def found(self) -> "Tabled":
        """The same with the identity of the table that is there, if one is."""
        if self.identity is None:
            with suppress(UserError):  # raised again when the net is built
                if (there := read_contents(self.folder)) and there.shards:
                    return self.model_copy(update={"identity": there.identity})
        return self

    def digest(self) -> str | None:
        """That of the captions of the table that is there; None: none is there, or it is damaged."""
        with suppress(UserError):  # raised again when the net is built
            if (there := read_contents(self.folder)) and there.shards:
                return there.digest
        return None

    def table(self, captions: int) -> EncodedTexts:
        """The table in the folder. Raises UserError where there is none, or it is of other captions or encoders."""
        found = open_table(self.folder)
        require(found, self.by, captions, self.identity)
        return found


class Embedded(Tabled):
    """Texts through an encoder, from a table. Their sizes are known without it, so a net is outlined by them."""

    # GB that the rows may take on the device; above, they are looked up on the host, which keeps as many. Ours.
    memory: float = Field(default=4.0, ge=0, le=GIGABYTES, json_schema_extra=FREE)

    @property
    @abstractmethod
    def by(self) -> Encoder | Prompts:
        """What reads the texts."""

    @property
    @abstractmethod
    def sizes(self) -> TextSizes:
        """Those of a row, at most."""

    def bytes(self, classes: int, source: tuple[int, ...] = ()) -> int:
        """What the rows of this number of captions, and of none, take at most, with latents of what they edit."""
        sizes = self.sizes
        tokens = sizes.length * (sizes.width * sizes.dtype.itemsize + 1)
        return (classes + 1) * (tokens + (sizes.pooled + (prod(source) if source else 0)) * sizes.dtype.itemsize)

    def mapped(self, classes: int, source: tuple[int, ...] = ()) -> bool:
        """Whether rows come from the host, pass by pass, for this number of captions."""
        return self.live(classes) or self.bytes(classes, source) > self.memory * GIGABYTE

    def live(self, classes: int) -> bool:
        """Whether encoders make the rows while the net is used, for this number of captions, and there is no table."""
        return False

    def build(self, classes: int, source: tuple[int, ...] = ()) -> Texts:
        """The rows, on the default device; on the meta device their sizes alone, and no file is read.

        `source` is the shape of the latents of images that they edit; (): they edit none.

        Raises UserError where there is no table, or it is of other captions or of another encoder.
        """
        if torch.get_default_device().type == "meta":
            return self.outline(classes, source)
        found = self.open(classes)
        if found.contents.source != source:
            there, wanted = (
                f"latents {shape} of images to edit" if shape else "texts alone"
                for shape in (found.contents.source, source)
            )
            raise UserError(
                f"net.texts.root: {self.root} has {there}, and the model takes {wanted}: encode into another folder"
            )
        if self.mapped(classes, source):
            return Mapped(found, self)
        where, masked = torch.get_default_device(), self.sizes.masked
        tokens, mask, pooled = found.padded()
        kept = None if pooled is None else pooled.to(where)
        edited = found.sources()
        return Rows(
            tokens.to(where),
            mask.to(where) if masked else None,
            kept,
            lambda device: self.reader(found, device),
            None if edited is None else edited.to(where),
        )

    def outline(self, classes: int, source: tuple[int, ...] = ()) -> Rows:
        """Rows without numbers; a single one where they are mapped."""
        n, (length, width, pooled, masked, dtype) = 1 if self.mapped(classes, source) else classes + 1, self.sizes
        mask = torch.empty(n, length, dtype=torch.bool) if masked else None
        kept = torch.empty(n, pooled, dtype=dtype) if pooled else None
        edited = torch.empty(n, *source, dtype=dtype) if source else None
        return Rows(torch.empty(n, length, width, dtype=dtype), mask, kept, source=edited)

    def open(self, classes: int) -> EncodedTexts:
        """The table. Raises UserError as `build`."""
        return self.table(classes)

    def reader(self, found: EncodedTexts, device: torch.device) -> Reader:
        """The reader of prompts, on a device. Raises UserError for an encoder of other weights."""
        read, dtype = self.by.open(device), found.contents.dtype
        if read.sha256 != found.contents.sha256:
            raise UserError(
                f"net.texts: the encoder in {self.by.source} has the hash {read.sha256}, and the captions were encoded "
                f"by {found.contents.sha256}: name the folder of that encoder"
            )

        def rows(texts: Sequence[str]) -> TextRows:
            made = read([parted(text)[0] for text in texts])
            pooled = None if made.pooled is None else made.pooled.to(dtype)
            tokens = made.tokens if "mask" in found.contents.columns else made.tokens * made.mask[..., None]
            return tokens.to(dtype), made.mask, pooled

        return rows


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
    def by(self) -> Encoder:
        """The encoder."""
        return self.encoder

    @property
    def sizes(self) -> TextSizes:
        """As its fields say."""
        dtype = getattr(torch, self.encoder.dtype)
        return TextSizes(self.encoder.length, self.width, self.pooled, not self.encoder.pad, dtype)

    def open(self, classes: int) -> EncodedTexts:
        """The table. Raises UserError as `build`."""
        found = self.table(classes)
        has = found.contents
        if (has.width, has.pooled) != (self.width, self.pooled):
            raise UserError(
                f"net.texts.root: {self.root} has tokens of width {has.width} and pooled {has.pooled}: set "
                f"net.texts.width={has.width} net.texts.pooled={has.pooled}"
            )
        return found


class PipelineTexts(PipelineSpec, Embedded):
    """Texts as the run's pipeline reads them (`dumo.encoders.prompt`)."""

    kind: Literal["pipeline"] = "pipeline"
    # Of the encoders and of the rows: what a pipeline in this precision gives its transformer.
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # GB that a table may take on the disk; above, there is none, and texts are encoded in training. Ours.
    budget: float = Field(default=100.0, ge=0, le=GIGABYTES, json_schema_extra=MACHINE)

    def live(self, classes: int) -> bool:
        """As `Embedded.live`; a table that is there is read, and images to edit always have one."""
        return self.identity is None and not self.family.edits and self.bytes(classes) > self.budget * GIGABYTE

    def build(self, classes: int, source: tuple[int, ...] = ()) -> Texts:
        """Raises as `Embedded.build`, and where the encoders are others than when the run began."""
        if not self.live(classes) or torch.get_default_device().type == "meta":
            return super().build(classes, source)
        self.pipeline.require("texts", sha256 := self.pipeline.texts_hash(), "text encoders or tokenizers")
        most = max(1, int(self.memory * GIGABYTE / self.bytes(0)))
        return OnlineTexts(self.by, sha256, self.sizes, classes, most=most)

    def too_large(self, captions: int) -> str:
        """Why no table of these captions is written; empty: it is."""
        size = f"a table of {captions:,} captions may take {sized(self.bytes(captions))}"
        why = f"{size}, more than net.texts.budget = {self.budget:g} GB: texts are encoded in training"
        return why if self.live(captions) else ""

    @property
    def encoders(self) -> int | None:
        """Bytes of the encoders; None: not known, for they are not here."""
        return self.pipeline.text_encoder_bytes(self.sizes.dtype.itemsize)

    @property
    def family(self) -> Family:
        """The family of the pipeline. Raises UserError as `family`."""
        return family(self.pipeline.config(TRANSFORMER), self.pipeline.class_name)

    @property
    def by(self) -> Prompts:
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

    def __init__(self, found: EncodedTexts, spec: Embedded) -> None:
        """Holds no rows."""
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)
        self.width, self.length, self.pooled_width = spec.sizes.width, found.longest, spec.sizes.pooled
        self.table, self.masked = found, spec.sizes.masked
        self.spec = spec
        self.table.audit.require()
        self.added: Rows | None = None
        self._count()

    def forward(self, c: Cond) -> TextRows:
        """The rows of c (b,). Waits for the device of c."""
        self.table.audit.require()
        numbers: list[int] = c.tolist()
        tokens, mask, pooled = self.table.padded([min(row, len(self.table) - 1) for row in numbers])
        parts: list[Tensor | None] = [tokens, mask if self.masked else None, pooled]
        if self.added is not None and (new := [i for i, row in enumerate(numbers) if row >= len(self.table)]):
            added = self.added(torch.tensor([numbers[i] - len(self.table) for i in new]))
            for k, (part, rows) in enumerate(zip(parts, added, strict=True)):
                if part is not None and rows is not None:
                    parts[k] = part = part if k == POOLED else widened(part, rows.shape[1])
                    part[new] = rows.to(part)
        tokens, mask, pooled = (
            part if part is None else part.to(self.like if part.is_floating_point() else self.like.device)
            for part in parts
        )
        assert tokens is not None
        return tokens, mask, pooled

    def sources(self, c: Cond) -> Source | None:
        """As `Texts.sources`; those of the table are read as its rows are."""
        numbers, last = c.tolist(), len(self.table) - 1
        found = self.table.sources([min(row, last) for row in numbers])
        if found is None:
            return None
        if self.added is not None and (new := [i for i, row in enumerate(numbers) if row > last]):
            added = self.added.sources(torch.tensor([numbers[i] - last - 1 for i in new]))
            assert added is not None
            found[new] = added.to(found)
        return found.to(self.like)

    def lengths(self, c: Cond) -> tuple[int, ...] | None:
        """As `Texts.lengths`."""
        return tuple(self._lengths[i] for i in c.tolist()) if self.masked else None

    def append(self, texts: Sequence[str], source: Source | None = None) -> int:
        """Only prompts are kept in memory. Raises as `Texts.append`."""
        if self.added is None:
            tokens, mask, pooled = self.table.padded([])
            read = self.spec.reader(self.table, self.like.device)
            none = self.table.sources([])
            self.added = Rows(tokens, mask if self.masked else None, pooled, lambda _: read, none)
        first = len(self.table) + self.added.append(texts, source)
        self._count()
        return first

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """As `Texts.keep`."""
        if self.added is not None:
            n = len(self.table)
            self.added.keep(first - n, [row - n for row in rows])
            self._count()

    def _count(self) -> None:
        if self.added is not None:
            self.length = self.added.length
        if self.masked:
            added = () if self.added is None else self.added.lengths(torch.arange(len(self.added.tokens))) or ()
            self._lengths = (*self.table.lengths, *added)
            self.several = len({*self._lengths}) > 1
