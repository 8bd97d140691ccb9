"""Map prompts to condition numbers, in addition to the captions that a net was trained on.

A prompt that equals a caption of the data has the caption's number. Other prompts are encoded once, like captions, and
keep a new number as long as the run is open. Code that samples by class number therefore also supports prompts.

`conditions_of_prompts` returns the numbers of prompts, and `names_of_conditions` the texts of numbers.
`open_source_images` returns a reader of the images to edit.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from dumo.config.conditions import Conditions
from dumo.data import Data, Latents
from dumo.data.caption import image_hash
from dumo.data.pixel import ToSquare, Unreadable
from dumo.encoders.caption_ids import edit_caption, split_caption
from dumo.encoders.textcache import SourceImages
from dumo.io import picture
from dumo.nets.text_rows import Texts
from dumo.types import UserError


def open_source_images(data: Data, device: torch.device | str, file_of: Callable[[str], Path]) -> SourceImages | None:
    """Return a reader that encodes source images with the data's codec; None if captions do not edit images.

    `file_of` maps the hash of an image to its path. Raise UserError if the codec or an image cannot be read.
    """
    if not (isinstance(data, Latents) and data.images.source):
        return None
    codec = data.codec.open(device)
    to_pixels = ToSquare(data.images.side, data.images.crop)

    def read(hashes: Sequence[str]) -> Tensor:
        pixels = torch.stack([_read_pixels(file_of(sha256), to_pixels) for sha256 in hashes])
        return codec.encode(picture.from_uint8(pixels))[:, : data.codec.channels].cpu()  # the means

    return SourceImages(data.shape, sources_identity(data), read)


def sources_identity(data: Data) -> str:
    """Return the identity of encoded source images: codec, shape and crop; "" if captions do not edit images."""
    if not (isinstance(data, Latents) and data.images.source):
        return ""
    codec_hash = data.codec.sha256 or data.codec.digest()
    return f"{codec_hash} {data.shape} {data.images.crop}"


def _read_pixels(file: Path, to_pixels: ToSquare) -> Tensor:
    """Read an image file, uint8 (3, h, w). Raise UserError if it cannot be read."""
    try:
        return to_pixels(file.read_bytes())
    except Unreadable as error:
        raise UserError(f"the image to edit, {file}, {error}") from error


def edits_images(data: Data) -> bool:
    """Whether the captions of the data edit images."""
    return isinstance(data, Latents) and data.images.source is not None


def texts_of(net: nn.Module) -> Texts | None:
    """Return the module of a network with a row for every text; None if it has no text conditions."""
    for module in net.modules():
        if isinstance(module, Texts):
            return module
    return None


def conditions_of_prompts(
    net: nn.Module, data: Data, prompts: Sequence[str], source: Path | None = None
) -> Int64[Tensor, " b"]:
    """Return the condition number of each prompt. Warn if a prompt is truncated.

    `source` is the image to edit. Raise UserError for a blank prompt, if the run has no text conditions, or if its text
    encoder is missing or has changed.
    """
    conditions = Conditions(data)
    if not prompts:
        raise UserError("prompts is empty: give at least one, or leave it out")
    if any(not text.strip() for text in prompts):
        raise UserError("a prompt is empty: describe the image, or remove the prompt")
    texts = texts_of(net)
    if texts is None or conditions.captions is None:
        fix = "give classes (--labels)" if conditions.count else "leave them out"
        raise UserError(f"this run was trained without captions, so it does not support prompts: {fix}")
    captions = _as_captions(data, prompts, source)

    # Mark repeated prompts as the most recently used.
    for caption in dict.fromkeys(captions):
        if caption in texts.prompts:
            texts.prompts[caption] = texts.prompts.pop(caption)

    # Encode and number the new prompts.
    numbers = {caption: k for k, caption in enumerate(conditions.names)} | texts.prompts
    new_captions = [caption for caption in dict.fromkeys(captions) if caption not in numbers]
    if new_captions:
        latents = None
        if source:
            source_images = open_source_images(data, next(net.parameters()).device, lambda _: source)
            latents = source_images.latents_of(new_captions) if source_images else None
        first = texts.append(new_captions, latents)
        new_numbers = {caption: number for number, caption in enumerate(new_captions, start=first)}
        texts.prompts |= new_numbers
        numbers |= new_numbers
    return torch.tensor([numbers[caption] for caption in captions])


def _as_captions(data: Data, prompts: Sequence[str], source: Path | None) -> list[str]:
    """Convert prompts to captions, with the hash of `source` if the run edits images.

    Raise UserError unless a source is given if and only if the run edits images.
    """
    if edits_images(data) and source is None:
        raise UserError("this run edits images, but no image to edit was given: add --source FILE")
    if source is None:
        return [text.strip() for text in prompts]
    if not edits_images(data):
        raise UserError("this run does not edit images: remove --source")
    sha256 = image_hash(source)
    return [edit_caption(text, sha256) for text in prompts]


def names_of_conditions(net: nn.Module, data: Data, c: Tensor) -> list[str]:
    """Return the class name, caption or prompt of each condition."""
    texts = texts_of(net)
    prompt_of = {number: caption for caption, number in texts.prompts.items()} if texts else {}
    conditions = Conditions(data)
    condition_names: list[str] = []
    for k in c.tolist():
        if k in prompt_of:
            text, _ = split_caption(prompt_of[k])
            condition_names.append(text)
        else:
            condition_names.append(conditions.name(k))
    return condition_names
