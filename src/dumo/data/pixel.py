"""Decode image files to squares or rectangles of pixels.

`ToSquare(side, crop)(data)` and `ToRectangle` load the image and turn it upright (`load_upright`), convert it to 8-bit
RGB (`to_rgb`), and resize and crop it (`crop_middle`). `upright_size` and `short_side` read only the header if
possible.

Transparent pixels are blended with white, 16-bit grey is rounded to 8 bits (pillow keeps the upper 8 bits of 16-bit
colours), the first frame of an animation is used, and EXIF rotations are applied. Colour profiles are ignored, as in
ADM and in references computed with it.
"""

import struct
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
# (height, width), whereas PIL's image.size is (width, height).
Size = tuple[int, int]

# Supported formats. EPS and PDF are excluded, since pillow passes them to other programs and data may not be trusted.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# EXIF orientations that exchange height and width.
SIDE_SWAPPING_ORIENTATIONS = (5, 6, 7, 8)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The largest ratio of the longer side to the shorter (our choice).
MAX_ASPECT_RATIO = 100
# Larger images are loaded one at a time to limit memory. Above 1.8e8 pixels, pillow refuses them.
_SERIAL_PIXELS = 2**26
_SERIAL_LOCK = Lock()


class Unreadable(UserError):  # noqa: N818, a property of the image
    """An image that cannot be decoded. Messages begin with a verb, and callers prepend the file's name."""


@dataclass(frozen=True)
class ToRectangle:
    """Decode an image file to RGB of `height` x `width` pixels."""

    height: int
    width: int
    crop: Crop

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.height, self.width)

    def __call__(self, data: bytes) -> UInt8[Tensor, "3 h w"]:
        """Return the pixels, 0 ... 255. Raises Unreadable if the image is damaged or has an unsuitable size."""
        image = to_rgb(load_upright(data))
        image = crop_middle(image, (self.height, self.width), self.crop)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ToSquare(ToRectangle):
    """Decode an image file to RGB of `side` x `side` pixels."""

    def __init__(self, side: int, crop: Crop) -> None:
        """Set the size and the method of cropping."""
        super().__init__(side, side, crop)


