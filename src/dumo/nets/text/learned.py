"""Captions whose encoder is trained along with the net: a table of token ids, and a T5 encoder with random weights.

The encoder (Raffel et al. 2020) is part of the net: every pass reads its captions anew, and optimizer, averages and
checkpoints have its weights. A caption does not move with t, so a derivative along the flow passes it by.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dumo.bound import BLOCKS, CHANNELS
from dumo.nets.text.rows import Texts, Told
from dumo.nets.text.tabled import Tabled
from dumo.texts.tokens import EXTRA, Tokenizer
from dumo.types import Cond, UserError

WORDS = 2**20  # of a tokenizer: four times the largest there are. Ours
WIDER = 4  # the perceptron's width over the net's (Raffel et al. 2020)


class Learned(Tabled):
    """A T5 encoder by its sizes, over the token ids in a table."""

    kind: Literal["learned"] = "learned"
    tokenizer: Tokenizer = Tokenizer()
    vocabulary: int = Field(default=259, ge=1, le=WORDS)  # tokens there are: bytes, and three for ends and padding
    width: int = Field(default=128, ge=1, le=CHANNELS)
    depth: int = Field(default=2, ge=1, le=BLOCKS)
    attention: int = Field(default=4, ge=1, le=CHANNELS)  # attention heads

    @property
    def by(self) -> Tokenizer:
        """The tokenizer."""
        return self.tokenizer

    def build(self, classes: int) -> "Encoded":
        """The encoder, and the ids of `classes` captions and of none; on the meta device no file is read.

        Raises UserError where sizes do not fit, there is no table, it is of other captions or another tokenizer, or
        transformers is missing.
        """
        if self.width % self.attention:
            raise UserError(f"net.texts.attention {self.attention} does not divide net.texts.width {self.width}")
        shape = (classes + 1, self.tokenizer.length)
        if torch.get_default_device().type == "meta":
            return Encoded(self, torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.bool))
        ids, mask, _ = self.table(classes).padded()
        if (most := int(ids.max())) >= self.vocabulary:
            raise UserError(f"net.texts.root: {self.root} has tokens up to {most}: set net.texts.vocabulary={most + 1}")
        return Encoded(self, ids.int(), mask)


class Encoded(Texts):
    """Rows of token ids, and the encoder that reads them. The ids are in no checkpoint."""

    ids: Tensor  # (n, l), int32
    mask: Tensor  # (n, l), bool

    def __init__(self, spec: Learned, ids: Tensor, mask: Tensor) -> None:
        """Raises UserError where transformers is missing."""
        super().__init__()
        self.tokenizer, self.width, self.pooled_width, self.length = spec.tokenizer, spec.width, 0, ids.shape[1]
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.encoder = drawn(spec)

    def forward(self, c: Cond) -> Told:
        """The rows of c (b,): tokens, and which of them are there."""
        mask = self.mask[c]
        seen = mask[:, None, None]  # as it is: transformers would look at its numbers, and wait for the device
        return self.encoder(self.ids[c], attention_mask=seen).last_hidden_state, mask, None

    def append(self, texts: Sequence[str]) -> int:
        """Add the ids of these texts. Raises UserError as `Tokenizer.open`."""
        first, (ids, mask) = len(self.ids), self.tokenizer.open()(texts)
        self.ids = torch.cat([self.ids, ids.to(self.ids)])
        self.mask = torch.cat([self.mask, mask.to(self.mask)])
        return first


def drawn(spec: Learned) -> Any:  # noqa: ANN401, a model of transformers
    """The encoder, its weights drawn from torch's generator. It drops nothing, for that draws from it, too."""
    try:
        from transformers import T5Config, T5EncoderModel  # slow to import, and an extra
    except ImportError as error:
        raise UserError(f"net.texts.kind learned {EXTRA}") from error
    config = T5Config(
        vocab_size=spec.vocabulary,
        d_model=spec.width,
        d_kv=spec.width // spec.attention,
        d_ff=WIDER * spec.width,
        num_layers=spec.depth,
        num_heads=spec.attention,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).encoder
