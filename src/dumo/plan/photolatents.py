"""Whether photos are learned in latents of the autoencoder that comes with dumo, or in pixels, by a look at a few.

On a CPU latents show more after the same time (docs/log.md), where the autoencoder knows what is in the images. Each
function `reason_by_...` says why a run is in pixels, or "" where nothing is in the way of latents. `side_of_latents` is
the size of the images that are encoded, and `try_autoencoder` measures what it makes of some. `cache_folder` names the
folder where their latents go, and `has_caches` says whether they may be there.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from jaxtyping import UInt8
from torch import Tensor

from dumo.config.source import folder_of_images
from dumo.data import Images
from dumo.data.origin import cache_name
from dumo.encoders.codec import LoadedCodec
from dumo.io.picture import decibels, from_uint8
from dumo.io.read import brief
from dumo.runtime.door import settings
from dumo.runtime.progress import duration_text
from dumo.runtime.stopwatch import Stopwatch

Pixels = UInt8[Tensor, "n 3 side side"]

MIN_SIDE = 48  # pixels: of smaller images the autoencoder, made for photos of 256, keeps little; ours
SIDE_STEP = 8  # pixels of an image to one of its latent, each way
MIN_DECIBELS = 20.0  # ours: photos of 64 pixels have 20 to 31, noise has 10, a chessboard of 4 pixels 5 (docs/log.md)
GREY_LEVELS = 8  # of 255, between the channels of a pixel of a grey image that is stored in colour: ours
MAX_SHARE_OF_TIME = 0.5  # that decoding and encoding may take: ours
CACHES = "runs/latents"  # the folder of the folders of latents
# Settings by which the user chooses pixels: all of the data or the net, or what latents do not have.
PIXEL_FIELDS = ("data", "data.kind", "data.root", "data.augment", "data.buckets", "net", "net.kind")


@dataclass(frozen=True)
class AutoencoderTrial:
    """What an autoencoder makes of some images."""

    decibels: float  # the peak signal-to-noise ratio of an image that it encoded and decoded, the median
    encode_seconds: float  # of one image


def reason_by_settings(images: Images, sets: Sequence[str]) -> str:
    """Which of the user's settings `sets` asks for pixels; "" where none does."""
    for text in sets:
        field, _, value = text.partition("=")
        if field in PIXEL_FIELDS and value != "null":
            return f"{settings(brief(text))} says so"
    if images.captions is not None:
        return "captions of classes are read in pixels"
    if is_side_set(sets) and (images.side % SIDE_STEP or images.side < MIN_SIDE):
        return f"latents are of sides from {MIN_SIDE} on, multiples of {SIDE_STEP}"
    return ""


def is_side_set(sets: Sequence[str]) -> bool:
    """Whether the user says how large the images are to be."""
    return any(text.startswith("data.side=") for text in sets)


def reason_by_images(shorter_side: float, pixels: Pixels) -> str:
    """Why images like these are learned in pixels: too small, or grey; "" where they are neither.

    `shorter_side` is that of the files, the median, in pixels.
    """
    if shorter_side < MIN_SIDE:
        return f"images of {shorter_side:.0f} pixels are too small for latents, which begin at {MIN_SIDE}"
    channels = pixels.int()
    spread = (channels.amax(1) - channels.amin(1)).flatten(1).amax(1)  # of each image
    if 2 * (spread <= GREY_LEVELS).sum() > len(pixels):
        return "the images are grey, and the autoencoder is of colours"
    return ""


def reason_by_reconstruction(trial: AutoencoderTrial) -> str:
    """Why images are learned in pixels that the autoencoder does not know; "" where it makes enough of them."""
    if trial.decibels >= MIN_DECIBELS:
        return ""
    return f"the autoencoder makes {trial.decibels:.1f} dB of these images, and latents take {MIN_DECIBELS:.0f}"


def reason_by_time(prepare_seconds: float, training_seconds: float | None) -> str:
    """Why images are not encoded: it takes too much of the training's time (None: it has no end); "" if it does not.

    `prepare_seconds` are those of all images, decoded and encoded.
    """
    if training_seconds is None or prepare_seconds <= MAX_SHARE_OF_TIME * training_seconds:
        return ""
    took = duration_text(prepare_seconds)
    return f"to encode them takes {took} of {duration_text(training_seconds)}; with more time they are latents"


def side_of_latents(shorter_side: float, side: int) -> int:
    """The pixels of a side to encode: those of the images' shorter side, a multiple of SIDE_STEP, at most `side`."""
    return min(side, int(shorter_side) // SIDE_STEP * SIDE_STEP)


def try_autoencoder(codec: LoadedCodec, pixels: Pixels) -> AutoencoderTrial:
    """Encode and decode some images, and time it."""
    x = from_uint8(pixels)
    with torch.no_grad():
        moments = codec.encode(x)
        seconds = Stopwatch(torch.device("cpu")).seconds(partial(codec.encode, x))
        decoded = codec.decode(moments)
    mean_squares = (decoded.clamp(-1, 1) - x).square().flatten(1).mean(1)
    return AutoencoderTrial(median(map(decibels, mean_squares.tolist())), seconds / len(pixels))


def cache_folder(place: str, images: Images, codec: LoadedCodec) -> str:
    """The folder CACHES/NAME-HASH for the latents of the images at a place; other images have another.

    `images` are with their classes. Reads images whose hash is not noted.
    """
    name = cache_name(folder_of_images(place).name, images, codec.sha256)
    return f"{CACHES}/{name}"


def has_caches(place: str) -> bool:
    """Whether some images of the place's name were encoded: these, or others. Reads no image."""
    return any(Path(CACHES).glob(f"{glob.escape(folder_of_images(place).name)}-*"))
