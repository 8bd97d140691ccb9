"""Encode prompts with the text encoders of a diffusers pipeline, by its own `encode_prompt` method.

`PromptReaderSpec.open` loads the pipeline's text encoders and tokenizers into a `PromptReader`. A call of the
`PromptReader` turns texts into `Embeddings`. The pipeline is loaded without a VAE, and its transformer is created on
the meta device from its config.

`encode_prompt` applies the pipeline's prompt template, padding and truncation, and runs its encoders. It is called

- for one text at a time, because some pipelines pad to the longest text of a batch;
- with the arguments that the pipeline's `__call__` passes by default (`encode_prompt_arguments`), because the defaults
  of `encode_prompt` itself differ;
- with copies of these arguments, because some pipelines modify them.
"""

import copy
import inspect
import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from dumo.encoders.pipeline_folder import HINT, SCHEDULER, TRANSFORMER, OptionalPart, Pipeline, component_names
from dumo.encoders.tokens import require_vocabulary
from dumo.encoders.transformers_library import import_transformers, quietly
from dumo.encoders.transformers_text import Embeddings
from dumo.runtime import import_bitsandbytes, require
from dumo.types import PLACE, Spec, UserError

# The outputs of encode_prompt that are stored.
_COLUMNS = ("tokens", "mask", "pooled")


