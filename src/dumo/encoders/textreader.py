"""Encode texts on demand: prompts when sampling, and captions of data sets too large for the cache on disk.

The encoder is loaded at the first call. A row must be bit-identical to the row in the cache, so the caller's settings
must not affect the encoder:

- Autocast and autograd modes are per thread, so a separate thread encodes.
- Attention kernels and matmul precision are global, so the caller waits while they are set as for filling the cache.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dumo.encoders.encode_prompt import PromptReaderSpec
from dumo.encoders.textcache import (
    BATCH_SIZE,
    EncoderSpec,
    LoadedEncoder,
    StoredRow,
    cut_place,
    encode_captions,
    identity_of,
    to_columns,
    to_stored_types,
)
from dumo.encoders.tokens import warn_of_cuts
from dumo.encoders.transformers_text import Embeddings
from dumo.flow.precision import product_precision
from dumo.types import UserError

# All attention kernels, which is torch's default.
_ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


class TextReader:
    """Encodes texts with an encoder that is loaded at the first call and shared by all nets of the process."""

    def __init__(self, spec: EncoderSpec, identity: str, num_kept: int) -> None:
        """Take the encoder's spec, and its identity in the cache (`identity_of`).

        The `num_kept` most recently used rows are kept in memory. If `num_kept` is positive, the encoder is used in
        every training step and stays on the device; if 0, it is moved to the CPU between calls.
        """
        self.spec = spec
        self.identity = identity
        self.num_kept = num_kept
        self.encoder: LoadedEncoder | None = None
        self.kept_rows = OrderedDict[str, StoredRow]()  # by text, least recently used first
        self.thread = ThreadPoolExecutor(1, "texts", torch.set_num_threads, (torch.get_num_threads(),))
        self.has_warned = False  # about truncated texts

    def __deepcopy__(self, memo: dict[int, Any]) -> "TextReader":
        """Return self, because a net and its EMA copies share the encoder."""
        return self

    def __call__(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Return the rows of texts, on the CPU. Rows that are not in memory are encoded on `device`.

        Raises UserError if the encoder is missing or does not match the identity, or its output is not finite.
        """
        new_texts = [text for text in dict.fromkeys(texts) if text not in self.kept_rows]
        if new_texts:
            new_rows = self.thread.submit(self._encode, new_texts, device).result()
            self.kept_rows.update(zip(new_texts, new_rows, strict=True))
        rows: list[StoredRow] = []
        for text in texts:
            self.kept_rows.move_to_end(text)
            rows.append(self.kept_rows[text])
        while len(self.kept_rows) > self.num_kept:
            self.kept_rows.popitem(last=False)
        return rows

    def require_identity(self) -> None:
        """Raise UserError if the encoder is missing or does not match the identity."""
        if not self.identity.startswith(identity_of(self.spec)):
            raise UserError(
                f"net.texts: the text encoder in {self.spec.source} is not {self.identity}, with which the run was "
                "trained: restore its files, or give the folder of that encoder"
            )

    def _encode(self, texts: Sequence[str], device: torch.device) -> list[StoredRow]:
        """Encode texts in the reader's thread. Raises as `__call__`."""
        spec = self.spec
        if self.encoder is None:
            self.require_identity()
            self.encoder = spec.open()
        self.encoder.to(device)
        rows: list[StoredRow] = []
        cut_texts: list[str] = []
        try:
            with sdpa_kernel(_ATTENTION_KERNELS), product_precision("fp32", device):
                for first in range(0, len(texts), BATCH_SIZE):
                    embeddings = encode_captions(self.encoder, texts[first : first + BATCH_SIZE])
                    cut_texts += embeddings.cut_texts
                    rows += _split_rows(embeddings, spec)
        finally:
            if not self.num_kept:
                self.encoder.to(torch.device("cpu"))
        if not (self.num_kept and self.has_warned):
            warn_of_cuts(cut_texts, cut_place(spec))
            self.has_warned = bool(cut_texts)
        return rows


# Readers by spec, identity and number of rows, because the nets of a process share an encoder.
_OPEN_READERS = WeakValueDictionary[str, TextReader]()


def shared_reader(spec: EncoderSpec, identity: str, num_kept: int) -> TextReader:
    """Return the reader of an encoder, which all nets of the process share. Does not load the encoder."""
    key = f"{spec.model_dump_json()} {identity} {num_kept}"
    reader = _OPEN_READERS.get(key)
    if reader is None:
        reader = TextReader(spec, identity, num_kept)
        _OPEN_READERS[key] = reader
    return reader


def _split_rows(embeddings: Embeddings, spec: EncoderSpec) -> list[StoredRow]:
    """Split a batch into rows, in the dtypes of the cache."""
    keeps_padding = isinstance(spec, PromptReaderSpec) and spec.padded
    rows: list[StoredRow] = []
    for i in range(len(embeddings.tokens)):
        pooled = None if embeddings.pooled is None else embeddings.pooled[i : i + 1]
        columns = to_columns(
            Embeddings(embeddings.tokens[i : i + 1], embeddings.mask[i : i + 1], pooled), keeps_padding=keeps_padding
        )
        del columns["lengths"]
        if "pooled" in columns:
            columns["pooled"] = columns["pooled"][0]
        dtypes = {name: torch.bool if name == "mask" else getattr(torch, spec.dtype) for name in columns}
        rows.append(to_stored_types(columns, dtypes))
    return rows
