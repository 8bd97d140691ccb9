"""From the bytes of an image file to a square of pixels, or a rectangle.

`ToSquare(side, crop)(data)` and `ToRectangle` make pixels: the image is loaded and turned upright (`load_upright`),
then converted to 8-bit RGB (`to_rgb`), then resized and cropped (`crop_middle`). `upright_size` and `short_side` read
only the header, where that is enough. `covering_size` says to which size an image is brought before it is cropped.

Every file becomes 8-bit RGB, upright, as one looks at it: transparency lies over white, grey of 16 bits is rounded to
8 (of colours of 16 bits pillow reads the upper 8), of an animation the first frame is taken, and the camera's rotation
(EXIF) is carried out. Colour profiles are not read, as in ADM and the references that were computed with it.
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
Size = tuple[int, int]  # (height, width); PIL's image.size is the other way round

# What is opened. No EPS or PDF: pillow hands them to another program, and data may come from anywhere.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

SIDE_SWAPPING_ORIENTATIONS = (5, 6, 7, 8)  # of EXIF's orientations, those that exchange height and width
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_ASPECT_RATIO = 100  # of the longer side to the shorter: ours
_SERIAL_PIXELS = 2**26  # larger images are loaded one at a time (ours); above 1.8e8 pixels pillow loads none
_SERIAL_LOCK = Lock()


class Unreadable(UserError):  # noqa: N818, it says what the image is
    """An image that cannot be shown as pixels. Messages begin with a verb; the caller puts the file's name before."""


@dataclass(frozen=True)
class ToRectangle:
    """Bytes of an image file to RGB of `height` x `width` pixels."""

    height: int
    width: int
    crop: Crop

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.height, self.width)

    def __call__(self, data: bytes) -> UInt8[Tensor, "3 h w"]:
        """The pixels, 0 ... 255. Raises Unreadable where the bytes are no whole image, or not of a size that fits."""
        image = to_rgb(load_upright(data))
        image = crop_middle(image, (self.height, self.width), self.crop)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ToSquare(ToRectangle):
    """Bytes of an image file to RGB of `side` x `side` pixels."""

    def __init__(self, side: int, crop: Crop) -> None:
        """Bring images to squares of `side` x `side` pixels, by `crop`."""
        super().__init__(side, side, crop)


@dataclass(frozen=True)
class SameSize(ToRectangle):
    """Bytes of an image file to RGB, if it has the size of the first image, `width` x `height`."""

    first_name: str

    def __call__(self, data: bytes) -> UInt8[Tensor, "3 h w"]:
        """The pixels, 0 ... 255. Raises Unreadable where the bytes are no whole image, or of another size."""
        image = to_rgb(load_upright(data))
        if image.size != (self.width, self.height):
            raise Unreadable(
                f"is {image.width} x {image.height} pixels, and {self.first_name} is {self.width} x {self.height}: "
                "bring all images to one size, for none is resized here"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_upright(data: bytes) -> Image.Image:
    """The first frame, loaded and turned as its EXIF tag says. Raises Unreadable."""
    with _open_image(data) as image:
        is_large = image.width * image.height > _SERIAL_PIXELS
        lock = _SERIAL_LOCK if is_large else nullcontext()
        with lock:
            image.load()
            return ImageOps.exif_transpose(image)


def short_side(data: bytes) -> int:
    """The pixels along the shorter side, by the header alone. Raises Unreadable."""
    with _open_image(data) as image:
        return min(image.size)


def upright_size(data: bytes) -> Size:
    """The height and width of the upright image, mostly by the header alone. Raises Unreadable.

    A PNG is read as a whole, for its EXIF tags may come last; so is a TIFF, which pillow turns when it loads it.
    """
    with _open_image(data) as image:
        if image.format == "TIFF":
            image.load()
            return image.height, image.width
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        stored_height = image.height
        stored_width = image.width
        if orientation in SIDE_SWAPPING_ORIENTATIONS:
            return stored_width, stored_height
        return stored_height, stored_width


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in 8-bit RGB, over white where it is transparent. Raises Unreadable."""
    if image.mode == "F":
        raise Unreadable("has floating-point pixels, whose range is not known: convert it to 8 bits")
    if image.mode.startswith("I"):
        clear_level = image.info.get("transparency")
        eight_bits = _to_eight_bits(image)
        if isinstance(clear_level, int):  # the level that a PNG says is clear, among its 65,536
            alpha = np.where(np.asarray(image) == clear_level, 0, 255).astype(np.uint8)
            eight_bits = Image.merge("LA", (eight_bits, Image.fromarray(alpha)))
        image = eight_bits
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop_middle(image: Image.Image, size: Size, crop: Crop) -> Image.Image:
    """The middle of an image, of `size`.

    - `adm`: halve by boxes while both sides are at least twice `size`; bring the image bicubically, up as well as down,
      to the least size that covers `size`; cut the middle out. This is `center_crop_arr` of guided-diffusion (Dhariwal
      & Nichol 2021), by which the ImageNet references were made.
    - `bicubic`: as `adm`, without the halving.
    - `none`: the image as it is. Raises Unreadable if it is of another size.
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
    """The least size that covers `target`, of the proportions of an image."""
    image_height, image_width = image_size
    height, width = target
    scale = max(height / image_height, width / image_width)
    return round(image_height * scale), round(image_width * scale)


@contextmanager
def _open_image(data: bytes) -> Generator[Image.Image]:
    """Open an image, its pixels unread. Raises Unreadable, also in place of errors inside."""
    if not data:
        raise Unreadable("is empty: it has 0 bytes")
    try:
        with Image.open(BytesIO(_without_texts(data)), formats=_FORMATS) as image:
            shorter, longer = sorted(image.size)
            if longer > MAX_ASPECT_RATIO * shorter:  # brought to a size by its short side, it would have gigabytes
                raise Unreadable(f"is {image.width} x {image.height} pixels, too long for its width: cut it first")
            yield image
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable(f"is no image of a known format ({', '.join(_FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise Unreadable("has more than 178 million pixels: make it smaller first") from error
    except Exception as error:  # a broken file may raise anything in pillow's readers
        raise Unreadable(f"cannot be read as an image: {error}") from error


def _without_texts(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, of which pillow reads no more than a MB; other bytes as they are.

    Programs that make images write workflows of several MB there. XMP stays, for it may say how the image is turned.
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
    """An image, halved by boxes while both sides are at least twice `size`."""
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 0 ... 65535, rounded to 0 ... 255: pillow alone would clip it."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise Unreadable("has grey levels outside 0 ... 65535, whose range is not known: convert it to 8 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))
