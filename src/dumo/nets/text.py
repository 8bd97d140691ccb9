"""Texts that a net reads as token ids, through a T5 encoder that is trained with it; and drawn texts, for estimates.

1. `LearnedTexts`, the spec, has a table of token ids (`dumo.nets.table.TableTexts`). Its `build` reads the ids, and
   draws the weights of a T5 (Raffel et al. 2020) over bytes.
2. `TokenTexts`, the module, reads a batch's captions at every pass, in training without some of their words. The
   encoder is part of the net: optimizer, averages and checkpoints hold its weights.

A caption does not depend on t, so derivatives along the flow do not pass through it.

Where a table of any kind does not exist yet, `drawn_if_missing` gives `DrawnTexts`, random texts of its sizes. A cost
or a derivative is then measured with these.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Int, Int64
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dumo.encoders.tokens import NUM_BYTE_IDS, SPACE_ID, ByteTokenizer, warn_of_cuts
from dumo.encoders.transformers_library import import_transformers
from dumo.flow import dropout
from dumo.io.table import FILE
from dumo.nets.rows import Rows, SourceLatents, TextRows, Texts
from dumo.nets.table import PipelineTexts, TableTexts, TextTable
from dumo.runtime.limits import BLOCKS, CHANNELS
from dumo.runtime.random import stream
from dumo.types import Cond, Spec

_NUM_HEADS = 4  # ours
_MLP_RATIO = 4  # the perceptron's width over the encoder's (Raffel et al. 2020)
_DRAWN_ROWS = 16  # of random texts, instead of a table (ours)


class LearnedTexts(TableTexts):
    """A T5 encoder of these sizes, which is trained with the net; its token ids come from a table."""

    kind: Literal["learned"] = "learned"
    tokenizer: ByteTokenizer = ByteTokenizer()
    width: int = Field(default=128, ge=_NUM_HEADS, le=CHANNELS, multiple_of=_NUM_HEADS)
    depth: int = Field(default=2, ge=1, le=BLOCKS)
    # The share of a caption's words that are hidden in training (Iyyer et al. 2015): few captions are overfitted.
    drop: float = Field(default=0.0, ge=0, lt=1)

    @property
    def reader_spec(self) -> ByteTokenizer:
        """The tokenizer."""
        return self.tokenizer

    def build(self, captions: int) -> "TokenTexts":
        """Build the encoder, with the ids of all captions and of the empty one; on the meta device without files.

        Raises UserError where there is no table, it is of other captions or another tokenizer, or transformers is
        missing.
        """
        shape = (captions + 1, self.tokenizer.length)
        if torch.get_default_device().type == "meta":
            return TokenTexts(self, torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.bool))
        ids, mask, _ = self.open_table(captions).read_rows()
        return TokenTexts(self, ids.int(), mask)


class TokenTexts(Texts):
    """Token ids of n texts, and the encoder that reads them. No checkpoint holds the ids."""

    ids: Tensor  # (n, l), int32
    mask: Tensor  # (n, l), bool: False where a shorter text has no token

    def __init__(self, spec: LearnedTexts, ids: Tensor, mask: Tensor) -> None:
        """Make the encoder of `spec` for these texts. Raises UserError where transformers is missing."""
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
        """Return tokens (b, l, width) of texts c (b,), and their mask (b, l). In training, `drop` hides words."""
        ids = self.ids[c]
        mask = self.mask[c]
        if self.training and self.drop:
            mask = self._hide_words(ids, mask)
        attended = mask[:, None, None]  # of two axes, transformers would read the values and wait for the device
        return self.encoder(ids, attention_mask=attended).last_hidden_state, mask, None

    def _hide_words(self, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """Return the mask without the words that this step's draws hide; unchanged outside of a step."""
        rows = dropout.current(len(ids))
        if rows is None:
            return mask
        is_last = mask & ~F.pad(mask[:, 1:], (0, 1))  # the end of the text is never hidden: some token always stays
        kept_words = dropout.keep_mask(rows, mask.shape[1:], self.drop)
        return mask & kept_words.gather(1, _word_of_token(ids)) | is_last

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Add the ids of texts, and return the row of the first. Warns where texts are cut.

        Raises UserError as `ByteTokenizer.open`.
        """
        first_row = len(self.ids)
        tokenizer = self.tokenizer.open()
        ids, mask = tokenizer(texts)
        warn_of_cuts(tokenizer.cut_texts(texts), f"at {tokenizer.length} tokens")
        self.ids = torch.cat([self.ids, ids.to(self.ids)])
        self.mask = torch.cat([self.mask, mask.to(self.mask)])
        return first_row


def _word_of_token(ids: Int[Tensor, "b l"]) -> Int64[Tensor, "b l"]:
    """The number, within its text, of the word that each token belongs to: a space begins the next."""
    return (ids == SPACE_ID).cumsum(1)


def _draw_encoder(spec: LearnedTexts) -> Any:  # noqa: ANN401, a model of transformers
    """A T5 encoder with weights drawn from torch's generator, without dropout, which would draw from it as well."""
    library = import_transformers("net.texts.kind learned")
    config = library.T5Config(
        vocab_size=NUM_BYTE_IDS,
        d_model=spec.width,
        d_kv=spec.width // _NUM_HEADS,
        d_ff=_MLP_RATIO * spec.width,
        num_layers=spec.depth,
        num_heads=_NUM_HEADS,
        dropout_rate=0.0,
    )
    return library.T5EncoderModel(config).encoder


