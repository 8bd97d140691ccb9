"""What a codec makes of real images: the bound of a net that is trained in its latents.

`reconstruct` encodes and decodes some images of the data. No sample can be better than its decoder.
"""

from dataclasses import dataclass

import torch
from PIL import Image

from dumo.config.conditions import squares
from dumo.data import is_images, is_latents
from dumo.io import picture
from dumo.run.sampler import Sampler
from dumo.types import Sample, UserError

NUM_IMAGES = 6  # ours


@dataclass(frozen=True)
class Reconstruction:
    """Images of the data, and what the codec makes of them."""

    count: int
    originals: Image.Image  # side by side
    decoded: Image.Image  # in the same order
    decibels: float  # the peak signal-to-noise ratio, over all values of these images
    grey_levels: float  # the mean distance of two values, of 255


def reconstruct(sampler: Sampler) -> Reconstruction | None:
    """Some images of the data through the run's codec.

    None of a run in pixels, and where the images, or what encodes them, are not on this machine.
    """
    if sampler.codec is None or not is_latents(sampler.data):
        return None
    try:
        x = _first_images(sampler)
        moments = sampler.codec.encode(x)
    except (UserError, OSError):
        return None
    mean = moments[:, : sampler.shape[0]]  # of the Gaussians, of a codec that gives such
    decoded = sampler.decode(mean)
    error = decoded - x
    return Reconstruction(
        count=len(x),
        originals=_row(x),
        decoded=_row(decoded),
        decibels=picture.decibels(error.square().mean().item()),
        grey_levels=error.abs().mean().item() * 255 / 2,
    )


def _first_images(sampler: Sampler) -> Sample:
    """The first images of the data that can be read, as squares.

    Raises UserError where there is none, or they are not here, or one that cannot be read is not to be left out.
    """
    data = squares(sampler.data)
    images = data.images if is_latents(data) else data
    assert is_images(images), "latents are of images"
    album = images.model_copy(update={"memory": 0.0}).originals()  # decodes no others
    readable: list[Sample] = []
    num_readable = 0
    for first in range(0, len(album), NUM_IMAGES):
        x, _ = album.rows(slice(first, first + NUM_IMAGES))
        readable.append(x)
        num_readable += len(x)
        if num_readable >= NUM_IMAGES:
            break
    if num_readable == 0:
        raise UserError("none of the images can be read: mend them")
    return torch.cat(readable)[:NUM_IMAGES]


def _row(x: Sample) -> Image.Image:
    """Images side by side."""
    return picture.sheet(picture.to_rows(x), len(x), gap=picture.GAP, clear=True)
