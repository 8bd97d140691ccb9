"""Texts cut into tokens: bytes, which need no file, or as the tokenizer of a folder cuts them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jaxtyping import Bool, Int64
from pydantic import Field, field_validator
from torch import Tensor

from dumo.bound import TOKENS
from dumo.io import digest
from dumo.io.path import user_path
from dumo.io.text import brief
from dumo.types import FREE, Spec, UserError

BYTES = "bytes"
SPACE = 35  # ByT5's token of a space: its bytes stand behind three tokens of its own
EXTRA = "needs transformers: pip install 'dumo[text]'"
HINT = "name a folder with tokenizer_config.json and its files, as transformers saves a tokenizer, or bytes"


class Tokenizer(Spec):
    """How a text becomes tokens."""

    kind: Literal["tokens"] = "tokens"
    # bytes (ByT5, Xue et al. 2022): no file; or a folder with a tokenizer of transformers.
    source: str = Field(default=BYTES, json_schema_extra=FREE)
    length: int = Field(default=64, ge=1, le=TOKENS)  # tokens of a text at most; more are cut, with a warning
    template: str = "{}"  # {} is the text

    @field_validator("template")
    @classmethod
    def _holds_the_text(cls, template: str) -> str:
        return holding(template)

    @property
    def space(self) -> int | None:
        """The token that begins a word; None: every token is taken for a word, which larger ones nearly are."""
        return SPACE if self.source == BYTES else None

    def open(self) -> "Cut":
        """Its files read. Raises UserError where there are none, or transformers is missing."""
        return Cut(self, loaded(self.source))


@dataclass(frozen=True)
class Cut:
    """A tokenizer that is read."""

    spec: Tokenizer
    model: Any  # of transformers

    @property
    def vocabulary(self) -> int:
        """Tokens are numbered below this."""
        return len(self.model)

    @cached_property
    def sha256(self) -> str:
        """Of the tokens and their numbers."""
        known: dict[str, int] = self.model.get_vocab()
        return digest.of_bytes(*(f"{n} {token}\n".encode() for token, n in sorted(known.items())))

    def __call__(self, texts: Sequence[str], *, whole: bool = True) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Tokens, and which are there; l is the spec's length if `whole`, else that of the longest here.

        Warns where texts are cut. Raises UserError for a text of which no token is left.
        """
        told = [self.spec.template.replace("{}", text) for text in texts]
        self.warn(texts, [len(ids) for ids in self.model(told, verbose=False)["input_ids"]])
        padded = {"padding": "max_length" if whole else "longest", "padding_side": "right", "return_tensors": "pt"}
        found = self.model(told, truncation=True, max_length=self.spec.length, **padded)
        ids, mask = found["input_ids"], found["attention_mask"].bool()
        if not bool(mask.any(1).all()):
            raise UserError("net.texts: a text has no token, not even one of its end: choose another tokenizer")
        return ids, mask

    def warn(self, texts: Sequence[str], lengths: Sequence[int]) -> None:
        """Say which of the texts are cut."""
        most = self.spec.length
        if long := [brief(text, 60) for text, n in zip(texts, lengths, strict=True) if n > most]:
            more = f" and {len(long) - 1} more" if len(long) > 1 else ""
            warnings.warn(f"'{long[0]}'{more}: more than {most} tokens, and cut there", stacklevel=3)


def holding(template: str) -> str:
    """The template. Raises ValueError where {} does not stand in it once."""
    if template.count("{}") != 1:
        raise ValueError("a template holds {} once, in the place of the text")
    return template


def loaded(source: str) -> Any:  # noqa: ANN401, a tokenizer of transformers
    """The tokenizer of a source. Raises as `Tokenizer.open`."""
    try:
        import transformers  # slow to import, and an extra
    except ImportError as error:
        raise UserError(f"net.texts {EXTRA}") from error
    if source == BYTES:
        return transformers.ByT5Tokenizer(extra_ids=0)
    folder = user_path(source, "net.texts: the tokenizer's folder")
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"net.texts: {folder} holds no tokenizer: {HINT}")
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"net.texts: {folder} holds no tokenizer that can be read ({brief(error)}): {HINT}") from error
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found
