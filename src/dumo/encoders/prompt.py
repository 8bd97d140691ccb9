"""Prompts as a pipeline's own `encode_prompt` reads them, with the defaults of its `__call__`, which are others.

What a pipeline puts around a text, how it pads and cuts, which encoders it asks and what stands for no text: all of it
is in that method. It is called for one text at a time, for some pipelines pad to the longest of several, and with a
list of its own, for some write into it. Of the pipeline there are the text encoders and tokenizers alone: the
transformer is its config, on the meta device, and there is no autoencoder.
"""

import copy
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from dumo.encoders.pipeline import HINT, TRANSFORMER, Pipeline, component_names
from dumo.encoders.text import Embeddings, quietly
from dumo.encoders.tokens import transformers
from dumo.io.read import foreign
from dumo.runtime import import_bitsandbytes, install
from dumo.types import PLACE, Spec, UserError

KEPT = ("tokens", "mask", "pooled")


class Prompts(Spec):
    """How a pipeline reads texts, as a table of them says."""

    kind: Literal["pipeline"] = "pipeline"
    source: str = Field(json_schema_extra=PLACE)
    pipeline: str  # its class
    encodes: str  # what its encode_prompt returns, in order (`dumo.nets.family`)
    dtype: Literal["float16", "bfloat16", "float32"]  # of the encoders and of what is kept
    padded: bool = False  # tokens that the mask leaves out are read, too, so they are kept, with the mask

    def model_type(self) -> str:
        """What reads the texts, in a word."""
        return self.pipeline

    def open(self, device: torch.device | str = "cpu") -> "PromptReader":
        """The encoders with their weights. Raises UserError where a part is missing or cannot be loaded."""
        folder = Pipeline(source=self.source)
        sha256 = folder.texts_hash()
        pipeline_class, pipe = self._load(folder)
        text_parts = [getattr(pipe, name) for name in folder.text_parts]
        encoders = [part for part in text_parts if isinstance(part, nn.Module)]
        read = PromptReader(self, pipe, defaults(pipeline_class), sha256, encoders, torch.device("cpu"))
        read.to(torch.device(device))
        return read

    def _load(self, folder: Pipeline) -> tuple[Any, Any]:
        """The class of the pipeline, and the pipeline, with its transformer on the meta device."""
        import_bitsandbytes()
        try:
            import diffusers  # slow to import, and an extra
        except ImportError as error:
            raise UserError(f"net.texts needs diffusers: {install('pretrained')}") from error
        transformers("net.texts")
        config = folder.config(TRANSFORMER)
        problem = f"pipeline: {self.source} holds no {self.pipeline} that diffusers can load"
        with foreign(problem, HINT), quietly(), quietly("diffusers"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers', of its own code
            pipeline_class = getattr(diffusers, self.pipeline)
            with torch.device("meta"):
                model = getattr(diffusers, config["_class_name"]).from_config(config)
            unused = component_names(pipeline_class) - {*folder.text_parts, "scheduler"}
            pipe = pipeline_class.from_pretrained(
                folder.folder,
                **dict.fromkeys(unused) | {folder.model: model},
                torch_dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        return pipeline_class, pipe


@dataclass
class PromptReader:
    """The text encoders of a pipeline, with their weights."""

    spec: Prompts
    pipe: Any  # of diffusers
    given: dict[str, Any]  # arguments of encode_prompt
    sha256: str  # of encoders and tokenizers
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
        """The texts on the CPU, padded with zeros to the longest here; the empty text is the negative prompt."""
        with foreign(f"net.texts: the pipeline in {self.spec.source} fails", HINT):
            return stacked([self.row(text) for text in texts], padded=self.spec.padded)

    def row(self, text: str) -> dict[str, Tensor]:
        """What the transformer gets for a text: tokens (l, d), the mask (l,), pooled (p,), as far as it takes them."""
        names = self.spec.encodes.split()
        guided = {"do_classifier_free_guidance": not text} if "do_classifier_free_guidance" in self.known else {}
        found = self.pipe.encode_prompt(prompt=[text], device=self.device, **copy.deepcopy(self.given), **guided)
        sign = "-" if not text and any(name.startswith("-") for name in names) else ""
        parts = {name: found[names.index(sign + name)] for name in KEPT if sign + name in names}
        return {name: part[0].cpu() for name, part in parts.items() if part is not None}

    @cached_property
    def known(self) -> set[str]:
        """The names of the arguments of encode_prompt."""
        return {*inspect.signature(self.pipe.encode_prompt).parameters}


def defaults(kind: Any) -> dict[str, Any]:  # noqa: ANN401, a class of diffusers
    """What the `__call__` of a pipeline passes to `encode_prompt`, if it is given a prompt alone."""
    called, takes = (inspect.signature(method).parameters for method in (kind.__call__, kind.encode_prompt))
    found = {name: p.default for name, p in called.items() if name in takes and p.default is not p.empty}
    found |= {"prompt_2": None, "prompt_3": None} if "prompt_3" in takes else {}
    return {name: value for name, value in found.items() if name not in ("self", "prompt", "device")}


def stacked(rows: Sequence[dict[str, Tensor]], *, padded: bool = False) -> Embeddings:
    """Rows in a batch. Tokens behind the last that a mask keeps are left out, but where they are read, too."""
    masks = [row["mask"].bool() if "mask" in row else torch.ones(len(row["tokens"]), dtype=torch.bool) for row in rows]
    lengths = [len(mask) if padded else int(mask.nonzero()[-1]) + 1 for mask in masks]
    longest = max(lengths, default=0)
    tokens = [pad(row["tokens"][:n], (0, 0, 0, longest - n)) for row, n in zip(rows, lengths, strict=True)]
    mask = torch.stack([pad(mask[:n], (0, longest - n)) for mask, n in zip(masks, lengths, strict=True)])
    pooled = torch.stack([row["pooled"] for row in rows]) if "pooled" in rows[0] else None
    return Embeddings(torch.stack(tokens), mask, pooled)
