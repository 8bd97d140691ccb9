"""Augmentation that does not leak into the samples: the net reads numbers that describe the change of each image.

Karras et al. 2022 (EDM), App. F.2 and Tab. 6: each transformation is made with probability P, and a row of numbers, the
net's condition, says which and how far. All zero is an unchanged image, the condition of samples.

`Edm.drawn` draws the changes of a batch (`changes`), and calling `Edm` makes them: it flips images, then warps those
that are moved (`warp`, by the `matrix` A of each).

The geometry is that of Karras et al. 2020 (ADA), App. B. With positions in pixels from the middle of the image, the
pixel at o comes from A (o - shift),

    A = turn(angle) turn(-axis) diag(1 / k, k) turn(axis) / size.

A place between pixels is looked up on a grid twice as fine, which a wavelet's low-pass filter h makes of the image and,
mirrored, brings back. The filter is orthogonal to its own even shifts, sum_i h[i] h[i + 2j] = (j = 0): so a move by
whole pixels changes no pixel. Beyond its edges an image continues as its own reflection, once; further out it is grey.
Refining and bringing back are linear in rows and in columns, so each is two products with a matrix (`_filters`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import pi
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn import functional as F

from dumo.types import PerSample, Rows, Sample, Spec, lift

# The low-pass filter of the wavelet sym6, the least asymmetric with 6 vanishing moments (Daubechies 1992).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
MIDDLE = 5  # index in the filter of the pixel itself
EDGE = len(SYM6) // 2  # fine places beyond the image on each side that the filter reaches on its way back

# All from EDM
P = 0.12  # share of the images that a transformation is made on
SIZE = 0.2  # standard deviation of log2 of the size
STRETCH = 0.2  # standard deviation of log2 of k
OBLIQUE = 0.5  # share of the stretches along another axis than the image's own
SHIFT = 0.125  # standard deviation, in sides of the image

Name = Literal["xflip", "yflip", "scale", "rotate", "aniso", "translate"]
# Numbers in the condition, by transformation
NUMBERS: dict[Name, int] = {"xflip": 1, "yflip": 1, "scale": 1, "rotate": 2, "aniso": 2, "translate": 2}


@dataclass(frozen=True)
class Augmentation:
    """The changes of images, a row each: drawn for a whole batch, of which a caller takes its rows."""

    flipped: Bool[Tensor, "b 2"]  # left with right, top with bottom
    moved: Rows  # the images that A and shift change
    a: Float[Tensor, "b 2 2"]  # A of the formula above
    shift: Float[Tensor, "b 2"]  # right and down, in sides
    numbers: Float[Tensor, "b n"]  # the net's condition

    def __getitem__(self, rows: slice) -> "Augmentation":
        """The changes of some of the images."""
        return Augmentation(self.flipped[rows], self.moved[rows], self.a[rows], self.shift[rows], self.numbers[rows])


class Edm(Spec):
    """EDM's augmentation for CIFAR-10; MeanFlow turns off `yflip` and `rotate`."""

    kind: Literal["edm"] = "edm"
    yflip: bool = True  # top and bottom, half as often as the others
    rotate: bool = True  # by any angle

    @property
    def shares(self) -> dict[Name, float]:
        """The share of images that each transformation is made on, without those turned off."""
        all_shares: dict[Name, float] = {
            "xflip": 0.5,  # left and right
            "yflip": 0.5 * P,
            "scale": P,
            "rotate": P,
            "aniso": P,  # longer along one axis, shorter across
            "translate": P,
        }
        return {name: share for name, share in all_shares.items() if getattr(self, name, True)}

    @property
    def numbers(self) -> int:
        """The number of numbers in an image's condition."""
        return sum(NUMBERS[name] for name in self.shares)

    def drawn(self, n: int, g: Generator) -> Augmentation:
        """Draw the changes of n images."""
        return changes(self.shares, n, g)

    def __call__(self, x: Sample, change: Augmentation) -> Sample:
        """Change images (b, channels, side, side). The result of an image does not depend on the others."""
        left, top = change.flipped.T
        x = torch.where(lift(left, x), x.flip(-1), x)
        x = torch.where(lift(top, x), x.flip(-2), x)
        rows = change.moved.nonzero().flatten()
        if not len(rows):
            return x
        return x.index_copy(0, rows, warp(x[rows], change.a[rows], change.shift[rows]))


