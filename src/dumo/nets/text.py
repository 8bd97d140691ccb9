"""What a net may read as text (`Text`), and a text encoder that is trained with the net.

A spec's `build` makes the module that turns numbers of captions into tokens. There are three: `PipelineTexts` and
`TextTable`, whose tokens a pretrained encoder has written into a table (`dumo.nets.table`), and `Learned`:

1. `Learned.build` reads token ids from a table, and draws the weights of a T5 (Raffel et al. 2020) over bytes.
2. `TokenTexts.forward` reads a batch's captions at every pass, in training without some of their words. The encoder is
   part of the net: optimizer, averages and checkpoints hold its weights.

A caption does not depend on t, so derivatives along the flow do not pass through it.

Where a table does not exist yet, `or_drawn` gives `Drawn`, random texts of the same sizes, for a cost or a derivative.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int, Int64
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dumo.encoders.tokens import SPACE, VOCABULARY, Tokenizer, import_transformers
from dumo.flow import dropout
from dumo.io.table import FILE
from dumo.nets.rows import Rows, Source, TextRows, Texts
from dumo.nets.table import PipelineTexts, Tabled, TextTable
from dumo.runtime.bound import BLOCKS, CHANNELS
from dumo.runtime.random import stream
from dumo.types import Cond, Spec

_NUM_HEADS = 4  # ours
_MLP_RATIO = 4  # the perceptron's width over the encoder's (Raffel et al. 2020)
_DRAWN_ROWS = 16  # of random texts, instead of a table (ours)


class Learned(Tabled):
    """A T5 encoder of these sizes, which is trained with the net; its token ids come from a table."""

    kind: Literal["learned"] = "learned"
    tokenizer: Tokenizer = Tokenizer()
    width: int = Field(default=128, ge=_NUM_HEADS, le=CHANNELS, multiple_of=_NUM_HEADS)
    depth: int = Field(default=2, ge=1, le=BLOCKS)
    # The share of a caption's words that are hidden in training (Iyyer et al. 2015): few captions are overfitted.
    drop: float = Field(default=0.0, ge=0, lt=1)

    @property
    def reader_spec(self) -> Tokenizer:
        """The tokenizer."""
        return self.tokenizer

    def build(self, classes: int) -> "TokenTexts":
        """Build the encoder, with the ids of `classes` captions and of the empty one; on the meta device without files.

        Raises UserError where there is no table, it is of other captions or another tokenizer, or transformers is
        missing.
        """
        shape = (classes + 1, self.tokenizer.length)
        if torch.get_default_device().type == "meta":
            return TokenTexts(self, torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.bool))
        ids, mask, _ = self.table(classes).padded()
        return TokenTexts(self, ids.int(), mask)


class TokenTexts(Texts):
    """Token ids of n texts, and the encoder that reads them. No checkpoint holds the ids."""

    ids: Tensor  # (n, l), int32
    mask: Tensor  # (n, l), bool: False where a shorter text has no token

    def __init__(self, spec: Learned, ids: Tensor, mask: Tensor) -> None:
        """Raises UserError where transformers is missing."""
        super().__init__()
        self.tokenizer = spec.tokenizer
        self.width = spec.width
        self.pooled_width = 0
        self.length = ids.shape[1]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.encoder = _draw_encoder(spec)
        self.drop = spec.drop

    def forward(self, c: Cond) -> TextRows:
        """Tokens (b, l, width) of texts c (b,), and which of them exist (b, l). In training, `drop` hides words."""
        ids = self.ids[c]
        mask = self.mask[c]
        if self.training and self.drop:
            mask = self._hide_words(ids, mask)
        attended = mask[:, None, None]  # of two axes, transformers would read the values and wait for the device
        return self.encoder(ids, attention_mask=attended).last_hidden_state, mask, None

    def _hide_words(self, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """The mask without the words that this step's draws hide; unchanged outside of a step."""
        rows = dropout.current(len(ids))
        if rows is None:
            return mask
        is_last = mask & ~F.pad(mask[:, 1:], (0, 1))  # the end of the text is never hidden: some token always stays
        kept_words = dropout.keep_mask(rows, mask.shape[1:], self.drop)
        return mask & kept_words.gather(1, _word_of_token(ids)) | is_last

    def append(self, texts: Sequence[str], source: Source | None = None) -> int:
        """Add the ids of texts, and return the row of the first. Raises UserError as `Tokenizer.open`."""
        first_row = len(self.ids)
        ids, mask = self.tokenizer.open()(texts)
        self.ids = torch.cat([self.ids, ids.to(self.ids)])
        self.mask = torch.cat([self.mask, mask.to(self.mask)])
        return first_row


