"""Texts through a pretrained text encoder, from a folder of transformers: an embedding for every token.

`Encoder` is the spec: it finds the folder, checks the files and hashes the weights. `Encoder.open` loads them into an
`EncoderModel`, which is called with texts. `load_model` and `quietly` also load the models of other files here.
"""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field, field_validator
from torch import Tensor

from dumo.encoders.part import TRANSFORMERS, TRANSFORMERS_FILE, PartWeights, require_weights
from dumo.encoders.tokens import LoadedTokenizer, import_transformers, load_tokenizer
from dumo.flow.precision import Precision, using
from dumo.io.read import foreign, read_settings, user_path
from dumo.runtime.limits import TOKENS
from dumo.types import PLACE, Spec, UserError

CONFIG = "config.json"
# Classes of transformers by the model_type of config.json: those that load the text encoder alone, without the decoder
# of T5 and the images' half of CLIP.
_CLASS_BY_MODEL_TYPE = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPTextModel",
}
_PROJECTED = "CLIPTextModelWithProjection"  # embeds the whole text as CLIP compares it with images
HINT = f"name a folder with {CONFIG} and {TRANSFORMERS_FILE}, as transformers saves a text encoder"


@dataclass(frozen=True)
class Embeddings:
    """Texts as a net reads them."""

    tokens: Shaped[Tensor, "b l *d"]  # embeddings, or ids
    mask: Bool[Tensor, "b l"]  # False on padding
    pooled: Float[Tensor, "b p"] | None  # of each whole text


class Encoder(Spec):
    """A text encoder, and the part of its output that is kept (docs/captions.md says what published models take)."""

    kind: Literal["transformers"] = "transformers"
    # A folder of transformers, or of a pipeline's text_encoder with the tokenizer next to it.
    source: str = Field(json_schema_extra=PLACE)
    length: int = Field(default=77, ge=1, le=TOKENS)  # tokens of a text at most, without `skip`; longer texts are cut
    template: str = "{}"  # {} is the text
    skip: int = Field(default=0, ge=0, le=TOKENS)  # leave out this many first tokens, those of the template
    layer: int = Field(default=-1, le=-1)  # -1: the output; -2: the input of the last layer, and so on
    pooled: bool = False  # keep the embedding of the whole text as well
    pad: bool = False  # read and keep the tokens of padding, for a net that takes no mask
    precision: Precision = "fp32"  # of the encoder's passes
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of what is kept

    @field_validator("template")
    @classmethod
    def _with_the_text(cls, template: str) -> str:
        if template.count("{}") != 1:
            raise ValueError("a template holds {} once, where the text goes")
        return template

    def tokenizer(self) -> LoadedTokenizer:
        """Load the tokenizer. Raises UserError as `folder`, and where there is none."""
        return load_tokenizer(_tokenizer_folder(self.folder()), self.length + self.skip, self.template)

    def folder(self) -> Path:
        """The encoder's folder. Raises UserError where there is none, or its weights are a pickle."""
        path = user_path(self.source, "net.texts.encoder.source")
        if not path.is_dir():
            raise UserError(f"net.texts.encoder.source: {self.source} is no folder: {HINT}")
        folder = path
        if not (folder / CONFIG).is_file():
            folder = path / "text_encoder"  # of a pipeline
        if not (folder / CONFIG).is_file():
            raise UserError(f"net.texts.encoder.source: {self.source} has no {CONFIG}: {HINT}")
        require_weights(folder, TRANSFORMERS, "net.texts.encoder.source", HINT)
        return folder

    def weights(self) -> PartWeights:
        """The weights. Raises UserError as `folder`."""
        return require_weights(self.folder(), TRANSFORMERS, "net.texts.encoder.source", HINT)

    def sha256(self) -> str:
        """The hash of the weights, in hexadecimal. Raises UserError as `folder`, and for damaged ones."""
        return self.weights().sha256()

    def model_type(self) -> str:
        """The name of the encoder's architecture in config.json. Raises as `folder`."""
        return str(read_settings(self.folder() / CONFIG, HINT).get("model_type"))

    def open(self, device: torch.device | str = "cpu") -> "EncoderModel":
        """Load the encoder onto a device.

        Raises UserError as `folder`, for damaged weights, and where transformers cannot load them.
        """
        folder = self.folder()
        self.weights().require_undamaged()  # before transformers reads them
        tokenizer = self.tokenizer()
        model = _load_encoder(folder, self.pooled).to(device)
        return EncoderModel(self, tokenizer, model, torch.device(device))