def changes(shares: Mapping[Name, float], n: int, g: Generator) -> Augmentation:
    """Draw the changes of n images, by the shares of the transformations; a transformation without a share is not made.

    The draws do not depend on which transformations are made.
    """
    p = torch.tensor([shares.get(name, 0.0) for name in NUMBERS])
    is_made = torch.rand(len(NUMBERS), n, generator=g) < p[:, None]
    xflip, yflip, scale, rotate, aniso, translate = is_made.float()
    size, stretch, *shift = torch.randn(4, n, generator=g)
    angle, axis = pi * (2 * torch.rand(2, n, generator=g) - 1)
    size = scale * size
    angle = rotate * angle
    stretch = aniso * stretch
    axis = axis * (torch.rand(n, generator=g) < OBLIQUE)
    right, down = (translate * s for s in shift)
    conditions: dict[Name, tuple[PerSample, ...]] = {
        "xflip": (xflip,),
        "yflip": (yflip,),
        "scale": (size,),
        "rotate": (angle.cos() - 1, angle.sin()),
        "aniso": (stretch * axis.cos(), stretch * axis.sin()),
        "translate": (right, down),
    }
    a = matrix((SIZE * size).exp2(), angle, (STRETCH * stretch).exp2(), axis)
    numbers: list[PerSample] = []
    for name, condition in conditions.items():
        if name in shares:
            numbers += condition
    return Augmentation(
        flipped=is_made[:2].T,
        moved=is_made[2:].any(0),
        a=a,
        shift=SHIFT * torch.stack([right, down], 1),
        numbers=torch.stack(numbers, 1),
    )


def matrix(size: PerSample, angle: PerSample, k: PerSample, axis: PerSample) -> Float[Tensor, "b 2 2"]:
    """A of the formula above: a size, an angle, and a stretch by k along an axis; both angles are in radians."""
    stretch = torch.diag_embed(torch.stack([1 / k, k], 1))
    return _turn(angle - axis) @ stretch @ _turn(axis) / size[:, None, None]


def warp(x: Sample, a: Float[Tensor, "b 2 2"], shift: Float[Tensor, "b 2"]) -> Sample:
    """Look each pixel o, (right, down) from the middle, up at A (o - shift); the shift counts in sides."""
    b, ch, side, _ = x.shape
    fine, coarse = (m.to(x) for m in _filters(side))
    half = len(fine) / 2  # half the side of the fine grid of the image and its reflections
    long = coarse.shape[1]  # side of the fine grid of the result
    a = a.to(x)
    shift = side * shift.to(x)
    # On a fine grid a pixel stands half a place before the middle of its two: at 2 o - 1/2 from the middle of all.
    start = (a * (0.5 - 2 * shift)[:, None]).sum(2, keepdim=True) - 0.5
    theta = torch.cat([a * long / 2, start], 2) / half  # in halves of a grid, as torch counts
    images: list[Tensor] = []
    for row in torch.arange(b).split(1):  # the last bits of a batched product may depend on its size
        grid = F.affine_grid(theta[row], [1, ch, long, long], align_corners=False)
        refined = fine @ (x[row] @ fine.T)
        warped = F.grid_sample(refined, grid, mode="bilinear", align_corners=False)
        images.append(coarse @ warped @ coarse.T)
    return torch.cat(images)


def _turn(angle: PerSample) -> Float[Tensor, "b 2 2"]:
    """The rotations by some angles, in radians."""
    c, s = angle.cos(), angle.sin()
    return torch.stack([c, -s, s, c], 1).view(-1, 2, 2)


@cache
def _filters(side: int) -> tuple[Float[Tensor, "fine side"], Float[Tensor, "side coarse"]]:
    """The matrix that refines a line of pixels with its two reflections, and the one that brings the middle back."""
    h = torch.tensor(SYM6, dtype=torch.float64)
    taps = torch.arange(len(SYM6))
    pixels = torch.arange(1 - side, 2 * side - 1)[:, None]  # the image is 0 ... side - 1
    source = side - 1 - (side - 1 - pixels % max(2 * side - 2, 1)).abs()  # the pixel that a reflection repeats
    place = 2 * (pixels + side - 1) + taps - MIDDLE
    fine = torch.zeros(2 * len(pixels), side, dtype=torch.float64)
    is_inside = (place >= 0) & (place < len(fine))
    fine.index_put_(
        (place[is_inside], source.expand_as(place)[is_inside]), h.expand_as(place)[is_inside], accumulate=True
    )
    coarse = torch.zeros(side, 2 * (side + EDGE), dtype=torch.float64)
    pixels = torch.arange(side)[:, None]
    coarse[pixels, 2 * pixels + taps + EDGE - MIDDLE] = h
    return fine, coarse