class PromptReaderSpec(Spec):
    """The text encoders of a diffusers pipeline, before they are loaded."""

    kind: Literal["pipeline"] = "pipeline"
    source: str = Field(json_schema_extra=PLACE)  # the pipeline's folder
    pipeline: str  # its class in diffusers
    encodes: str  # what its encode_prompt returns, in order (`dumo.nets.family`)
    dtype: Literal["float16", "bfloat16", "float32"]  # of the encoders and of what is kept
    # text encoders that are left out (`Pipeline.without`)
    without: tuple[OptionalPart, ...] = Field(default=(), exclude_if=lambda names: not names)
    padded: bool = False  # keep padding tokens and the mask, because the transformer attends to them

    def model_type(self) -> str:
        """Return the class name of the pipeline."""
        return self.pipeline

    def files_hash(self) -> str:
        """Return a hash of all encoder and tokenizer files. Raises UserError if a component is missing."""
        return Pipeline(source=self.source, without=self.without).texts_hash()

    def open(self, device: torch.device | str = "cpu") -> "PromptReader":
        """Load the encoders onto a device. Raises UserError if a component is missing or cannot be loaded."""
        folder = Pipeline(source=self.source, without=self.without)
        folder.require_text_files()
        pipeline_class, pipe = self._load(folder)
        text_parts = [getattr(pipe, name) for name in folder.text_parts]
        encoders = [part for part in text_parts if isinstance(part, nn.Module)]
        reader = PromptReader(
            spec=self,
            pipe=pipe,
            arguments=encode_prompt_arguments(pipeline_class),
            num_tokenizers=sum(name.startswith("tokenizer") for name in folder.text_parts),
            encoders=encoders,
            device=torch.device("cpu"),
        )
        reader.to(torch.device(device))
        return reader

    def require_tokenizers(self) -> None:
        """Raise UserError if a tokenizer is missing, incomplete or unloadable.

        Pipelines whose configs ship with dumo are not checked.
        """
        folder = Pipeline(source=self.source, without=self.without)
        if folder.is_published:
            return
        transformers = import_transformers("net.texts")
        for part in folder.text_parts:
            library, _ = folder.index[part]
            if not part.startswith("tokenizer") or library != "transformers":
                continue
            with quietly():
                tokenizer_class = _component_class(folder, part, transformers)
                loaded = tokenizer_class.from_pretrained(
                    folder.folder / part, local_files_only=True, trust_remote_code=False
                )
                tokenizer = getattr(loaded, "tokenizer", loaded)  # of a processor of texts and images
                require_vocabulary(tokenizer, f"pipeline: {part} of {self.source} is not whole", HINT)

    def _load(self, folder: Pipeline) -> tuple[Any, Any]:
        """Load the pipeline, with its transformer on the meta device. Returns its class and the pipeline."""
        import_bitsandbytes()
        diffusers = require("diffusers", "pretrained", "net.texts")
        transformers = import_transformers("net.texts")  # diffusers would fail without it, with another message
        config = folder.config(TRANSFORMER)
        with quietly(), quietly("diffusers"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers', of its own code
            pipeline_class = getattr(diffusers, self.pipeline)
            for part in [*folder.text_parts, *({SCHEDULER} & folder.index.keys())]:
                library, _ = folder.index[part]
                _component_class(folder, part, transformers if library == "transformers" else diffusers)
            with torch.device("meta"):
                model = getattr(diffusers, config["_class_name"]).from_config(config)
            unused = component_names(pipeline_class) - {*folder.text_parts, SCHEDULER}
            components = dict.fromkeys(unused) | {folder.model_part: model} | self._load_variants(folder)
            pipe = pipeline_class.from_pretrained(
                folder.folder,
                **components,
                torch_dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        return pipeline_class, pipe

    def _load_variants(self, folder: Pipeline) -> dict[str, Any]:
        """Load the text encoders whose weights are a variant: diffusers takes one variant for all components."""
        encoders: dict[str, Any] = {}
        for part in folder.text_parts:
            if part.startswith("tokenizer"):
                continue
            variant = folder.weights(part).variant
            library, class_name = folder.index[part]
            if variant is None or library != "transformers":  # diffusers loads it
                continue
            encoder_class = getattr(import_transformers("net.texts"), class_name)
            encoders[part] = encoder_class.from_pretrained(
                folder.part_folder(part),
                variant=variant,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        return encoders


@dataclass
class PromptReader:
    """The loaded text encoders of a pipeline."""

    spec: PromptReaderSpec
    pipe: Any  # a diffusers object
    arguments: dict[str, Any]  # of encode_prompt, besides the prompt and the device
    num_tokenizers: int
    encoders: Sequence[nn.Module]
    device: torch.device

    def to(self, device: torch.device) -> None:
        """Move the encoders to a device."""
        if device != self.device:
            for encoder in self.encoders:
                nn.Module.to(encoder, device)
            self.device = device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Embeddings:
        """Return the embeddings of texts, on the CPU, padded with zeros to the longest one.

        The empty text gets the embedding that the pipeline uses if no negative prompt is passed. A text counts as
        truncated if every tokenizer of the pipeline logs that it truncated it; SANA, Qwen-Image, Z-Image, FLUX.2,
        Chroma, PRX and Wan truncate silently.
        """
        rows: list[dict[str, Tensor]] = []
        cut_texts: list[str] = []
        with quietly():
            for text in texts:
                with _diffusers_messages() as messages:
                    rows.append(self.read_row(text))
                num_cuts = sum("truncated" in message for message in messages)  # one per tokenizer
                if num_cuts >= max(1, self.num_tokenizers):
                    cut_texts.append(text)
            return _stack_rows(rows, cut_texts, keeps_padding=self.spec.padded)

    def read_row(self, text: str) -> dict[str, Tensor]:
        """Return the transformer's inputs for a text: tokens (l, d), and mask (l,) and pooled (p,) if it has them."""
        arguments = copy.deepcopy(self.arguments)  # some pipelines write into it
        if "do_classifier_free_guidance" in self._argument_names:
            arguments["do_classifier_free_guidance"] = not text  # else there is no negative prompt
        outputs = self.pipe.encode_prompt(prompt=[text], device=self.device, **arguments)
        output_names = self.spec.encodes.split()  # those of the negative prompt begin with "-"
        has_negatives = any(name.startswith("-") for name in output_names)
        sign = "-" if not text and has_negatives else ""
        row: dict[str, Tensor] = {}
        for column in _COLUMNS:
            output_name = sign + column
            if output_name not in output_names:
                continue
            output = outputs[output_names.index(output_name)]
            if output is not None:
                row[column] = output[0].cpu()
        return row

    @cached_property
    def _argument_names(self) -> set[str]:
        """The argument names of encode_prompt."""
        return {*inspect.signature(self.pipe.encode_prompt).parameters}


class _MessageList(logging.Handler):
    """A logging handler that collects messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Append a message to the list."""
        self.messages.append(record.getMessage())


@contextmanager
def _diffusers_messages() -> Generator[list[str], None, None]:
    """Collect the messages that diffusers logs inside the block, instead of showing them."""
    logger = logging.getLogger("diffusers")
    handlers = logger.handlers
    message_list = _MessageList()
    logger.handlers = [message_list]
    try:
        yield message_list.messages
    finally:
        logger.handlers = handlers


def _component_class(folder: Pipeline, part: str, library: Any) -> Any:  # noqa: ANN401, a module and its class
    """Return the class of a component. Raises UserError if its library has none of this name.

    An Auto class would take the class from the component's config, which may name code that comes with it.
    """
    _, class_name = folder.index[part]
    component_class = getattr(library, class_name, None)
    if component_class is None or (library.__name__ == "transformers" and class_name.startswith("Auto")):
        raise UserError(
            f"pipeline: {part} of {folder.source} has the class {class_name}, which {library.__name__} "
            f"{library.__version__} does not offer as a pipeline component: update it, or use another pipeline"
        )
    return component_class


def encode_prompt_arguments(pipeline_class: Any) -> dict[str, Any]:  # noqa: ANN401, a class of diffusers
    """Return the arguments that a pipeline's `__call__` passes to `encode_prompt` if it only gets a prompt."""
    call_parameters = inspect.signature(pipeline_class.__call__).parameters
    encode_parameters = inspect.signature(pipeline_class.encode_prompt).parameters
    arguments: dict[str, Any] = {}
    for name, parameter in call_parameters.items():
        has_default = parameter.default is not parameter.empty
        if has_default and name in encode_parameters and name not in ("prompt", "device"):
            arguments[name] = parameter.default
    return arguments


def _stack_rows(rows: Sequence[dict[str, Tensor]], cut_texts: Sequence[str], *, keeps_padding: bool) -> Embeddings:
    """Stack rows into a batch (b, l, d), padded with zeros. `cut_texts` are the truncated texts.

    Unless `keeps_padding`, tokens after the last unmasked token of a row are dropped.
    """
    masks: list[Tensor] = []
    lengths: list[int] = []
    for row in rows:
        mask = row["mask"].bool() if "mask" in row else torch.ones(len(row["tokens"]), dtype=torch.bool)
        masks.append(mask)
        if keeps_padding:
            lengths.append(len(mask))
        else:
            lengths.append(int(mask.nonzero()[-1]) + 1)
    longest = max(lengths, default=0)
    tokens = [pad(row["tokens"][:n], (0, 0, 0, longest - n)) for row, n in zip(rows, lengths, strict=True)]
    padded_masks = [pad(mask[:n], (0, longest - n)) for mask, n in zip(masks, lengths, strict=True)]
    pooled = torch.stack([row["pooled"] for row in rows]) if "pooled" in rows[0] else None
    return Embeddings(torch.stack(tokens), torch.stack(padded_masks), pooled, tuple(cut_texts))
