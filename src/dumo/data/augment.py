"""Augmentation that does not leak into the samples: the net is told, in numbers, what was done to each image.

Karras et al. 2022 (EDM), App. F.2 and Tab. 6: each of some transformations is made with probability p, and a row of
numbers, the net's condition, says which and how far. All zero is an image as it is, and is what samples are made with.

The geometry is that of Karras et al. 2020 (ADA), App. B. With positions in pixels from the middle of the image, what
stands at o afterwards stood at A (o - shift) before,

    A = turn(angle) turn(-axis) diag(1 / k, k) turn(axis) / size.

A place between pixels is looked up on a grid twice as fine, which a wavelet's low-pass filter h makes of the image and,
mirrored, brings back. The filter is orthogonal to its own even shifts, sum_i h[i] h[i + 2j] = (j = 0): so a move by
whole pixels changes no pixel. Beyond its edges an image goes on as its own reflection, once; further out it is grey.
Refining and bringing back are linear in rows and in columns, so each is two products with a matrix.
"""

from dataclasses import dataclass
from functools import cache
from math import pi
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
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
MIDDLE = 5  # of the filter: the place, counted from 0, that is meant by a pixel's own
EDGE = len(SYM6) // 2  # fine places beyond the image on each side, that the filter reaches on its way back

SIZE, STRETCH = 0.2, 0.2  # sd of log2 of scales
OBLIQUE = 0.5  # share of the stretches along another axis than the image's own
SHIFT = 0.125  # sd, in sides of the image

Names = Literal["xflip", "yflip", "scale", "rotate", "aniso", "translate"]
NUMBERS: dict[Names, int] = {"xflip": 1, "yflip": 1, "scale": 1, "rotate": 2, "aniso": 2, "translate": 2}


@dataclass(frozen=True)
class Change:
    """What is to be done to images, a row each: drawn for a whole batch, of which a caller takes its rows."""

    flipped: Bool[Tensor, "b 2"]  # left and right, top and bottom
    moved: Rows  # which are looked up at other places, by what follows
    a: Float[Tensor, "b 2 2"]  # A of the formula above
    shift: Float[Tensor, "b 2"]  # right and down, in sides
    told: Float[Tensor, "b n"]  # the numbers that the net is given

    def __getitem__(self, rows: slice) -> "Change":
        """Some of the rows."""
        return Change(self.flipped[rows], self.moved[rows], self.a[rows], self.shift[rows], self.told[rows])


class Edm(Spec):
    """EDM's augmentation for CIFAR-10, as it is; MeanFlow turns off `yflip` and `rotate`."""

    kind: Literal["edm"] = "edm"
    p: float = Field(default=0.12, ge=0, le=1)  # of each transformation
    xflip: bool = True  # left and right, of half the images whatever p is; at p = 0 none
    yflip: bool = True  # top and bottom, half as often as the others
    scale: bool = True
    rotate: bool = True  # by any angle
    aniso: bool = True  # longer along one axis, shorter across
    translate: bool = True

    @property
    def numbers(self) -> int:
        """How many numbers describe an image."""
        return sum(n for name, n in NUMBERS.items() if getattr(self, name))

    def drawn(self, n: int, g: Generator) -> Change:
        """Draw what is to be done to n images; as much is drawn whatever is turned off."""
        made = torch.rand(len(NUMBERS), n, generator=g) < torch.tensor(self._shares())[:, None]
        xflip, yflip, scale, rotate, aniso, translate = made.float()
        size, stretch, *shift = torch.randn(4, n, generator=g)
        angle, axis = pi * (2 * torch.rand(2, n, generator=g) - 1)
        size, angle, stretch = scale * size, rotate * angle, aniso * stretch
        axis = axis * (torch.rand(n, generator=g) < OBLIQUE)
        right, down = (translate * s for s in shift)
        done: dict[Names, tuple[PerSample, ...]] = {
            "xflip": (xflip,),
            "yflip": (yflip,),
            "scale": (size,),
            "rotate": (angle.cos() - 1, angle.sin()),
            "aniso": (stretch * axis.cos(), stretch * axis.sin()),
            "translate": (right, down),
        }
        a = matrix((SIZE * size).exp2(), angle, (STRETCH * stretch).exp2(), axis)
        told = [number for name, numbers in done.items() if getattr(self, name) for number in numbers]
        shift = SHIFT * torch.stack([right, down], 1)
        return Change(made[:2].T, made[2:].any(0), a, shift, torch.stack(told, 1))

    def __call__(self, x: Sample, change: Change) -> Sample:
        """Images (b, channels, side, side) transformed. One is the same whatever others are there."""
        left, top = change.flipped.T
        x = torch.where(lift(left, x), x.flip(-1), x)
        x = torch.where(lift(top, x), x.flip(-2), x)
        rows = change.moved.nonzero().flatten()
        return x.index_copy(0, rows, warp(x[rows], change.a[rows], change.shift[rows])) if len(rows) else x

    def _shares(self) -> list[float]:
        """Of the rows, that each transformation is made on."""
        shares = (0.5 * (self.p > 0), 0.5 * self.p, self.p, self.p, self.p, self.p)
        return [share * getattr(self, name) for name, share in zip(NUMBERS, shares, strict=True)]


