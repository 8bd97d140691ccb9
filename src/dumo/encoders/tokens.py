"""Texts as tokens: bytes, which need no file, or as the tokenizer of a folder cuts them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Bool, Int64
from pydantic import Field
from torch import Tensor

from dumo.io import digest
from dumo.io.read import brief, foreign
from dumo.runtime import install
from dumo.runtime.bound import TOKENS
from dumo.types import Spec, UserError

# ByT5 (Xue et al. 2022): the 256 bytes follow padding, end and unknown.
VOCABULARY = 259
SPACE = 35  # byte 32
HINT = "name a folder with tokenizer_config.json and its files, as transformers saves a tokenizer"


class Tokenizer(Spec):
    """The bytes of a text (ByT5), for an encoder that is trained with the net."""

    kind: Literal["tokens"] = "tokens"
    length: int = Field(default=64, ge=1, le=TOKENS)  # tokens of a text at most; longer texts are cut, with a warning

    def open(self) -> "Cutter":
        """Ready to cut texts. Raises UserError where transformers is missing."""
        return Cutter(transformers("net.texts").ByT5Tokenizer(extra_ids=0), self.length)


@dataclass(frozen=True)
class Cutter:
    """A tokenizer of transformers, and how it is used."""

    model: Any  # of transformers
    length: int  # tokens of a text at most
    template: str = "{}"  # {} is the text

    @cached_property
    def sha256(self) -> str:
        """The hash of the tokens and their numbers."""
        known: dict[str, int] = self.model.get_vocab()
        return digest.of_bytes(*(f"{n} {token}\n".encode() for token, n in sorted(known.items())))

    def __call__(self, texts: Sequence[str], *, whole: bool = True) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Tokens, and which are there; l is `length` if `whole`, else that of the longest text here.

        Warns where texts are cut. Raises UserError for a text without any token.
        """
        filled = [self.template.replace("{}", text) for text in texts]
        padded = {"padding": "max_length" if whole else "longest", "padding_side": "right", "return_tensors": "pt"}
        with foreign("net.texts: the tokenizer fails", HINT):
            lengths = [len(ids) for ids in self.model(filled, verbose=False)["input_ids"]]
            found = self.model(filled, truncation=True, max_length=self.length, **padded)
            ids = found["input_ids"]
            mask = found["attention_mask"].bool()
        self._warn(texts, lengths)
        if not bool(mask.any(1).all()):
            raise UserError("net.texts: a text has no token, not even one of its end: choose another tokenizer")
        return ids, mask

    def _warn(self, texts: Sequence[str], lengths: Sequence[int]) -> None:
        """Name the texts that are cut."""
        if long := [brief(text, 60) for text, n in zip(texts, lengths, strict=True) if n > self.length]:
            more = f" and {len(long) - 1} more" if len(long) > 1 else ""
            warnings.warn(f"'{long[0]}'{more}: more than {self.length} tokens, and cut there", stacklevel=3)


def cutter(folder: Path, length: int, template: str = "{}") -> Cutter:
    """The tokenizer of a folder. Raises UserError where there is none, or transformers is missing."""
    known = transformers("net.texts").AutoTokenizer
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        raise UserError(f"net.texts: {folder} holds no tokenizer, {config.name} is missing: {HINT}")
    with foreign(f"net.texts: {folder} holds no tokenizer that can be read", HINT):
        model = known.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if model.pad_token is None:
            model.pad_token = model.eos_token
        return Cutter(model, length, template)


def transformers(field: str) -> Any:  # noqa: ANN401, a module
    """The library, slow to import, and an extra. Raises UserError, which names the field, where it is missing."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise UserError(f"{field} needs transformers: {install('text')}") from error