def _word_of_token(ids: Int[Tensor, "b l"]) -> Int64[Tensor, "b l"]:
    """The number, within its text, of the word that each token belongs to: a space begins the next."""
    return (ids == SPACE).cumsum(1)


def _draw_encoder(spec: Learned) -> Any:  # noqa: ANN401, a model of transformers
    """A T5 encoder with weights drawn from torch's generator, without dropout, which would draw from it as well."""
    library = import_transformers("net.texts.kind learned")
    config = library.T5Config(
        vocab_size=VOCABULARY,
        d_model=spec.width,
        d_kv=spec.width // _NUM_HEADS,
        d_ff=_MLP_RATIO * spec.width,
        num_layers=spec.depth,
        num_heads=_NUM_HEADS,
        dropout_rate=0.0,
    )
    return library.T5EncoderModel(config).encoder


class Drawn(Spec):
    """Random texts of the sizes of other texts, whose table does not exist yet; in no recipe.

    Row i has 1 + i tokens, modulo the length.
    """

    kind: Literal["drawn"] = "drawn"
    of: PipelineTexts | TextTable | Learned  # has the sizes

    def build(self, classes: int, source: tuple[int, ...] = ()) -> "RepeatedTexts":
        """Build _DRAWN_ROWS texts, and images of shape `source` that they edit; on the meta device without values."""
        if torch.get_default_device().type == "meta":
            return RepeatedTexts(self._build_meta(source))
        generator = stream("texts")
        length = self.of.tokenizer.length if isinstance(self.of, Learned) else self.of.sizes.length
        token_counts = torch.arange(_DRAWN_ROWS) % length + 1
        mask = torch.arange(length) < token_counts[:, None]
        if isinstance(self.of, Learned):
            ids = torch.randint(VOCABULARY, mask.shape, generator=generator)
            return RepeatedTexts(TokenTexts(self.of, ids.int(), mask))
        sizes = self.of.sizes
        tokens = torch.randn(*mask.shape, sizes.width, generator=generator)
        pooled = torch.randn(_DRAWN_ROWS, sizes.pooled, generator=generator) if sizes.pooled else None
        edited = torch.randn(_DRAWN_ROWS, *source, generator=generator) if source else None
        return RepeatedTexts(Rows(tokens, mask if sizes.masked else None, pooled, source=edited))

    def _build_meta(self, source: tuple[int, ...]) -> Texts:
        captions = _DRAWN_ROWS - 1  # the last row is the empty caption
        if isinstance(self.of, PipelineTexts):
            return self.of.build(captions, source)
        return self.of.build(captions)


class RepeatedTexts(Texts):
    """_DRAWN_ROWS texts, repeated for any number of captions."""

    def __init__(self, of: Texts) -> None:
        """Have the width and length of the texts `of`."""
        super().__init__()
        self.of = of
        self.width = of.width
        self.pooled_width = of.pooled_width
        self.length = of.length
        self.masked = of.masked

    def forward(self, c: Cond) -> TextRows:
        """The texts of row c modulo the number of rows, c (b,)."""
        return self.of(c % _DRAWN_ROWS)

    def sources(self, c: Cond) -> Source | None:
        """The images that row c modulo the number of rows edits, c (b,); None where there are none."""
        return self.of.sources(c % _DRAWN_ROWS)


def or_drawn(texts: object) -> object:
    """`Drawn` for the spec of texts whose table does not exist; any other spec as it is."""
    if isinstance(texts, PipelineTexts | TextTable | Learned) and not (texts.folder / FILE).exists():
        return Drawn(of=texts)
    return texts
