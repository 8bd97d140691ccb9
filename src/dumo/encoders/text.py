"""Texts through a pretrained text encoder, from a folder of transformers: an embedding for every token."""

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

from dumo.encoders.tokens import Cutter, cutter, transformers
from dumo.flow.precision import Precision, using
from dumo.io import digest
from dumo.io.read import foreign, read_settings, user_path
from dumo.io.weights import read, read_metadata
from dumo.runtime.bound import TOKENS
from dumo.types import PLACE, Spec, UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
CLASSES = {  # of transformers, by the model_type of config.json: the encoder alone, where there is a decoder or a tower
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPTextModel",
}
PROJECTED = "CLIPTextModelWithProjection"
HINT = f"name a folder with {CONFIG} and {WEIGHTS}, as transformers saves a text encoder"


@dataclass(frozen=True)
class Embeddings:
    """Texts as a net reads them."""

    tokens: Shaped[Tensor, "b l *d"]  # embeddings, or ids
    mask: Bool[Tensor, "b l"]  # which of them are there
    pooled: Float[Tensor, "b p"] | None


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

    def cutter(self) -> Cutter:
        """The tokenizer. Raises UserError as `folder`, and where there is none."""
        return cutter(tokenizer_folder(self.folder()), self.length + self.skip, self.template)

    def folder(self) -> Path:
        """The encoder's folder. Raises UserError where there is none, or its weights are a pickle."""
        path = user_path(self.source, "net.texts.encoder.source")
        found = next((f for f in (path, path / "text_encoder") if (f / CONFIG).is_file()), None)
        if found and ((found / WEIGHTS).is_file() or (found / INDEX).is_file()):
            return found
        if found and any((found / pickle).is_file() for pickle in PICKLES):
            read(found / PICKLES[0], convert=False)  # refuses it
        why = "has no weights" if found else f"has no {CONFIG}" if path.is_dir() else "is no folder"
        raise UserError(f"net.texts.encoder.source: {found or self.source} {why}: {HINT}")

    def files(self) -> list[Path]:
        """The files of the weights. Raises UserError as `folder`, and for damaged ones."""
        folder = self.folder()
        found = [folder / WEIGHTS]
        if not found[0].is_file():
            with foreign(f"{folder / INDEX} lists no files", HINT):
                names = set(read_settings(folder / INDEX, HINT)["weight_map"].values())
                found = [folder / name for name in sorted(names)]
        for file in found:
            read_metadata(file)  # refuses damaged ones
        return found

    def sha256(self) -> str:
        """The hash of the weights, in hexadecimal; of several files, of all their hashes. Raises as `files`."""
        found = [digest.of_file(file) for file in self.files()]
        return found[0] if len(found) == 1 else digest.of_bytes(*(sha256.encode() for sha256 in found))

    def model_type(self) -> str:
        """Its name in config.json. Raises as `folder`."""
        return str(read_settings(self.folder() / CONFIG, HINT).get("model_type"))

    def open(self, device: torch.device | str = "cpu") -> "EncoderModel":
        """The encoder with its weights. Raises UserError as `files`, and where transformers cannot load it."""
        folder = self.folder()
        _ = self.files()
        cut = self.cutter()
        return EncoderModel(self, cut, model(folder, self.pooled).to(device), torch.device(device))


@dataclass(frozen=True)
class EncoderModel:
    """A text encoder with its weights and its tokenizer."""

    spec: Encoder
    cut: Cutter
    model: Any  # of transformers
    device: torch.device

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights."""
        return self.spec.sha256()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Embeddings:
        """The texts in float32 on the CPU, padded to the longest here, or with `pad` to the spec's length.

        Warns where texts are cut. Raises UserError where `skip` leaves no token of a text.
        """
        spec = self.spec
        ids, mask = self.cut(texts, whole=spec.pad)
        inputs: dict[str, Tensor] = {"input_ids": ids.to(self.device)}
        inputs |= {} if spec.pad else {"attention_mask": mask.long().to(self.device)}
        with using(spec.precision, self.device), foreign(f"net.texts: the encoder of {spec.source} fails", HINT):
            out = self.model(**inputs, output_hidden_states=spec.layer != -1)
        states = out.last_hidden_state if spec.layer == -1 else self.hidden(out)
        mask = torch.ones_like(mask) if spec.pad else mask
        tokens = states[:, spec.skip :].float().cpu()
        mask = mask[:, spec.skip :]
        if not bool(mask.any(1).all()):
            raise UserError(f"net.texts.encoder.skip={spec.skip} leaves nothing of a short text: set it lower")
        return Embeddings(tokens, mask, self.pooled(out) if spec.pooled else None)

    def hidden(self, out: Any) -> Tensor:  # noqa: ANN401, an output of transformers
        """The states of the spec's `layer`. Raises UserError where there are fewer layers."""
        states: tuple[Tensor, ...] = out.hidden_states
        if -self.spec.layer > len(states):
            raise UserError(f"net.texts.encoder.layer={self.spec.layer}: the encoder has {len(states) - 1} layers")
        return states[self.spec.layer]

    def pooled(self, out: Any) -> Tensor:  # noqa: ANN401, as `hidden`
        """The embedding of the whole text. Raises UserError where the encoder makes none."""
        for name in ("text_embeds", "pooler_output"):
            if isinstance(x := getattr(out, name, None), Tensor):
                return x.float().cpu()
        raise UserError(
            f"net.texts.encoder.pooled: {self.spec.source} makes no embedding of a whole text, as CLIP's does: set it "
            "to false"
        )


def model(folder: Path, pooled: bool) -> Any:  # noqa: ANN401, a model of transformers
    """The encoder of a folder, in evaluation mode. Raises UserError where it cannot be loaded whole."""
    config = read_settings(folder / CONFIG, HINT)
    name = CLASSES.get(str(config.get("model_type")), "AutoModel")
    if pooled and PROJECTED in str(config.get("architectures")):
        name = PROJECTED
    return load_model(folder, name, "net.texts", HINT)


def load_model(folder: Path, name: str, field: str, hint: str) -> Any:  # noqa: ANN401, as `model`
    """A model of transformers, of the class of this name, in evaluation mode, in float32.

    Raises UserError, which names the field and ends in the hint, where it cannot be loaded whole.
    """
    known = getattr(transformers(field), name)
    with foreign(f"{field}: {folder} holds no model that transformers can load", hint), quietly():
        found, info = known.from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
        )
        if missing := sorted(info["missing_keys"]):
            raise RuntimeError(f"the weights do not fit {CONFIG}: {missing[0]} is missing")
        return found.eval()


@contextmanager
def quietly(library: str = "transformers") -> Generator[None, None, None]:
    """Inside, this or diffusers shows no bars and does not list what a file has besides the encoder."""
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


def tokenizer_folder(folder: Path) -> Path:
    """The encoder's own folder, or in a pipeline the one next to it (text_encoder_2, tokenizer_2)."""
    if (folder / "tokenizer_config.json").is_file() or not re.fullmatch(r"text_encoder(_\d)?", folder.name):
        return folder
    return folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