@dataclass(frozen=True)
class SameSize(ToRectangle):
    """Decode an image file to RGB if it has the size of the first image, `width` x `height`."""

    first_name: str

    def __call__(self, data: bytes) -> UInt8[Tensor, "3 h w"]:
        """Return the pixels, 0 ... 255. Raises Unreadable if the image is damaged or has another size."""
        image = to_rgb(load_upright(data))
        if image.size != (self.width, self.height):
            raise Unreadable(
                f"is {image.width} x {image.height} pixels, but {self.first_name} is {self.width} x {self.height}: "
                "resize all images to one size"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_upright(data: bytes) -> Image.Image:
    """Load the first frame and turn it upright by its EXIF tag. Raises Unreadable."""
    with _open_image(data) as image:
        is_large = image.width * image.height > _SERIAL_PIXELS
        lock = _SERIAL_LOCK if is_large else nullcontext()
        with lock:
            image.load()
            return ImageOps.exif_transpose(image) if _has_readable_exif(image) else image.copy()


def short_side(data: bytes) -> int:
    """Return the shorter side in pixels from the header. Raises Unreadable."""
    with _open_image(data) as image:
        return min(image.size)


def upright_size(data: bytes) -> Size:
    """Return the height and width of the upright image, if possible from the header. Raises Unreadable.

    A PNG is read completely, since its EXIF tags may be at the end, and a TIFF since pillow turns it when loading.
    """
    with _open_image(data) as image:
        if image.format == "TIFF":
            image.load()
            return image.height, image.width
        orientation = image.getexif().get(ExifTags.Base.Orientation) if _has_readable_exif(image) else None
        stored_height = image.height
        stored_width = image.width
        if orientation in SIDE_SWAPPING_ORIENTATIONS:
            return stored_width, stored_height
        return stored_height, stored_width


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB, with white behind transparent pixels. Raises Unreadable."""
    if image.mode == "F":
        raise Unreadable("has floating-point pixels of unknown range: convert it to 8 bits")
    if image.mode.startswith("I"):
        clear_level = image.info.get("transparency")
        eight_bits = _to_eight_bits(image)
        # In a 16-bit grey PNG, one of the 65,536 levels can be transparent.
        if isinstance(clear_level, int):
            alpha = np.where(np.asarray(image) == clear_level, 0, 255).astype(np.uint8)
            eight_bits = Image.merge("LA", (eight_bits, Image.fromarray(alpha)))
        image = eight_bits
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop_middle(image: Image.Image, size: Size, crop: Crop) -> Image.Image:
    """Resize an image and crop the middle to `size`.

    - `adm`: halve with a box filter while both sides are at least twice `size`; resize bicubically, up or down, to the
      smallest size that covers `size`; crop the middle. This is `center_crop_arr` of guided-diffusion (Dhariwal &
      Nichol 2021), with which the ImageNet references were made.
    - `bicubic`: as `adm`, without halving.
    - `none`: do nothing. Raises Unreadable if the image has another size.
    """
    height, width = size
    if crop == "none":
        if image.size != (width, height):
            raise Unreadable(f"is {image.width} x {image.height} pixels, not {width} x {height}: set data.crop=adm")
        return image
    if crop == "adm":
        image = _halve_by_boxes(image, size)
    rows, columns = covering_size((image.height, image.width), size)
    image = image.resize((columns, rows), Image.Resampling.BICUBIC)
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def covering_size(image_size: Size, target: Size) -> Size:
    """Return the smallest size that covers `target` with the aspect ratio of an image."""
    image_height, image_width = image_size
    height, width = target
    scale = max(height / image_height, width / image_width)
    return round(image_height * scale), round(image_width * scale)


@contextmanager
def _open_image(data: bytes) -> Generator[Image.Image]:
    """Open an image without reading its pixels. Converts errors in the context to Unreadable."""
    if not data:
        raise Unreadable("is empty: it has 0 bytes")
    try:
        with Image.open(BytesIO(_without_texts(data)), formats=_FORMATS) as image:
            shorter, longer = sorted(image.size)
            # Resized by its shorter side, such an image would take gigabytes.
            if longer > MAX_ASPECT_RATIO * shorter:
                raise Unreadable(f"is {image.width} x {image.height} pixels, too long for its width: crop it first")
            yield image
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable(f"is not an image in a supported format ({', '.join(_FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise Unreadable("has more than 178 million pixels: make it smaller first") from error
    except Exception as error:
        # Pillow's readers can raise any exception for damaged files.
        raise Unreadable(f"cannot be read as an image: {error}") from error


def _has_readable_exif(image: Image.Image) -> bool:
    """Whether pillow can read the EXIF tags, if there are any. Viewers ignore broken ones."""
    try:
        image.getexif()
    except (SyntaxError, ValueError, OSError, struct.error):
        return False
    return True


def _without_texts(data: bytes) -> bytes:
    """Remove the texts and the colour profile of a PNG; return other files unchanged.

    Pillow refuses texts of more than a MB, but image generators store workflows of several MB there. XMP is kept, since
    it may contain the orientation.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return data
    kept = [_PNG_SIGNATURE]
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        is_xmp = data.startswith(b"XML:com.adobe.xmp\0", position + 8)
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or is_xmp:
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]])


def _halve_by_boxes(image: Image.Image, size: Size) -> Image.Image:
    """Halve an image with a box filter while both sides are at least twice `size`."""
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Round 16-bit grey, 0 ... 65535, to 0 ... 255. Pillow would clip it."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise Unreadable("has grey levels outside 0 ... 65535, of unknown range: convert it to 8 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