class DrawnTexts(Spec):
    """Random texts of the sizes of other texts, whose table does not exist yet; in no recipe.

    Row i has 1 + i tokens, modulo the length.
    """

    kind: Literal["drawn"] = "drawn"
    of: PipelineTexts | TextTable | LearnedTexts  # has the sizes

    def build(self, captions: int, source_shape: tuple[int, ...] = ()) -> "RepeatedTexts":
        """Draw _DRAWN_ROWS texts, which stand for any number of captions; on the meta device without values.

        `source_shape` is the shape of the latents of images that texts edit; (): they edit none.
        """
        if torch.get_default_device().type == "meta":
            return RepeatedTexts(self._outline(source_shape))
        if isinstance(self.of, LearnedTexts):
            return RepeatedTexts(self._draw_ids(self.of))
        return RepeatedTexts(self._draw_embeddings(self.of, source_shape))

    def _outline(self, source_shape: tuple[int, ...]) -> Texts:
        """The rows of the other texts, on the meta device."""
        captions = _DRAWN_ROWS - 1  # the last row is the empty caption
        if isinstance(self.of, PipelineTexts):
            return self.of.build(captions, source_shape)
        return self.of.build(captions)

    @staticmethod
    def _draw_ids(spec: LearnedTexts) -> "TokenTexts":
        """Random token ids, and the encoder that reads them."""
        mask = _draw_mask(spec.tokenizer.length)
        ids = torch.randint(NUM_BYTE_IDS, mask.shape, generator=stream("texts"))
        return TokenTexts(spec, ids.int(), mask)

    @staticmethod
    def _draw_embeddings(spec: PipelineTexts | TextTable, source_shape: tuple[int, ...]) -> Rows:
        """Random embeddings from N(0, 1), and images to edit where there are some."""
        generator = stream("texts")
        sizes = spec.sizes
        mask = _draw_mask(sizes.length)
        tokens = torch.randn(*mask.shape, sizes.width, generator=generator)
        pooled = torch.randn(_DRAWN_ROWS, sizes.pooled_width, generator=generator) if sizes.pooled_width else None
        source = torch.randn(_DRAWN_ROWS, *source_shape, generator=generator) if source_shape else None
        return Rows(tokens, mask if sizes.has_mask else None, pooled, source=source)


def _draw_mask(length: int) -> Bool[Tensor, "n l"]:
    """The mask of _DRAWN_ROWS texts of at most `length` tokens: text i has 1 + i modulo the length."""
    token_counts = torch.arange(_DRAWN_ROWS) % length + 1
    return torch.arange(length) < token_counts[:, None]


class RepeatedTexts(Texts):
    """_DRAWN_ROWS texts, repeated for any number of captions."""

    def __init__(self, texts: Texts) -> None:
        """Hold the texts, which have _DRAWN_ROWS rows."""
        super().__init__()
        self.texts = texts
        self.width = texts.width
        self.pooled_width = texts.pooled_width
        self.length = texts.length
        self.has_mask = texts.has_mask

    def forward(self, c: Cond) -> TextRows:
        """Return the rows of c (b,) modulo the number of rows."""
        return self.texts(c % _DRAWN_ROWS)

    def sources(self, c: Cond) -> SourceLatents | None:
        """Return the images (b, c, h, w) that rows c (b,), modulo the number of rows, edit; None: they edit none."""
        return self.texts.sources(c % _DRAWN_ROWS)


def drawn_if_missing(texts: object) -> object:
    """Return `DrawnTexts` in place of a spec of texts whose table does not exist; any other spec as it is."""
    if isinstance(texts, PipelineTexts | TextTable | LearnedTexts) and not (texts.folder / FILE).exists():
        return DrawnTexts(of=texts)
    return texts


Text = Annotated[LearnedTexts | PipelineTexts | TextTable, Field(discriminator="kind")]  # texts that a net may read