@dataclass(frozen=True)
class EncoderModel:
    """A text encoder with its weights and its tokenizer."""

    spec: Encoder
    tokenizer: LoadedTokenizer
    model: Any  # of transformers
    device: torch.device

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights."""
        return self.spec.sha256()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Embeddings:
        """Return the embeddings of texts, in float32 on the CPU.

        They are padded to the longest of these texts, or with the spec's `pad` to its length.

        Warns where texts are cut. Raises UserError where `skip` leaves no token of a text.
        """
        spec = self.spec
        ids, mask = self.tokenizer(texts, fills_length=spec.pad)
        inputs: dict[str, Tensor] = {"input_ids": ids.to(self.device)}
        if spec.pad:
            mask = torch.ones_like(mask)  # padding is read and kept as tokens are
        else:
            inputs["attention_mask"] = mask.long().to(self.device)
        with using(spec.precision, self.device), foreign(f"net.texts: the encoder of {spec.source} fails", HINT):
            out = self.model(**inputs, output_hidden_states=spec.layer != -1)
        states = out.last_hidden_state if spec.layer == -1 else self._hidden_states(out)
        tokens = states[:, spec.skip :].float().cpu()
        mask = mask[:, spec.skip :]
        if not bool(mask.any(1).all()):
            raise UserError(f"net.texts.encoder.skip={spec.skip} leaves nothing of a short text: set it lower")
        pooled = self._pooled(out) if spec.pooled else None
        return Embeddings(tokens, mask, pooled)

    def _hidden_states(self, out: Any) -> Float[Tensor, "b l d"]:  # noqa: ANN401, an output of transformers
        """The states of the spec's `layer`. Raises UserError where there are fewer layers."""
        states: tuple[Tensor, ...] = out.hidden_states
        if -self.spec.layer > len(states):
            raise UserError(f"net.texts.encoder.layer={self.spec.layer}: the encoder has {len(states) - 1} layers")
        return states[self.spec.layer]

    def _pooled(self, out: Any) -> Float[Tensor, "b p"]:  # noqa: ANN401, an output of transformers
        """The embedding of each whole text. Raises UserError where the encoder makes none."""
        for name in ("text_embeds", "pooler_output"):
            pooled = getattr(out, name, None)
            if isinstance(pooled, Tensor):
                return pooled.float().cpu()
        raise UserError(
            f"net.texts.encoder.pooled: {self.spec.source} makes no embedding of a whole text, as CLIP's does: set it "
            "to false"
        )


def _load_encoder(folder: Path, pooled: bool) -> Any:  # noqa: ANN401, a model of transformers
    """Load the encoder of a folder, in evaluation mode; with `pooled`, one that embeds whole texts, too.

    Raises UserError where it cannot be loaded whole.
    """
    config = read_settings(folder / CONFIG, HINT)
    class_name = _CLASS_BY_MODEL_TYPE.get(str(config.get("model_type")), "AutoModel")
    if pooled and _PROJECTED in str(config.get("architectures")):
        class_name = _PROJECTED
    return load_model(folder, class_name, "net.texts", HINT)


def load_model(folder: Path, class_name: str, field: str, hint: str) -> Any:  # noqa: ANN401, a model of transformers
    """Load a model of this class of transformers from a folder, in evaluation mode, in float32.

    Raises UserError, which names the field and ends in the hint, where it cannot be loaded whole.
    """
    model_class = getattr(import_transformers(field), class_name)
    part_weights = require_weights(folder, TRANSFORMERS, field, hint)
    with foreign(f"{field}: {folder} holds no model that transformers can load", hint), quietly():
        model, info = model_class.from_pretrained(
            folder,
            output_loading_info=True,
            variant=part_weights.variant,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise RuntimeError(f"the weights do not fit {CONFIG}: {missing[0]} is missing")
        return model.eval()


@contextmanager
def quietly(library: str = "transformers") -> Generator[None, None, None]:
    """Make a library, transformers or diffusers, show neither progress bars nor warnings inside the block."""
    logging = import_module(f"{library}.utils.logging")
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _tokenizer_folder(folder: Path) -> Path:
    """The folder of the tokenizer: the encoder's, or in a pipeline the one next to it (text_encoder_2, tokenizer_2)."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
    if not re.fullmatch(r"text_encoder(_\d)?", folder.name):
        return folder
    return folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
