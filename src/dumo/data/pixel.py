"""From the bytes of an image file to a square of pixels, or an oblong.

Every file becomes 8-bit RGB, upright, as one looks at it: transparency lies over white, 16 bits are rounded to
8, of an animation the first frame is taken, and the camera's rotation (EXIF) is carried out. Colour profiles are not
read, as in ADM and the references that were computed with it.
"""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from threading import Lock
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dumo.types import UserError

Crop = Literal["adm", "bicubic", "none"]
Size = tuple[int, int]  # height and width, in pixels

# What is opened. No EPS or PDF: pillow hands them to another program, and data may come from anywhere.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What is taken for an image by its name. Photographs of telephones are in SUFFIXES, so that errors name them.
KNOWN = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
SUFFIXES = KNOWN | {".avif", ".heic", ".heif"}


LYING = (5, 6, 7, 8)  # of EXIF's orientations, those that exchange height and width
LONG = 100  # times as long as wide, at most: ours
LARGE = 2**26  # pixels; of larger images one is loaded at a time, and of 1.8e8 pixels pillow loads none: ours
ONE_AT_A_TIME = Lock()


class Unreadable(UserError):  # noqa: N818, it says what the image is
    """An image that cannot be shown as pixels; the message says why, and not which."""


@dataclass(frozen=True)
class Frame:
    """What an image is brought to: RGB of `side` x `side` pixels."""

    side: int
    crop: Crop

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.side, self.side)

    def __call__(self, data: bytes) -> UInt8[Tensor, "3 h w"]:
        """The pixels, 0 ... 255. Raises Unreadable where the bytes are no whole image, or not of a size that fits."""
        image = cut(flat(upright(data)), self.shape[1:], self.crop)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Oblong(Frame):
    """RGB of `side` x `width` pixels."""

    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.side, self.width)


def upright(data: bytes) -> Image.Image:
    """The first frame, loaded and turned as its EXIF tag says. Raises Unreadable."""
    with _opened(data) as image:
        narrow, wide = sorted(image.size)
        with ONE_AT_A_TIME if narrow * wide > LARGE else nullcontext():
            image.load()
            return ImageOps.exif_transpose(image)


def short_side(data: bytes) -> int:
    """The pixels along the shorter side, by the header alone. Raises Unreadable."""
    with _opened(data) as image:
        return min(image.size)


def size_of(data: bytes) -> Size:
    """Height and width once it is upright, by the header alone; of a PNG, whose EXIF may stand last, by all of it.

    Raises Unreadable.
    """
    with _opened(data) as image:
        lies = image.getexif().get(ExifTags.Base.Orientation) in LYING
        return image.size if lies else (image.height, image.width)


@contextmanager
def _opened(data: bytes) -> Generator[Image.Image]:
    """The image, not yet loaded. Raises Unreadable, for what is raised inside, too."""
    if not data:
        raise Unreadable("is empty: it has 0 bytes")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            narrow, wide = sorted(image.size)
            if wide > LONG * narrow:  # brought to a size by its short side, it would have gigabytes
                raise Unreadable(f"is {image.width} x {image.height} pixels, too long for its width: cut it first")
            yield image
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable(f"is no image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # a broken file may raise anything in pillow's readers
        raise Unreadable(f"cannot be read as an image: {error}") from error


def flat(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, over white where it is transparent. Raises Unreadable."""
    if image.mode == "F":
        raise Unreadable("has floating-point pixels, whose range is not known: convert it to 8 bits")
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cut(image: Image.Image, size: Size, crop: Crop) -> Image.Image:
    """The middle of the image, of `size` pixels: height and width.

    `adm`: halve by boxes while both sides are at least twice `size`, bring the image bicubically, up as well as down,
    to the least that covers `size`, and cut the middle out (`center_crop_arr` of guided-diffusion, Dhariwal & Nichol
    2021: how the ImageNet references were made). `bicubic`: the same without the halving. `none`: as it is; raises
    Unreadable if it does not fit.
    """
    height, width = size
    if crop == "none":
        if image.size != (width, height):
            raise Unreadable(f"is {image.width} x {image.height} pixels, not {width} x {height}: set data.crop=adm")
        return image
    while crop == "adm" and image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    rows, columns = covering((image.height, image.width), size)
    image = image.resize((columns, rows), Image.Resampling.BICUBIC)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def covering(image: Size, size: Size) -> Size:
    """The sides of an image, brought to the least size that covers `size`."""
    scale = max(wanted / side for wanted, side in zip(size, image, strict=True))
    return round(image[0] * scale), round(image[1] * scale)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 0 ... 65535, rounded to 0 ... 255: pillow alone would clip it."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise Unreadable("has grey levels outside 0 ... 65535, whose range is not known: convert it to 8 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
