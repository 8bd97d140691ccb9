"""The text encoder in an exported folder of dumo's own net: what a prompt goes through before the net.

text_encoder/      a model of transformers: the T5 that was trained with the net, or the published one of `dumo encode`
tokenizer/         its tokenizer

`text_encoder_of` is the entrance: it makes a `ShippedTextEncoder` for a net that reads texts. `require_same_embeddings`
compares what the shipped pipeline makes of prompts with what dumo makes, and `write` writes both folders.

A published encoder is copied as it is stored, whatever the export's dtype. It is not dumo's to license, so the card
names it; `parts` "none" leaves it out, and the card then opens it from the folder that training read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dumo.encoders.text import EncoderFolder, TextEncoder
from dumo.encoders.texttable import TextTableIndex
from dumo.encoders.transformers_library import import_transformers, quietly
from dumo.nets.rows import TextRows
from dumo.nets.table import TextTable
from dumo.nets.text import LearnedTexts, TokenTexts
from dumo.nets.textfamily import Text
from dumo.run.sampler import Sampler
from dumo.runtime.door import option
from dumo.types import UserError

TEXT_ENCODER = "text_encoder"  # folders of diffusers, and arguments of the shipped pipeline
TOKENIZER = "tokenizer"
# By which dumo and the shipped pipeline are compared: no caption, and texts of several lengths. Ours.
_COMPARED_PROMPTS = ("", "a seven", "a red fox in the snow", "7")
Json = dict[str, Any]


@dataclass(frozen=True)
class ShippedTextEncoder:
    """A text encoder and its tokenizer, as the shipped pipeline calls them."""

    model: Any  # of transformers
    tokenizer: Any  # of transformers
    settings: Json  # how the shipped pipeline reads them: fields of its `__init__`
    embed: Callable[[Sequence[str]], TextRows]  # dumo's own tokens, mask and pooled embeddings of texts, to compare
    folder: EncoderFolder | None  # of a published encoder; None: it was trained with the net

    @property
    def class_name(self) -> str:
        """The class of the model in transformers."""
        return type(self.model).__name__

    @property
    def source(self) -> str:
        """The folder's name, of a published encoder or of the pipeline that has it; "": it was trained with the net."""
        return self.folder.common_folder.name if self.folder else ""

    @property
    def subfolder(self) -> str:
        """The name of the encoder's folder in `source`; "" where `source` is that folder itself."""
        if self.folder is None or self.folder.path == self.folder.tokenizer_path:
            return ""
        return self.folder.path.name

    @property
    def tokenizer_subfolder(self) -> str:
        """The name of the tokenizer's folder in `source`; "" where `source` is that folder itself."""
        return self.folder.tokenizer_path.name if self.folder and self.subfolder else ""


def text_encoder_of(sampler: Sampler, texts: Text | None) -> ShippedTextEncoder | None:
    """What a net reads prompts by, given the field `texts` of its spec; None: it reads labels.

    Raises UserError for texts that the shipped pipeline does not know, and as opening a published encoder does.
    """
    if texts is None:
        return None
    if isinstance(texts, LearnedTexts):
        return _learned_encoder(sampler, texts)
    if isinstance(texts, TextTable):
        return _published_encoder(sampler, texts.encoder, texts.open_table(sampler.data.classes).index)
    raise UserError(f"net.texts.kind is {texts.kind}, which the exported code does not know: sample it by dumo sample")


def _learned_encoder(sampler: Sampler, spec: LearnedTexts) -> ShippedTextEncoder:
    """The T5 that is part of the net, as a model of its own."""
    texts = sampler.texts
    assert isinstance(texts, TokenTexts)
    library = import_transformers("net.texts.kind learned")
    with torch.random.fork_rng(devices=[]):  # its own weights are drawn, and replaced
        model = library.T5EncoderModel(texts.encoder.config)
    model.encoder.load_state_dict(texts.encoder.state_dict())
    tokenizer = spec.tokenizer.open()

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> TextRows:
        ids, mask = tokenizer(prompts)
        ids = ids.to(sampler.device)
        mask = mask.to(sampler.device)
        states = texts.encoder(ids, attention_mask=mask[:, None, None]).last_hidden_state  # as `TokenTexts.forward`
        return states, mask, None

    return ShippedTextEncoder(
        model=model.eval().to(sampler.device),
        tokenizer=tokenizer.library_tokenizer,
        settings={"text_length": tokenizer.length},
        embed=embed,
        folder=None,
    )


