"""All that a condition c may be to a net that reads text, and a text encoder that is trained with the net.

That encoder is a T5 with random weights (Raffel et al. 2020) over the bytes of captions. It is part of the net: every
pass reads its captions anew, and optimizer, averages and checkpoints hold its weights. A caption does not depend on t,
so derivatives along the flow do not pass through it.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Int, Int64
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dumo.encoders.tokens import SPACE, VOCABULARY, Tokenizer, transformers
from dumo.flow import dropout
from dumo.io.table import FILE
from dumo.nets.rows import Rows, Source, TextRows, Texts
from dumo.nets.table import PipelineTexts, Tabled, TextTable
from dumo.runtime.bound import BLOCKS, CHANNELS
from dumo.runtime.random import stream
from dumo.types import Cond, Spec

ATTENTION = 4  # attention heads: ours
WIDER = 4  # the perceptron's width over the net's (Raffel et al. 2020)
ROWS = 16  # rows that stand for a table that is not there: ours


class Learned(Tabled):
    """A T5 encoder by its sizes, over the token ids in a table."""

    kind: Literal["learned"] = "learned"
    tokenizer: Tokenizer = Tokenizer()
    width: int = Field(default=128, ge=ATTENTION, le=CHANNELS, multiple_of=ATTENTION)
    depth: int = Field(default=2, ge=1, le=BLOCKS)
    # The share of a caption's words that are hidden in training (Iyyer et al. 2015): few captions are overfitted.
    drop: float = Field(default=0.0, ge=0, lt=1)

    @property
    def reader_spec(self) -> Tokenizer:
        """The tokenizer."""
        return self.tokenizer

    def build(self, classes: int) -> "TokenTexts":
        """The encoder, and the ids of `classes` captions and of none; on the meta device no file is read.

        Raises UserError where there is no table, it is of other captions or another tokenizer, or transformers is
        missing.
        """
        shape = (classes + 1, self.tokenizer.length)
        if torch.get_default_device().type == "meta":
            return TokenTexts(self, torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.bool))
        ids, mask, _ = self.table(classes).padded()
        return TokenTexts(self, ids.int(), mask)


class TokenTexts(Texts):
    """Rows of token ids, and the encoder that reads them. No checkpoint holds the ids."""

    ids: Tensor  # (n, l), int32
    mask: Tensor  # (n, l), bool

    def __init__(self, spec: Learned, ids: Tensor, mask: Tensor) -> None:
        """Raises UserError where transformers is missing."""
        super().__init__()
        self.tokenizer = spec.tokenizer
        self.width = spec.width
        self.pooled_width = 0
        self.length = ids.shape[1]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.encoder = encoder(spec)
        self.drop = spec.drop

    def forward(self, c: Cond) -> TextRows:
        """The rows of c (b,): tokens, and which of them are there."""
        mask = self.mask[c]
        if self.training and self.drop and (rows := dropout.current(len(c))) is not None:
            last = mask & ~F.pad(mask[:, 1:], (0, 1))  # the end of the text is never hidden: some token always stays
            mask = mask & dropout.keep_mask(rows, mask.shape[1:], self.drop).gather(1, words(self.ids[c])) | last
        seen = mask[:, None, None]  # four axes: of two, transformers would read the numbers and wait for the device
        return self.encoder(self.ids[c], attention_mask=seen).last_hidden_state, mask, None

    def append(self, texts: Sequence[str], source: Source | None = None) -> int:
        """Add the ids of these texts. Raises UserError as `Tokenizer.open`."""
        first, (ids, mask) = len(self.ids), self.tokenizer.open()(texts)
        self.ids = torch.cat([self.ids, ids.to(self.ids)])
        self.mask = torch.cat([self.mask, mask.to(self.mask)])
        return first


def words(ids: Int[Tensor, "b l"]) -> Int64[Tensor, "b l"]:
    """The number of the word in its text that each token belongs to: a space begins the next."""
    return (ids == SPACE).cumsum(1)


def encoder(spec: Learned) -> Any:  # noqa: ANN401, a model of transformers
    """The T5 encoder, its weights drawn from torch's generator. It has no dropout, which would draw from it as well."""
    known = transformers("net.texts.kind learned")
    config = known.T5Config(
        vocab_size=VOCABULARY,
        d_model=spec.width,
        d_kv=spec.width // ATTENTION,
        d_ff=WIDER * spec.width,
        num_layers=spec.depth,
        num_heads=ATTENTION,
        dropout_rate=0.0,
    )
    return known.T5EncoderModel(config).encoder


Text = Annotated[Learned | PipelineTexts | TextTable, Field(discriminator="kind")]


class Drawn(Spec):
    """Random texts of one token and more, for a cost or a derivative before the table is there; in no recipe."""

    kind: Literal["drawn"] = "drawn"
    of: PipelineTexts | TextTable | Learned  # its sizes

    def build(self, classes: int, source: tuple[int, ...] = ()) -> "Few":
        """Rows of these sizes, and of images of this shape that they edit; on the meta device without numbers."""
        g, of = stream("texts"), self.of
        if torch.get_default_device().type == "meta":
            return Few(of.build(ROWS - 1, source) if isinstance(of, PipelineTexts) else of.build(ROWS - 1))
        length = of.tokenizer.length if isinstance(of, Learned) else of.sizes.length
        mask = torch.arange(length) < (torch.arange(ROWS) % length + 1)[:, None]
        if isinstance(of, Learned):
            ids = torch.randint(VOCABULARY, mask.shape, generator=g)
            return Few(TokenTexts(of, ids.int(), mask))
        sizes = of.sizes
        tokens = torch.randn(*mask.shape, sizes.width, generator=g)
        pooled = torch.randn(ROWS, sizes.pooled, generator=g) if sizes.pooled else None
        edited = torch.randn(ROWS, *source, generator=g) if source else None
        return Few(Rows(tokens, mask if sizes.masked else None, pooled, source=edited))


class Few(Texts):
    """A few rows, repeated."""

    def __init__(self, of: Texts) -> None:
        """Has the width and length of these rows."""
        super().__init__()
        self.of = of
        self.width = of.width
        self.pooled_width = of.pooled_width
        self.length = of.length
        self.masked = of.masked

    def forward(self, c: Cond) -> TextRows:
        """Row c modulo the number of rows."""
        return self.of(c % ROWS)

    def sources(self, c: Cond) -> Source | None:
        """As the rows."""
        return self.of.sources(c % ROWS)


def or_drawn(texts: object) -> object:
    """Drawn rows for a table that is not there; other texts as they are."""
    if isinstance(texts, PipelineTexts | TextTable | Learned) and not (texts.folder / FILE).exists():
        return Drawn(of=texts)
    return texts
