"""Encode texts with a pretrained transformers text encoder: an embedding for every token.

`TextEncoder` is the spec in run.yaml. The order of events:

1. `TextEncoder.find_folder` finds the folder and chooses its weights, as an `EncoderFolder`.
2. `TextEncoder.open` calls it, refuses damaged weights, and loads the tokenizer and the model as an `EncoderModel`.
3. A call of the `EncoderModel` turns texts into `Embeddings`. `dumo.encoders.textcache` keeps them on disk.

`dumo.encoders.encode_prompt` does the same for the text encoders of a diffusers pipeline.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field, field_validator
from torch import Tensor

from dumo.encoders.part import TRANSFORMERS, TRANSFORMERS_FILE, PartWeights, choose_files, require_weights
from dumo.encoders.tokens import LoadedTokenizer, load_tokenizer, tokenizer_hash
from dumo.encoders.transformers_library import CONFIG, load_model
from dumo.flow.precision import Precision, using
from dumo.io import digest, hub
from dumo.io.read import read_json
from dumo.runtime.limits import TOKENS
from dumo.types import HUB_MODEL, PLACE, Spec, UserError

_FIELD = "net.texts.encoder.source"  # the field of run.yaml, for messages
_HINT = f"give a text encoder on the Hugging Face Hub, OWNER/NAME, or a folder with {CONFIG} and {TRANSFORMERS_FILE}"
# Transformers classes by the model_type of config.json, for models whose text encoder has its own class. They load no
# T5 decoder and no CLIP vision tower.
_CLASS_BY_MODEL_TYPE = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPTextModel",
}
_PROJECTED_CLASS = "CLIPTextModelWithProjection"  # also returns CLIP's projected text embedding


@dataclass(frozen=True)
class Embeddings:
    """The text inputs of a net: b texts of l tokens, with padding."""

    # (b, l, d): embeddings. (b, l): ids of tokens, where an encoder is trained with the net (`ByteTokenizer`).
    tokens: Shaped[Tensor, "b l *d"]
    mask: Bool[Tensor, "b l"]  # False on padding
    pooled: Float[Tensor, "b p"] | None  # an embedding of each whole text
    cut_texts: tuple[str, ...] = ()  # the truncated texts


class TextEncoder(Spec):
    """A text encoder, and the part of its output that is kept (docs/captions.md says what published models take)."""

    kind: Literal["transformers"] = "transformers"
    # A folder or a repository on the Hub, of transformers or of a pipeline: text_encoder with the tokenizer next to it.
    source: str = Field(json_schema_extra=PLACE | HUB_MODEL)
    # Tokens of a text that are kept, at most. The encoder reads up to length + skip; longer texts are cut.
    length: int = Field(default=77, ge=1, le=TOKENS)
    template: str = "{}"  # {} is the text
    skip: int = Field(default=0, ge=0, le=TOKENS)  # leave out this many first tokens, those of the template
    layer: int = Field(default=-1, le=-1)  # -1: the output; -2: the input of the last layer, and so on
    pooled: bool = False  # keep the embedding of the whole text as well
    pad: bool = False  # read and keep the tokens of padding, for a net that takes no mask
    precision: Precision = "fp32"  # of the encoder's passes, by the names of `dumo.flow.precision`
    # Of the embeddings in the cache (`dumo.encoders.textcache`) and in a net. The encoder itself gives float32.
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    @field_validator("template")
    @classmethod
    def _require_one_place_for_the_text(cls, template: str) -> str:
        if template.count("{}") != 1:
            raise ValueError("a template must contain {} exactly once, as the place of the text")
        return template

    def find_folder(self) -> "EncoderFolder":
        """Find the encoder's folder and choose its weights.

        Raises UserError if there is no folder, or it has no weights or only pickles.
        """
        source_folder = hub.path_of(self.source, _FIELD, _choose_files)
        if not source_folder.is_dir():
            raise UserError(f"{_FIELD}: there is no folder {self.source}: {_HINT}")
        folder = source_folder
        if not (folder / CONFIG).is_file():
            folder = source_folder / "text_encoder"  # a pipeline
        return EncoderFolder(folder, require_weights(folder, TRANSFORMERS, _FIELD, _HINT))

    def model_type(self) -> str:
        """Return the name of the encoder's architecture. Raises UserError as `find_folder`."""
        return self.find_folder().model_type

    def files_hash(self) -> str:
        """Return a hash of the encoder's weights and of its tokenizer's files. Raises UserError as `find_folder`."""
        folder = self.find_folder()
        return digest.short(folder.weights.sha256(), tokenizer_hash(folder.tokenizer_path))

    def require_tokenizers(self) -> None:
        """Raise UserError as `find_folder`, if the tokenizer cannot be loaded, or if `skip` drops text tokens."""
        tokenizer = self._load_tokenizer(self.find_folder())
        if self.skip:
            tokens_before_text = tokenizer.count_tokens_before_text()
            if self.skip > tokens_before_text:
                raise UserError(
                    f"net.texts.encoder.skip={self.skip} removes tokens of the text, which starts after "
                    f"{tokens_before_text} tokens: set it to at most {tokens_before_text}"
                )

    def open(self, device: torch.device | str = "cpu") -> "EncoderModel":
        """Load the encoder onto a device.

        Raises UserError as `find_folder`, and as `load_tokenizer` and `load_model`.
        """
        folder = self.find_folder()
        tokenizer = self._load_tokenizer(folder)
        model = load_model(folder.path, folder.class_name(pooled=self.pooled), "net.texts", _HINT)
        return EncoderModel(spec=self, tokenizer=tokenizer, model=model.to(device), device=torch.device(device))

    def _load_tokenizer(self, folder: "EncoderFolder") -> LoadedTokenizer:
        """Load the tokenizer, which truncates texts at `length + skip` tokens.

        Raises UserError if it is missing or cannot be loaded.
        """
        return load_tokenizer(folder.tokenizer_path, self.length + self.skip, self.template)


