"""Prompts: texts of the user's own, as rows behind those of the captions that a net was trained on.

A prompt that is a caption of the data has that caption's number. Another is encoded once, as captions are, and has a
number of its own as long as the run is open. So whatever samples by numbers of classes also samples by prompts.

`conditions_of_prompts` returns these numbers, `names_of_conditions` the texts of numbers. `open_source_images` returns
what reads the images that captions or prompts edit.
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
    """A reader of the images that the captions of some data edit, through the data's codec; None: they edit none.

    `file_of` says where an image lies, by its hash. Raises UserError where the codec or an image cannot be read.
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
    """The identity of the images that the captions of some data edit: of the codec and of their size; "": none."""
    if not (isinstance(data, Latents) and data.images.source):
        return ""
    codec_hash = data.codec.sha256 or data.codec.digest()
    return f"{codec_hash} {data.shape} {data.images.crop}"


def _read_pixels(file: Path, to_pixels: ToSquare) -> Tensor:
    """The image of a file, uint8 (3, h, w). Raises UserError for what is none."""
    try:
        return to_pixels(file.read_bytes())
    except Unreadable as error:
        raise UserError(f"{file}, which is to be edited, {error}") from error


def edits_images(data: Data) -> bool:
    """Whether the captions of some data edit images."""
    return isinstance(data, Latents) and data.images.source is not None


def texts_of(net: nn.Module) -> Texts | None:
    """The part of a network that has a row for every condition; None if it reads no texts."""
    for module in net.modules():
        if isinstance(module, Texts):
            return module
    return None


def conditions_of_prompts(
    net: nn.Module, data: Data, prompts: Sequence[str], source: Path | None = None
) -> Int64[Tensor, " b"]:
    """The condition of each prompt, its number, by which to sample. Warns where a prompt is cut.

    `source` is the image that the prompts edit. Raises UserError for a blank prompt, and where the run reads no texts,
    or its encoder is missing, or another than the run was trained with.
    """
    conditions = Conditions(data)
    if not prompts:
        raise UserError("prompts is empty: give at least one, or leave it out")
    if any(not text.strip() for text in prompts):
        raise UserError("a prompt is empty: say what the image shows, or leave the prompt out")
    texts = texts_of(net)
    if texts is None or conditions.captions is None:
        fix = "give classes (--labels)" if conditions.count else "leave them out"
        raise UserError(f"this run was trained without captions, so it reads no prompts: {fix}")
    captions = _as_captions(data, prompts, source)

    # prompts that are used again count as the last used
    for caption in dict.fromkeys(captions):
        if caption in texts.prompts:
            texts.prompts[caption] = texts.prompts.pop(caption)

    # number the new ones
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
    """The prompts as captions: where the run was trained on such, captions that edit the image in `source`.

    Raises UserError if the run edits images and there is no source, or edits none and there is one.
    """
    if edits_images(data) and source is None:
        raise UserError("this run edits images, and the one to edit is missing: dumo sample takes it by --source FILE")
    if source is None:
        return [text.strip() for text in prompts]
    if not edits_images(data):
        raise UserError("this run edits no images: leave out --source")
    sha256 = image_hash(source)
    return [edit_caption(text, sha256) for text in prompts]


def names_of_conditions(net: nn.Module, data: Data, c: Tensor) -> list[str]:
    """What each of these conditions is called: a class's name, a caption, or a prompt."""
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
