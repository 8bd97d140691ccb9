"""Prompts: texts of the user's own, as rows behind those that a net was trained on.

A prompt that is a caption of the data is that caption; another is encoded as they were, once, and has a number from
then on, as long as the run is open. So whatever samples by numbers of classes samples by prompts.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from dumo.data import Data, Latents
from dumo.data.pixel import Frame, Unreadable
from dumo.data.written import hash_of
from dumo.encoders.caption import edit, parted
from dumo.encoders.texttable import Sources
from dumo.io import picture
from dumo.run.sampler import Sampler
from dumo.types import UserError


def sources(data: Data, device: torch.device | str, files: Callable[[str], Path]) -> Sources | None:
    """The images that the captions of some data edit, through the data's codec; None: they edit none.

    `files` says where an image lies, by its hash. Raises UserError where the codec or an image cannot be read.
    """
    if not (isinstance(data, Latents) and data.images.source):
        return None
    opened, frame = data.codec.open(device), Frame(data.images.side, data.images.crop)

    def read(hashes: Sequence[str]) -> Tensor:
        pixels = torch.stack([pixels_of(files(sha256), frame) for sha256 in hashes])
        return opened.encode(picture.from_uint8(pixels))[:, : data.codec.channels].cpu()  # the means

    return Sources(data.shape, opened.sha256, read)


def pixels_of(file: Path, frame: Frame) -> Tensor:
    """An image of a file, (3, h, w). Raises UserError for what is none."""
    try:
        return frame(file.read_bytes())
    except Unreadable as error:
        raise UserError(f"{file}, which is to be edited, {error}") from error


def edits(data: Data) -> bool:
    """Whether its captions edit images."""
    return isinstance(data, Latents) and data.images.source is not None


def edited(sampler: Sampler, prompts: Sequence[str], source: Path | None) -> list[str]:
    """The prompts as captions that edit an image, where the run was trained on such. Raises UserError for one alone."""
    trained = edits(sampler.data)
    if trained != (source is not None):
        wrong = "edits images: say which, dumo sample --source FILE" if trained else "edits none: leave out --source"
        raise UserError(f"this run {wrong}")
    if source and not source.is_file():
        raise UserError(f"--source {source}: there is no such file")
    return [edit(text, hash_of(source)) if source else text.strip() for text in prompts]


def prompted(sampler: Sampler, prompts: Sequence[str], source: Path | None = None) -> Int64[Tensor, " b"]:
    """The condition of each prompt, to sample by, and of the image that they edit. Warns where one is cut.

    Raises UserError for none, a blank one, a run that reads no texts, and where its encoder is not there, or another.
    """
    if not prompts:
        raise UserError("there are no prompts: give one at least")
    wanted = [text.strip() for text in prompts]
    if "" in wanted:
        raise UserError("a prompt is empty: say what the image shows, or leave the prompt out")
    texts = sampler.texts
    if texts is None or sampler.conditions.captions is None:
        way = "give classes (--labels)" if sampler.conditions.count else "leave them out, or train a run with captions"
        raise UserError(f"this run was trained without captions, so it reads no prompts: {way}")
    wanted = edited(sampler, wanted, source)
    texts.prompts |= {text: texts.prompts.pop(text) for text in wanted if text in texts.prompts}  # the last used
    known = {text: k for k, text in enumerate(sampler.conditions.names)} | texts.prompts
    if new := [text for text in dict.fromkeys(wanted) if text not in known]:
        there = source and sources(sampler.data, sampler.device, lambda _: source)
        first = texts.append(new, there.of(new) if there else None)
        texts.prompts |= {text: first + i for i, text in enumerate(new)}
    return torch.tensor([(known | texts.prompts)[text] for text in wanted])


def names(sampler: Sampler, c: Tensor) -> list[str]:
    """What each of these conditions is called: a class's name, a caption, or a prompt."""
    prompts = {k: text for text, k in sampler.prompts.items()}
    return [parted(prompts[k])[0] if k in prompts else sampler.conditions.name(k) for k in c.tolist()]