def _choose_files(files: Collection[str]) -> list[str]:
    """Choose the files to download: a transformers model, or the text encoder and tokenizer of a pipeline."""
    if CONFIG in files:
        return choose_files(files, name=TRANSFORMERS)
    return [*choose_files(files, "text_encoder", TRANSFORMERS), *choose_files(files, "tokenizer")]


@dataclass(frozen=True)
class EncoderFolder:
    """The folder of a text encoder, and its weight files."""

    path: Path
    weights: PartWeights

    @cached_property
    def _config(self) -> dict[str, Any]:
        """The content of config.json. Raises UserError if it is damaged."""
        return read_json(self.path / CONFIG)

    @property
    def model_type(self) -> str:
        """The name of the encoder's architecture."""
        return self._config["model_type"]

    def class_name(self, *, pooled: bool) -> str:
        """Return the transformers class that loads the encoder, and returns pooled embeddings if `pooled`."""
        if pooled and _PROJECTED_CLASS in str(self._config.get("architectures")):  # a list of names, or None
            return _PROJECTED_CLASS
        return _CLASS_BY_MODEL_TYPE.get(self.model_type, "AutoModel")

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the tokenizer: the encoder's own, or in a pipeline its sibling.

        In a pipeline, tokenizer belongs to text_encoder, and tokenizer_2 to text_encoder_2.
        """
        if (self.path / "tokenizer_config.json").is_file():
            return self.path
        if not re.fullmatch(r"text_encoder(_\d)?", self.path.name):
            return self.path
        return self.path.with_name(self.path.name.replace("text_encoder", "tokenizer"))


@dataclass
class EncoderModel:
    """A loaded text encoder and its tokenizer."""

    spec: TextEncoder
    tokenizer: LoadedTokenizer
    model: Any  # a transformers object
    device: torch.device

    def to(self, device: torch.device) -> None:
        """Move the model to a device."""
        if device != self.device:
            self.model.to(device)
            self.device = device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Embeddings:
        """Return the embeddings of texts, in float32 on the CPU.

        They are padded to the longest text, or to `length` if `pad` is set, and the first `skip` tokens are dropped.

        Raises UserError if `skip` leaves no token of a text, or the encoder has no pooled output.
        """
        spec = self.spec
        token_ids, padding_mask = self.tokenizer(texts, fills_length=spec.pad)
        inputs: dict[str, Tensor] = {"input_ids": token_ids.to(self.device)}
        if spec.pad:
            mask = torch.ones_like(padding_mask)  # the encoder attends to padding
        else:
            mask = padding_mask
            inputs["attention_mask"] = padding_mask.long().to(self.device)

        with using(spec.precision, self.device):
            output = self.model(**inputs, output_hidden_states=spec.layer != -1)
        # hidden_states begins with the token embeddings, followed by the output of each layer.
        states = output.last_hidden_state if spec.layer == -1 else output.hidden_states[spec.layer]

        kept_tokens = states[:, spec.skip :].float().cpu()
        kept_mask = mask[:, spec.skip :]
        if not bool(kept_mask.any(1).all()):
            raise UserError(f"net.texts.encoder.skip={spec.skip} skips all tokens of a short text: decrease it")
        pooled = self._pooled(output) if spec.pooled else None
        return Embeddings(kept_tokens, kept_mask, pooled, self.tokenizer.cut_texts(texts))

    def _pooled(self, output: Any) -> Float[Tensor, "b p"]:  # noqa: ANN401, an output of transformers
        """Return the pooled embedding of each text. Raises UserError if the encoder has no pooled output."""
        for name in ("text_embeds", "pooler_output"):
            pooled = getattr(output, name, None)
            if isinstance(pooled, Tensor):
                return pooled.float().cpu()
        raise UserError(f"net.texts.encoder.pooled: {self.spec.source} has no pooled text embedding: set it to false")
