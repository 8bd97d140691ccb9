"""Whether photos are learned in latents of the autoencoder that comes with dumo, or in pixels, by a look at a few.

On a CPU latents show more after the same time (docs/log.md), where the autoencoder knows what is in the images. Each
function `reason_by_...` says why a run is in pixels, as the end of a line for the user with a number and a way out, or
"" where nothing is in the way of latents. Its `place` is where the user has the images; None: in memory.

`side_of_latents` is the size of the images that are encoded, and `try_autoencoder` measures what it makes of some.
`cache_folder` names the folder where their latents go, `place_in_memory` the file next to it where images in memory are
kept, and `has_caches` says whether latents may be there.
"""

import glob
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from jaxtyping import UInt8
from torch import Tensor

from dumo.config.change import sets_field, yaml_text
from dumo.config.source import IMAGES_LATENTS_RECIPE, folder_of_images
from dumo.data import Images, Memory
from dumo.data.origin import cache_name
from dumo.encoders.codec import LoadedCodec
from dumo.io.picture import decibels, from_uint8
from dumo.io.read import brief
from dumo.io.trained import LATENTS_FOLDER
from dumo.runtime.door import option, settings
from dumo.runtime.stopwatch import Stopwatch
from dumo.runtime.text import duration_text
from dumo.training.deadline import PLANNED_PREPARATION_SHARE, minutes_to_prepare

Pixels = UInt8[Tensor, "n 3 side side"]

_MIN_SIDE_ENCODED = 32  # pixels: of photos of 32 the autoencoder, made for 256, keeps 22 dB (docs/log.md); ours
PIXELS_PER_LATENT = 8  # pixels of an image to one of its latent, each way
_MIN_DECIBELS = 20.0  # ours: photos of 64 pixels have 20 to 31, noise has 10, a chessboard of 4 pixels 5 (docs/log.md)
_GREY_LEVELS = 8  # of 255, between the channels of a pixel of a grey image that is stored in colour: ours
# Settings by which the user chooses pixels: all of the data or the net, or what latents do not have.
_PIXEL_FIELDS = ("data", "data.kind", "data.root", "data.augment", "data.buckets", "net", "net.kind")


@dataclass(frozen=True)
class AutoencoderTrial:
    """What an autoencoder makes of some images."""

    decibels: float  # the peak signal-to-noise ratio of an image that it encoded and decoded, the median
    encode_seconds: float  # of one image

    @property
    def error_text(self) -> str:
        """By how much it changes an image, the mean over pixels, as a share of full brightness."""
        return _error_text(self.decibels)


def reason_by_choice(sets: Sequence[str]) -> str:
    """Which of the user's settings `sets` asks for pixels; "" where none does."""
    for text in sets:
        field, _, value = text.partition("=")
        if field in _PIXEL_FIELDS and value != "null":
            return f"{settings(brief(text))} asks for them"
    return ""


def reason_by_settings(images: Images, sets: Sequence[str]) -> str:
    """Which of the user's settings `sets` latents do not allow; "" where they allow all."""
    if images.captions is not None:
        return f"captions of classes are read there; {settings('data.captions=null')} leaves them out"
    if sets_field(sets, "data.side") and (images.side % PIXELS_PER_LATENT or images.side < _MIN_SIDE_ENCODED):
        return (
            f"data.side={images.side}, and latents take multiples of {PIXELS_PER_LATENT} from {_MIN_SIDE_ENCODED} on: "
            f"{settings(f'data.side={_MIN_SIDE_ENCODED}')} allows them"
        )
    return ""


def reason_by_side(shorter_side: float) -> str:
    """Why images are learned in pixels that are too small, by their shorter side in pixels; "" where they are not."""
    if shorter_side < _MIN_SIDE_ENCODED:
        return f"images of {shorter_side:.0f} pixels are too small for latents, which begin at {_MIN_SIDE_ENCODED}"
    return ""


def reason_by_colours(pixels: Pixels, place: str | None) -> str:
    """Why images like these are learned in pixels that are grey; "" where most are not."""
    channels = pixels.int()
    spread = (channels.amax(1) - channels.amin(1)).flatten(1).amax(1)  # of each image
    num_grey = int((spread <= _GREY_LEVELS).sum())
    if 2 * num_grey > len(pixels):
        return f"{num_grey} of {len(pixels)} images are grey, and latents are of colours{_by_recipe(place)}"
    return ""


def reason_by_reconstruction(trial: AutoencoderTrial, place: str | None) -> str:
    """Why images are learned in pixels that the autoencoder does not know; "" where it keeps enough."""
    if trial.decibels >= _MIN_DECIBELS:
        return ""
    return (
        f"latents would change these images by {trial.error_text}, more than {_error_text(_MIN_DECIBELS)}"
        f"{_by_recipe(place)}"
    )


def _error_text(decibels: float) -> str:
    """A peak signal-to-noise ratio as people see it: the error, as a share of full brightness."""
    return f"{10 ** (-decibels / 20):.0%} of full brightness ({decibels:.1f} dB)"


def _by_recipe(place: str | None) -> str:
    """How images at a place are learned in latents though they are not proposed so; "" of images in memory."""
    if place is None:
        return ""
    field = shlex.quote(f"data.images.root={yaml_text(place)}")
    return f"; in latents all the same by  dumo encode {IMAGES_LATENTS_RECIPE} --set {field}"


def reason_by_time(prepare_seconds: float, training_seconds: float | None) -> str:
    """Why images are not encoded: it takes too much of the training's time (None: it has no end); "" if it does not.

    `prepare_seconds` are those of all images, decoded and encoded.
    """
    if training_seconds is None or prepare_seconds <= PLANNED_PREPARATION_SHARE * training_seconds:
        return ""
    return (
        f"to encode them takes {duration_text(prepare_seconds)} of {duration_text(training_seconds)}, more than "
        f"{PLANNED_PREPARATION_SHARE:.0%}; in latents by {option('minutes', minutes_to_prepare(prepare_seconds))}"
    )


def side_of_latents(shorter_side: float, side: int) -> int:
    """The pixels of a side to encode: those of the images' shorter side, a multiple of 8, at most `side`."""
    return min(side, int(shorter_side) // PIXELS_PER_LATENT * PIXELS_PER_LATENT)


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
    """The folder LATENTS_FOLDER/NAME-HASH for the latents of the images at a place; other images have another.

    `images` are with their classes. Reads images whose hash is not noted.
    """
    name = cache_name(folder_of_images(place).name, images, codec.sha256)
    return f"{LATENTS_FOLDER}/{name}"


def place_in_memory(data: Memory) -> str:
    """The file LATENTS_FOLDER/NAME-HASH.tar, to which images in memory are written before they are encoded."""
    type_name = data.name.rpartition(":")[2]
    return f"{LATENTS_FOLDER}/{type_name}-{data.digest}.tar"


def has_caches(place: str) -> bool:
    """Whether some images of the place's name were encoded: these, or others. Reads no image."""
    return any(Path(LATENTS_FOLDER).glob(f"{glob.escape(folder_of_images(place).name)}-*"))
