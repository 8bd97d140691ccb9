"""From bytes to pixels: every kind of image file comes out as one would see it, and in ADM's size."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dumo.data.pixel import Crop, ToSquare, Unreadable

RED, BLUE = (255, 0, 0), (0, 0, 255)


def noise(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decoded(image: Image.Image, side: int, crop: Crop = "none", form: str = "PNG") -> Tensor:
    return ToSquare(side, crop)(encoded(image, form)).int()


def pixels(image: Image.Image) -> Tensor:
    return torch.tensor(np.asarray(image).astype(np.int32)).permute(2, 0, 1)


def two(left: object, right: object, mode: str = "RGB") -> Image.Image:
    """8 x 8, one colour at the left, one at the right."""
    image = Image.new(mode, (8, 8), left)
    image.paste(right, (4, 0, 8, 8))
    return image


def colours(x: Tensor) -> list[tuple[int, ...]]:
    """In the middle of the left half, and of the right."""
    return [tuple(x[:, 4, 2].tolist()), tuple(x[:, 4, 6].tolist())]


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "TIFF"])
def test_a_lossless_image_comes_back_as_it_is(form: str) -> None:
    assert torch.equal(decoded(noise(5, 5), 5, form=form), pixels(noise(5, 5)))


@pytest.mark.parametrize(("width", "height"), [(40, 32), (24, 72), (32, 32)])
def test_adm_halves_by_the_mean_of_blocks(width: int, height: int) -> None:
    """Three times to the eighth part: nothing is left to do but to cut out the middle."""
    side, x = min(width, height) // 8, pixels(noise(width, height)).double()
    for _ in range(3):
        x = x.unfold(2, 2, 2).mean(3).add(0.5).floor()  # pillow rounds each way by itself
        x = x.unfold(1, 2, 2).mean(3).add(0.5).floor()
    top, left = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
    found = decoded(noise(width, height), side, "adm")
    assert found.shape == (3, side, side)
    assert (found - x[:, top : top + side, left : left + side]).abs().max() <= 1  # in an order of its own
    assert not torch.equal(found, decoded(noise(width, height), side, "bicubic"))
    # never below twice the side: 31 is brought to 16 in one go, 32 by a halving
    one, two = (torch.equal(*(decoded(noise(40, h), 16, crop) for crop in ("adm", "bicubic"))) for h in (31, 32))
    assert (one, two) == (True, False)


@pytest.mark.parametrize("crop", ["adm", "bicubic"])
@pytest.mark.parametrize(("width", "height"), [(7, 5), (5, 8), (9, 9)])
def test_the_middle_is_cut_out(width: int, height: int, crop: Crop) -> None:
    """Where the short side is right already: pixel by pixel, with the odd one left over at the far end."""
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    whole = pixels(noise(width, height))
    assert torch.equal(decoded(noise(width, height), side, crop), whole[:, top : top + side, left : left + side])


INK = two((0, 255, 255, 0), (255, 255, 0, 0), "CMYK")  # yellow with magenta is red


@pytest.mark.parametrize(
    ("image", "form", "left", "right"),
    [
        (two(10, 200, "L"), "PNG", (10,) * 3, (200,) * 3),
        (two(0, 1, "1"), "PNG", (0,) * 3, (255,) * 3),
        (two(RED, BLUE).quantize(2), "PNG", RED, BLUE),
        (INK, "TIFF", RED, BLUE),
        (INK, "JPEG", RED, BLUE),  # Adobe's JPEG says it upside down
        (two((128, 128, 128), (128, 128, 128), "LAB"), "TIFF", (119,) * 3, (119,) * 3),  # L* = 50
    ],
)
def test_every_mode_is_read_as_its_colours(
    image: Image.Image, form: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    for found, meant in zip(colours(decoded(image, 8, form=form)), (left, right), strict=True):
        assert max(abs(a - b) for a, b in zip(found, meant, strict=True)) <= (3 if form == "JPEG" else 0)


def test_of_an_animation_the_first_frame() -> None:
    first, other = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
    data = encoded(first, "GIF", save_all=True, append_images=[other])
    assert colours(ToSquare(8, "none")(data).int()) == [RED, RED]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_white(mode: str) -> None:
    """Whatever colour hides below; half of it shines through halfway."""
    if mode == "RGBA":
        assert colours(decoded(two((255, 0, 0, 0), (0, 0, 255, 128), mode), 8)) == [(255,) * 3, (127, 127, 255)]
    elif mode == "LA":
        assert colours(decoded(two((0, 0), (0, 255), mode), 8)) == [(255,) * 3, (0,) * 3]
    else:
        image = two(RED, BLUE).quantize(2) if mode == "P" else two(10, 200, "L")
        number = image.getpixel((0, 0))
        x = ToSquare(8, "none")(encoded(image, "PNG", transparency=number)).int()
        assert colours(x)[0] == (255,) * 3
        assert colours(x)[1] != (255,) * 3


def test_sixteen_bits_are_rounded_to_eight() -> None:
    """0 ... 65535 is 0 ... 255, the nearest each; pillow's own conversion makes nearly all of it white."""
    levels = np.arange(256, dtype=np.int64) * 257
    shifted = (levels + np.where(np.arange(256) % 2, 128, -128)).clip(0, 65535)
    for grey in (levels, shifted):
        image = Image.fromarray(grey.astype(np.uint16).reshape(16, 16))
        for form in ("PNG", "TIFF"):
            assert torch.equal(decoded(image, 16, form=form)[0].flatten(), torch.arange(256, dtype=torch.int))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_of_the_camera_is_carried_out(orientation: int) -> None:
    """What is red at the left when upright: each tag tells how the file's rows lie."""
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:, :4, 0] = 255
    upright[:4, :, 1] = 255  # green at the top, so that all eight differ
    turn = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 1, 7: 3, 8: 3}[orientation]  # quarters, against the clock
    stored = np.rot90(upright, turn)
    if orientation in (2, 4, 5, 7):
        stored = np.fliplr(stored) if orientation in (2, 4) else np.flipud(stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert torch.equal(ToSquare(8, "none")(data).permute(1, 2, 0), torch.tensor(upright))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"<html>404 not found</html>", "not an image in a supported format"),
        (encoded(noise(64, 64), "JPEG")[:700], "truncated"),
        (encoded(noise(64, 64))[:5000], "cannot be read as an image"),
        (encoded(noise(64, 64))[:9], "not an image in a supported format"),
        (encoded(noise(8, 8), "EPS"), "not an image in a supported format"),  # a program, not pixels
        (encoded(Image.new("1", (1, 5_000_000))), "1 x 5000000 pixels, too long for its width"),
        (encoded(Image.new("1", (15_000, 15_000))), "more than 178 million pixels: make it smaller first"),
        (encoded(noise(6, 5)), r"is 6 x 5 pixels, not 5 x 5"),
        (encoded(Image.new("F", (5, 5), 0.5), "TIFF"), "floating-point"),
        (encoded(Image.new("I", (5, 5), 100_000), "TIFF"), "outside 0 ... 65535"),
        (encoded(Image.new("I", (5, 5), -1), "TIFF"), "outside 0 ... 65535"),
    ],
)
def test_what_is_no_whole_image_of_the_size_and_a_known_range_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        ToSquare(5, "none")(data)
