"""Texts as tokens: bytes, which need no file, or as the tokenizer of a folder cuts them.

`ByteTokenizer.open` loads the tokenizer of bytes, and `load_tokenizer` that of a folder. Either gives a
`LoadedTokenizer`, which turns texts into ids of tokens when it is called. Its `cut_texts` says which texts it cuts, and
`warn_of_cuts` warns of them.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Bool, Int64
from pydantic import Field
from torch import Tensor

from dumo.encoders.transformers_library import import_transformers
from dumo.io import digest
from dumo.io.read import brief
from dumo.runtime.limits import TOKENS
from dumo.types import Spec, UserError

# ByT5 (Xue et al. 2022): the 256 bytes follow padding, end and unknown.
NUM_BYTE_IDS = 259
SPACE_ID = 35  # of byte 32
HINT = "name a folder with tokenizer_config.json and its files, as transformers saves a tokenizer"
_LETTERS = "aeiost7"  # texts that every whole tokenizer of a Latin script tells apart: ours
_NUM_OWN_WORDS = 20  # words of a vocabulary, which are tried where letters do not do: ours
# The files that transformers saves a tokenizer in: vocabulary, merges, special tokens, normalizer and settings.
_FILE_PATTERNS = ("*token*.json", "vocab.*", "merges.txt", "*.model")


class ByteTokenizer(Spec):
    """The bytes of a text (ByT5), for an encoder that is trained with the net."""

    kind: Literal["tokens"] = "tokens"
    length: int = Field(default=64, ge=1, le=TOKENS)  # tokens of a text at most; longer texts are cut, with a warning

    def open(self) -> "LoadedTokenizer":
        """Load the tokenizer of bytes. Raises UserError where transformers is missing."""
        return LoadedTokenizer(import_transformers("net.texts").ByT5Tokenizer(extra_ids=0), self.length)


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer of transformers, and how it is used. A call turns texts into ids of tokens."""

    library_tokenizer: Any  # of transformers
    length: int  # tokens of a text at most
    template: str = "{}"  # {} is the text

    def __call__(
        self, texts: Sequence[str], *, fills_length: bool = True
    ) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Return the ids of tokens (b, l) of b texts, and a mask (b, l) that is False on padding.

        l is `length` if `fills_length`, else the number of tokens of the longest text. Longer texts are cut at
        `length` tokens, without a warning.

        Raises UserError for a text without any token.
        """
        encoded = self.library_tokenizer(
            self._fill_template(texts),
            truncation=True,
            max_length=self.length,
            padding="max_length" if fills_length else "longest",
            padding_side="right",
            return_tensors="pt",
        )
        ids = encoded["input_ids"]
        mask = encoded["attention_mask"].bool()
        if not bool(mask.any(1).all()):
            raise UserError(
                "net.texts: a text has no token, not even one of its end: set net.texts.encoder.template with words "
                "around {}, such as 'an image: {}.', and skip to leave the first of them out"
            )
        return ids, mask

    def cut_texts(self, texts: Sequence[str]) -> tuple[str, ...]:
        """Return those of the texts that a call cuts, because they have more than `length` tokens."""
        ids_by_text = zip(texts, self._ids_without_cut(texts), strict=True)
        return tuple(text for text, ids in ids_by_text if len(ids) > self.length)

    def count_tokens_before_text(self) -> int:
        """Count the tokens before a text, of the template and of the beginning: they are the same for all texts."""
        texts = [*_LETTERS, *_own_words(self.library_tokenizer)]
        places = zip(*self._ids_without_cut(texts), strict=False)  # the first tokens of all texts, the second ones, ...
        return sum(1 for _ in takewhile(lambda tokens: len({*tokens}) == 1, places))

    def _ids_without_cut(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of the tokens of each text, all of them."""
        return self.library_tokenizer(self._fill_template(texts), verbose=False)["input_ids"]

    def _fill_template(self, texts: Sequence[str]) -> list[str]:
        """The texts with the words of the template around them."""
        return [self.template.replace("{}", text) for text in texts]


def warn_of_cuts(cut_texts: Sequence[str], place: str) -> None:
    """Warn of texts that are cut, if there are any. `place` says where, such as "at 77 tokens"."""
    if not cut_texts:
        return
    subject = f"'{brief(cut_texts[0], 60)}'"
    if len(cut_texts) > 1:
        subject += f" and {len(cut_texts) - 1} more"
    warnings.warn(f"{subject}: cut {place}", stacklevel=3)


def load_tokenizer(folder: Path, length: int, template: str = "{}", *, field: str = "net.texts") -> LoadedTokenizer:
    """Load the tokenizer of a folder, which a run names in `field`.

    Raises UserError if its settings or its vocabulary are missing: transformers would make one with other tokens.
    """
    tokenizer_class = import_transformers(field).AutoTokenizer
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{field}: {folder} has no tokenizer_config.json: {HINT}")
    tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    require_vocabulary(tokenizer, f"{field}: {folder} holds no whole tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedTokenizer(tokenizer, length, template)


def require_vocabulary(tokenizer: Any, problem: str, hint: str = HINT) -> None:  # noqa: ANN401, of transformers
    """Raise UserError, from `problem` to `hint`, for a tokenizer that gives the same tokens for all texts.

    transformers makes one of a folder whose file of the vocabulary is missing.
    """
    letters = [*_LETTERS]
    if not (_tells_apart(tokenizer, letters) or _tells_apart(tokenizer, letters + _own_words(tokenizer))):
        raise UserError(f"{problem}, for it tells no texts apart, as without its vocabulary: {hint}")


def _tells_apart(tokenizer: Any, texts: list[str]) -> bool:  # noqa: ANN401, of transformers
    """Whether two of the texts have other tokens."""
    first_ids, *other_ids = tokenizer(texts, verbose=False)["input_ids"]
    return any(ids != first_ids for ids in other_ids)


def _own_words(tokenizer: Any) -> list[str]:  # noqa: ANN401, of transformers
    """Some words of a tokenizer's vocabulary, without the marks of their beginning or middle."""
    special_tokens = {*tokenizer.all_special_tokens}
    words = (token.strip("▁Ġ# ") for token in tokenizer.get_vocab() if token not in special_tokens)
    return list(islice(filter(None, words), _NUM_OWN_WORDS))


def tokenizer_hash(folder: Path) -> str:
    """The hash of a tokenizer's files with their names."""
    files = {file for pattern in _FILE_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return digest.short(*(f"{file.name} {digest.of_file(file)}" for file in sorted(files)))
