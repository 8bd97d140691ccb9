"""Texts that a net reads as token ids, through a T5 encoder that is trained with it.

1. `LearnedTexts` is the spec. Its `build` draws the weights of a T5 (Raffel et al. 2020) over bytes, and `load`
   tokenizes the captions, which takes no file.
2. `TokenTexts`, the module, reads a batch's captions at every pass, in training without some of their words. The
   encoder is part of the net: optimizer, averages and checkpoints hold its weights.

A caption does not depend on t, so derivatives along the flow do not pass through it.
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

_NUM_HEADS = 4  # ours
_MLP_RATIO = 4  # the perceptron's width over the encoder's (Raffel et al. 2020)


class LearnedTexts(TextsSpec):
    """A T5 encoder of these sizes, which is trained with the net, over the bytes of texts."""

    kind: Literal["learned"] = "learned"
    tokenizer: ByteTokenizer = ByteTokenizer()
    width: int = Field(default=128, ge=_NUM_HEADS, le=CHANNELS, multiple_of=_NUM_HEADS)
    depth: int = Field(default=2, ge=1, le=BLOCKS)
    # The share of a caption's words that are hidden in training (Iyyer et al. 2015): few captions are overfitted.
    drop: float = Field(default=0.0, ge=0, lt=1)

    def build(self, captions: int) -> "TokenTexts":
        """Build the encoder for this number of captions and the empty one, whose ids are not known yet (`load`).

        Raises UserError if transformers is missing.
        """
        return TokenTexts(self, captions)

    def load(self, texts: Texts, captions: Sequence[str]) -> None:
        """Tokenize the captions for the module that `build` made; () if they are not on this machine.

        Warns if captions are cut.
        """
        assert isinstance(texts, TokenTexts)
        if self._has_random_rows:  # zeros take as long as other ids
            return
        tokenizer = self.tokenizer.open()
        ids, mask = tokenizer([*captions, ""])
        num_unknown = texts.count - len(captions)
        texts.hold(F.pad(ids, (0, 0, num_unknown, 0)), F.pad(mask, (0, 0, num_unknown, 0)), num_unknown)
        num_cut = len(tokenizer.cut_texts([*captions, ""]))
        if num_cut:
            warnings.warn(
                f"{num_cut:,} captions are cut at {tokenizer.length} tokens: raise net.texts.tokenizer.length",
                stacklevel=2,
            )


class TokenTexts(Texts):
    """Token ids of n texts, and the encoder that reads them. No checkpoint holds the ids."""

    ids: Tensor  # (n, l), int32
    mask: Tensor  # (n, l), bool: False where a shorter text has no token

    def __init__(self, spec: LearnedTexts, count: int) -> None:
        """Make the encoder of `spec` for `count` captions. Raises UserError if transformers is missing."""
        super().__init__()
        self.tokenizer = spec.tokenizer
        self.width = spec.width
        self.pooled_width = 0
        self.count = count
        self.num_unknown = 0  # the first captions, if they are not on this machine
        shape = (count + 1, spec.tokenizer.length)
        self.register_buffer("ids", torch.zeros(shape, dtype=torch.int32), persistent=False)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool), persistent=False)
        self.encoder = _draw_encoder(spec)
        self.drop = spec.drop

    def hold(self, ids: Int[Tensor, "n l"], mask: Bool[Tensor, "n l"], num_unknown: int) -> None:
        """Take the token ids of all captions and of the empty text, the first `num_unknown` of which are not known."""
        self.ids = ids.to(self.ids)
        self.mask = mask.to(self.mask)
        self.num_unknown = num_unknown

    def forward(self, c: Cond) -> TextRows:
        """Return tokens (b, l, width) of texts c (b,), and their mask (b, l). In training, `drop` hides words.

        Raises UserError for a caption that is not on this machine.
        """
        if self.num_unknown and bool((c < self.num_unknown).any()):
            raise UserError(
                "net.texts: the data's captions are not on this machine: set data.root, or sample by prompts"
            )
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

    def keep(self, first: int, rows: Sequence[int]) -> None:
        """Keep all rows before number `first`, and behind them only the rows of the numbers `rows`, in this order."""
        self.ids = torch.cat([self.ids[:first], self.ids[[*rows]]])
        self.mask = torch.cat([self.mask[:first], self.mask[[*rows]]])


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
