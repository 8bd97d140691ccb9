"""Texts cut into tokens: bytes, which need no file, or as the tokenizer of a folder cuts them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Int64
from pydantic import Field, field_validator
from torch import Tensor

from dumo.bound import TOKENS
from dumo.io.path import user_path
from dumo.io.text import brief
from dumo.types import Spec, UserError

BYTES = "bytes"
EXTRA = "needs transformers: pip install 'dumo[text]'"


class Tokenizer(Spec):
    """How a text becomes tokens."""

    source: str = BYTES  # bytes (Xue et al. 2022, ByT5): no file; or a folder with tokenizer files of transformers
    length: int = Field(default=64, ge=1, le=TOKENS)  # tokens of a text at most; more are cut, with a warning
    template: str = "{}"  # {} is the text

    @field_validator("template")
    @classmethod
    def _holds_the_text(cls, template: str) -> str:
        if template.count("{}") != 1:
            raise ValueError("it holds {} once, which stands for the text")
        return template

    def open(self) -> "Opened":
        """Its files read. Raises UserError where there are none, or transformers is missing."""
        return Opened(self, loaded(self.source))


@dataclass(frozen=True)
class Opened:
    """A tokenizer that is read."""

    spec: Tokenizer
    model: Any  # of transformers

    @property
    def vocabulary(self) -> int:
        """Tokens are numbered below this."""
        return len(self.model)

    def __call__(self, texts: Sequence[str], *, whole: bool = True) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Tokens, and which are there. `whole`: l is the spec's length; else that of the longest text here.

        Warns where texts are cut.
        """
        spec = self.spec
        told = [spec.template.replace("{}", text) for text in texts]
        lengths = [len(ids) for ids in self.model(told, truncation=False, verbose=False)["input_ids"]]
        if long := [text for text, n in zip(texts, lengths, strict=True) if n > spec.length]:
            more = f", and {len(long) - 1} more" if len(long) > 1 else ""
            warnings.warn(
                f"'{brief(long[0], 60)}'{more}: longer than {spec.length} tokens, and cut: raise length for all of it",
                stacklevel=2,
            )
        found = self.model(
            *(told,),
            padding="max_length" if whole else "longest",
            max_length=spec.length,
            truncation=True,
            padding_side="right",
            return_tensors="pt",
        )
        return found["input_ids"], found["attention_mask"].bool()


def loaded(source: str) -> Any:  # noqa: ANN401, a tokenizer of transformers
    """Raises as `Tokenizer.open`."""
    try:
        import transformers  # slow to import, and an extra
    except ImportError as error:
        raise UserError(f"net.texts {EXTRA}") from error
    if source == BYTES:
        return transformers.ByT5Tokenizer(extra_ids=0)
    folder = user_path(source, "net.texts, the tokenizer's folder")
    return of_folder(folder)


def of_folder(folder: Path) -> Any:  # noqa: ANN401, as `loaded`
    """The tokenizer that lies in a folder. Raises UserError where there is none."""
    import transformers

    hint = "name a folder with tokenizer_config.json and its files, as save_pretrained writes them, or bytes"
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"net.texts: {folder} holds no tokenizer: {hint}")
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"net.texts: {folder} holds no tokenizer that can be read ({brief(error)}): {hint}") from error
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found
