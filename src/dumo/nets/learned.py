"""Text conditions with a byte-level T5 encoder that is trained with the network.

1. `LearnedTexts` is the spec. Its `build` initializes a T5 encoder (Raffel et al. 2020), and `load` tokenizes the
   captions, without any files.
2. `TokenTexts` is the module. It encodes the captions of a batch in every pass, with word dropout in training. The
   encoder is part of the network, its optimizer, averages and checkpoints.

Captions do not depend on t, so they have no tangent.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int, Int64
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dumo.encoders.tokens import NUM_BYTE_IDS, SPACE_ID, ByteTokenizer, warn_of_cuts
from dumo.encoders.transformers_library import import_transformers
from dumo.flow import dropout
from dumo.nets.text_rows import SourceLatents, TextRows, Texts, TextsSpec
from dumo.runtime.limits import BLOCKS, CHANNELS
from dumo.types import Cond, UserError

_NUM_HEADS = 4  # our choice
_MLP_RATIO = 4  # the width of the MLP divided by that of the encoder (Raffel et al. 2020)


class LearnedTexts(TextsSpec):
    """The sizes of a byte-level T5 encoder that is trained with the network."""

    kind: Literal["learned"] = "learned"
    tokenizer: ByteTokenizer = ByteTokenizer()
    width: int = Field(default=128, ge=_NUM_HEADS, le=CHANNELS, multiple_of=_NUM_HEADS)
    depth: int = Field(default=2, ge=1, le=BLOCKS)
    # The share of a caption's words that are dropped in training (Iyyer et al. 2015), against overfitting.
    drop: float = Field(default=0.0, ge=0, lt=1)

    def build(self, captions: int) -> "TokenTexts":
        """Build the encoder for this number of captions and the empty text. `load` sets their token ids.

        Raises UserError if transformers is missing.
        """
        return TokenTexts(self, captions)

    def load(self, texts: Texts, captions: Sequence[str]) -> None:
        """Tokenize the captions for the module that `build` returned; () if they are not on this machine.

        Warns if captions are truncated.
        """
        assert isinstance(texts, TokenTexts)
        # Zeros, the initial ids, serve as random rows.
        if self._has_random_rows:
            return
        tokenizer = self.tokenizer.open()
        ids, mask = tokenizer([*captions, ""])
        num_unknown = texts.count - len(captions)
        texts.hold(F.pad(ids, (0, 0, num_unknown, 0)), F.pad(mask, (0, 0, num_unknown, 0)), num_unknown)
        num_cut = len(tokenizer.cut_texts([*captions, ""]))
        if num_cut:
            warnings.warn(
                f"{num_cut:,} captions are truncated to {tokenizer.length} tokens: increase net.texts.tokenizer.length",
                stacklevel=2,
            )


class TokenTexts(Texts):
    """Token ids of n texts, and their encoder. Checkpoints do not contain the ids.

    ids: (n, l), int32.
    mask: (n, l), bool, False for padding.
    """

    ids: Tensor
    mask: Tensor

    def __init__(self, spec: LearnedTexts, count: int) -> None:
        """Create the encoder of `spec` for `count` captions. Raises UserError if transformers is missing."""
        super().__init__()
        self.tokenizer = spec.tokenizer
        self.width = spec.width
        self.pooled_width = 0
        self.count = count
        # The number of first rows without token ids, because the captions are not on this machine.
        self.num_unknown = 0
        shape = (count + 1, spec.tokenizer.length)
        self.register_buffer("ids", torch.zeros(shape, dtype=torch.int32), persistent=False)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool), persistent=False)
        self.encoder = _draw_encoder(spec)
        self.drop = spec.drop

    def hold(self, ids: Int[Tensor, "n l"], mask: Bool[Tensor, "n l"], num_unknown: int) -> None:
        """Set the token ids of all captions and the empty text. The first `num_unknown` rows are not known."""
        self.ids = ids.to(self.ids)
        self.mask = mask.to(self.mask)
        self.num_unknown = num_unknown

    def forward(self, c: Cond) -> TextRows:
        """Return tokens (b, l, width) of texts c (b,), and their mask (b, l). In training, words are dropped.

        Raises UserError for a caption that is not on this machine.
        """
        if self.num_unknown and bool((c < self.num_unknown).any()):
            raise UserError(
                "net.texts: the data's captions are not on this machine: set data.root, or sample with prompts"
            )
        ids = self.ids[c]
        mask = self.mask[c]
        if self.training and self.drop:
            mask = self._drop_words(ids, mask)
        # With a mask of two axes, transformers would read its values and synchronize with the device.
        attended = mask[:, None, None]
        return self.encoder(ids, attention_mask=attended).last_hidden_state, mask, None

    def _drop_words(self, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """Return the mask without dropped words; unchanged outside of a training step."""
        keys = dropout.current(len(ids))
        if keys is None:
            return mask
        # The end token is never dropped, so that at least one token is left.
        is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
        kept_words = dropout.keep_mask(keys, mask.shape[1:], self.drop)
        return mask & kept_words.gather(1, _word_of_token(ids)) | is_last

    def append(self, texts: Sequence[str], source: SourceLatents | None = None) -> int:
        """Append the ids of texts, and return the row of the first. Warns if texts are truncated."""
        first_row = len(self.ids)
        tokenizer = self.tokenizer.open()
        ids, mask = tokenizer(texts)
        warn_of_cuts(tokenizer.cut_texts(texts), f"at {tokenizer.length} tokens")
        self.ids = torch.cat([self.ids, ids.to(self.ids)])
        self.mask = torch.cat([self.mask, mask.to(self.mask)])
        return first_row

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before `first`, followed by the rows numbered `rows`, in this order."""
        self.ids = torch.cat([self.ids[:first], self.ids[[*rows]]])
        self.mask = torch.cat([self.mask[:first], self.mask[[*rows]]])


def _word_of_token(ids: Int[Tensor, "b l"]) -> Int64[Tensor, "b l"]:
    """Return the index of the word of each token in its text. Words are separated by spaces."""
    return (ids == SPACE_ID).cumsum(1)


def _draw_encoder(spec: LearnedTexts) -> Any:  # noqa: ANN401, a model of transformers
    """Create a T5 encoder with random weights, without dropout, which would use torch's generator."""
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
