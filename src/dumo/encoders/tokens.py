"""Tokenize texts: as bytes, which needs no files, or with a transformers tokenizer from a folder.

`ByteTokenizer.open` and `load_tokenizer` return a `LoadedTokenizer`, which converts texts to token ids when called.
`LoadedTokenizer.cut_texts` returns the texts that it truncates, and `warn_of_cuts` warns of them.
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

# ByT5 (Xue et al. 2022): ids 0 to 2 are padding, end of sequence and unknown; the 256 bytes follow.
NUM_BYTE_IDS = 259
SPACE_ID = 35  # byte 32
HINT = "give a folder with tokenizer_config.json and the tokenizer's files, as written by transformers' save_pretrained"
# Texts that every complete tokenizer of a Latin script encodes differently, and the number of vocabulary entries that
# are tried if it does not.
_LETTERS = "aeiost7"
_NUM_OWN_WORDS = 20
# Transformers tokenizer files: vocabulary, merges, special tokens, normalizer and settings.
_FILE_PATTERNS = ("*token*.json", "vocab.*", "merges.txt", "*.model")


class ByteTokenizer(Spec):
    """A byte tokenizer (ByT5), for a text encoder that is trained with the net."""

    kind: Literal["tokens"] = "tokens"
    length: int = Field(default=64, ge=1, le=TOKENS)  # tokens of a text at most; longer texts are cut, with a warning

    def open(self) -> "LoadedTokenizer":
        """Load the byte tokenizer. Raises UserError if transformers is not installed."""
        return LoadedTokenizer(import_transformers("net.texts").ByT5Tokenizer(extra_ids=0), self.length)


@dataclass(frozen=True)
class LoadedTokenizer:
    """A transformers tokenizer with its length and template. A call converts texts to token ids."""

    library_tokenizer: Any  # a transformers object
    length: int  # maximum number of tokens
    template: str = "{}"  # {} is replaced by the text

    def __call__(
        self, texts: Sequence[str], *, fills_length: bool = True
    ) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Return the token ids (b, l) of b texts, and a mask (b, l) that is False on padding.

        l is `length` if `fills_length`, else the number of tokens of the longest text. Texts are truncated to `length`
        tokens without a warning.

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
                "net.texts: the tokenizer returns no tokens for a text: set net.texts.encoder.template to words around "
                "{}, such as 'an image: {}.', and skip to remove the first ones"
            )
        return ids, mask

    def cut_texts(self, texts: Sequence[str]) -> tuple[str, ...]:
        """Return the texts that have more than `length` tokens, which a call truncates."""
        ids_by_text = zip(texts, self._ids_without_cut(texts), strict=True)
        return tuple(text for text, ids in ids_by_text if len(ids) > self.length)

    def count_tokens_before_text(self) -> int:
        """Count the leading tokens that all texts share: the start of sequence and the template's prefix."""
        texts = [*_LETTERS, *_own_words(self.library_tokenizer)]
        places = zip(*self._ids_without_cut(texts), strict=False)  # the i-th tokens of all texts
        return sum(1 for _ in takewhile(lambda tokens: len({*tokens}) == 1, places))

    def _ids_without_cut(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without truncation."""
        return self.library_tokenizer(self._fill_template(texts), verbose=False)["input_ids"]

    def _fill_template(self, texts: Sequence[str]) -> list[str]:
        """Insert each text into the template."""
        return [self.template.replace("{}", text) for text in texts]


def warn_of_cuts(cut_texts: Sequence[str], place: str) -> None:
    """Warn of truncated texts, if there are any. `place` is the limit in words, such as "at 77 tokens"."""
    if not cut_texts:
        return
    subject = f"'{brief(cut_texts[0], 60)}'"
    if len(cut_texts) > 1:
        subject += f" and {len(cut_texts) - 1} more"
    warnings.warn(f"{subject}: cut {place}", stacklevel=3)


def load_tokenizer(folder: Path, length: int, template: str = "{}", *, field: str = "net.texts") -> LoadedTokenizer:
    """Load the tokenizer of a folder that is named in `field` of run.yaml.

    Raises UserError if its settings or vocabulary are missing, because transformers would create a different tokenizer.
    """
    tokenizer_class = import_transformers(field).AutoTokenizer
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{field}: {folder} has no tokenizer_config.json: {HINT}")
    tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    require_vocabulary(tokenizer, f"{field}: the tokenizer in {folder} is incomplete")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedTokenizer(tokenizer, length, template)


def require_vocabulary(tokenizer: Any, problem: str, hint: str = HINT) -> None:  # noqa: ANN401, of transformers
    """Raise UserError, from `problem` to `hint`, for a tokenizer that encodes all texts alike.

    Transformers creates one if the vocabulary file is missing.
    """
    letters = [*_LETTERS]
    if not (_tells_apart(tokenizer, letters) or _tells_apart(tokenizer, letters + _own_words(tokenizer))):
        raise UserError(f"{problem}: it encodes different texts equally, as without a vocabulary: {hint}")


def _tells_apart(tokenizer: Any, texts: list[str]) -> bool:  # noqa: ANN401, of transformers
    """Whether the texts differ in their tokens."""
    first_ids, *other_ids = tokenizer(texts, verbose=False)["input_ids"]
    return any(ids != first_ids for ids in other_ids)


def _own_words(tokenizer: Any) -> list[str]:  # noqa: ANN401, of transformers
    """Return some words of a tokenizer's vocabulary, without word-boundary markers."""
    special_tokens = {*tokenizer.all_special_tokens}
    words = (token.strip("▁Ġ# ") for token in tokenizer.get_vocab() if token not in special_tokens)
    return list(islice(filter(None, words), _NUM_OWN_WORDS))


def tokenizer_hash(folder: Path) -> str:
    """Return a hash of the names and contents of a tokenizer's files."""
    files = {file for pattern in _FILE_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return digest.short(*(f"{file.name} {digest.of_file(file)}" for file in sorted(files)))