def matrix(size: PerSample, angle: PerSample, k: PerSample, axis: PerSample) -> Float[Tensor, "b 2 2"]:
    """A of the formula above: a scale, an angle, a stretch by k and the axis that it is along, in radians."""
    stretch = torch.diag_embed(torch.stack([1 / k, k], 1))
    return _turn(angle - axis) @ stretch @ _turn(axis) / size[:, None, None]


def warp(x: Sample, a: Float[Tensor, "b 2 2"], shift: Float[Tensor, "b 2"]) -> Sample:
    """Look each pixel o, (right, down) from the middle, up at A (o - shift); the shift counts in sides."""
    b, ch, side, _ = x.shape
    fine, coarse = (m.to(x) for m in _filters(side))
    half, long = len(fine) / 2, coarse.shape[1]  # of the fine grids of the image and its reflections, of the result
    a, shift = a.to(x), side * shift.to(x)
    # On a fine grid a pixel stands half a place before the middle of its two: at 2 o - 1/2 from the middle of all.
    start = (a * (0.5 - 2 * shift)[:, None]).sum(2, keepdim=True) - 0.5
    theta = torch.cat([a * long / 2, start], 2) / half  # in halves of a grid, as torch counts
    made: list[Tensor] = []
    for row in torch.arange(b).split(1):  # the last bits of a product of more may depend on how many
        grid = F.affine_grid(theta[row], [1, ch, long, long], align_corners=False)
        found = F.grid_sample(fine @ (x[row] @ fine.T), grid, mode="bilinear", align_corners=False)
        made.append(coarse @ found @ coarse.T)
    return torch.cat(made)


def _turn(angle: PerSample) -> Float[Tensor, "b 2 2"]:
    c, s = angle.cos(), angle.sin()
    return torch.stack([c, -s, s, c], 1).view(-1, 2, 2)


@cache
def _filters(side: int) -> tuple[Float[Tensor, "fine side"], Float[Tensor, "side coarse"]]:
    """The matrix that refines a line of pixels with its two reflections, and the one that brings the middle back."""
    h, taps = torch.tensor(SYM6, dtype=torch.float64), torch.arange(len(SYM6))
    pixels = torch.arange(1 - side, 2 * side - 1)[:, None]  # the image is 0 ... side - 1
    source = side - 1 - (side - 1 - pixels % max(2 * side - 2, 1)).abs()  # where reflections have it from
    place = 2 * (pixels + side - 1) + taps - MIDDLE
    fine = torch.zeros(2 * len(pixels), side, dtype=torch.float64)
    there = (place >= 0) & (place < len(fine))
    fine.index_put_((place[there], source.expand_as(place)[there]), h.expand_as(place)[there], accumulate=True)
    coarse = torch.zeros(side, 2 * (side + EDGE), dtype=torch.float64)
    pixels = torch.arange(side)[:, None]
    coarse[pixels, 2 * pixels + taps + EDGE - MIDDLE] = h
    return fine, coarse