def _published_encoder(sampler: Sampler, spec: TextEncoder, index: TextTableIndex) -> ShippedTextEncoder:
    """The encoder of a table of embeddings. Raises UserError for another than the one that made the table."""
    encoder = spec.open(sampler.device)
    index.require_encoder(encoder, spec.source)

    def embed(prompts: Sequence[str]) -> TextRows:
        embeddings = encoder(prompts)
        dtype = getattr(torch, spec.dtype)
        tokens = (embeddings.tokens * embeddings.mask[..., None]).to(dtype).float()
        pooled = None if embeddings.pooled is None else embeddings.pooled.to(dtype).float()
        return tokens, embeddings.mask, pooled

    settings: Json = {
        "text_length": spec.length,
        "template": spec.template,
        "skip": spec.skip,
        "layer": spec.layer,
        "padding": "max_length" if spec.pad else "longest",
        "masked": not spec.pad,
        "encoder_precision": spec.precision,
        "embeddings_dtype": spec.dtype,
    }
    return ShippedTextEncoder(
        model=encoder.model,
        tokenizer=encoder.tokenizer.library_tokenizer,
        settings=settings,
        embed=embed,
        folder=encoder.folder,
    )


def require_same_embeddings(encoder: ShippedTextEncoder, pipeline: Any) -> None:  # noqa: ANN401, of shipped code
    """Raise UserError where the shipped pipeline's embeddings of prompts are not dumo's to the bit."""
    tokens, mask, pooled = encoder.embed(_COMPARED_PROMPTS)
    shipped_tokens, shipped_mask, shipped_pooled = pipeline.encode_prompt([*_COMPARED_PROMPTS])
    length = tokens.shape[1]
    is_token = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
    is_same = torch.equal(shipped_tokens[:, :length].cpu()[is_token], tokens.cpu()[is_token])
    if shipped_mask is not None:
        is_same &= torch.equal(shipped_mask[:, :length].cpu(), is_token) and not shipped_mask[:, length:].any()
    if pooled is not None:
        is_same &= torch.equal(shipped_pooled.cpu(), pooled.cpu())
    if not is_same:
        raise UserError(
            f"the exported code reads prompts through {encoder.class_name} in another way than dumo: sample it by dumo "
            "sample"
        )


def write(encoder: ShippedTextEncoder, out: Path, *, parts: str, dtype: torch.dtype) -> dict[str, list[str]]:
    """Write the text encoder's folders into `out`; return their entries in model_index.json.

    A published encoder is copied, linked to or left out, by `parts`, and keeps the type that it is stored in; `dtype`
    is of one that was trained with the net. Raises UserError where a link would lead to weights of a variant.
    """
    entries = {
        TEXT_ENCODER: ["transformers", encoder.class_name],
        TOKENIZER: ["transformers", type(encoder.tokenizer).__name__],
    }
    folder = encoder.folder
    if folder is not None and parts == "none":
        return {}
    if folder is not None and parts == "link":
        if folder.weights.variant is not None:
            raise UserError(
                f"{folder.path} has its weights as {folder.weights.variant} alone, which no link can say: take "
                f"{option('parts', 'copy')}"
            )
        (out / TEXT_ENCODER).symlink_to(folder.path.resolve(), target_is_directory=True)
        (out / TOKENIZER).symlink_to(folder.tokenizer_path.resolve(), target_is_directory=True)
        return entries
    stored_dtype = dtype if folder is None else folder.weights.dtype
    nn.Module.to(encoder.model, stored_dtype)
    with quietly():
        encoder.model.save_pretrained(out / TEXT_ENCODER)
    encoder.tokenizer.save_pretrained(out / TOKENIZER)
    return entries
