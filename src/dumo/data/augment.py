"""EDM's augmentation, which does not leak into samples: the net reads what was done to each image as its condition.

`Edm` is the spec. `Edm.draw` draws the changes of a batch of images, and calling `Edm` makes them. Each transformation
is made with its own probability (Karras et al. 2022, EDM, App. F.2 and Tab. 6). A row of numbers, EDM's "augment
labels", says which were made and how far. All zeros is an unchanged image: the condition of samples.

Calling `Edm` flips images first, then warps those that are scaled, rotated, stretched or shifted (`warp`).

**Geometry** (Karras et al. 2020, ADA, App. B). With positions in pixels from the middle of the image, the pixel at o is
looked up at A (o - shift), where (`lookup_matrix`)

    A = turn(angle) turn(-axis) diag(1 / k, k) turn(axis) / size

**Interpolation.** `warp` looks positions between pixels up on a grid twice as fine. A wavelet's low-pass filter h makes
this grid of the image; mirrored, it brings the result back to pixels. The filter is orthogonal to its own even shifts,
sum_i h[i] h[i + 2j] = (j = 0), so a shift by whole pixels changes no pixel. Beyond its edges an image continues as its
reflection, once; further out it is grey. Both steps are linear in rows and in columns, so each is two products with a
matrix (`_filter_matrices`).
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
_CENTER_TAP = 5  # index in the filter of the pixel itself
_MARGIN = len(SYM6) // 2  # fine positions beyond the image on each side that the filter reaches on its way back

# All from EDM
_PROBABILITY = 0.12  # that a transformation is made on an image
SIZE_SD = 0.2  # standard deviation of log2 of the size
STRETCH_SD = 0.2  # standard deviation of log2 of k
_OBLIQUE_SHARE = 0.5  # of the stretches, along another axis than the image's own
SHIFT_SD = 0.125  # standard deviation of the shift, in sides of the image

Name = Literal["xflip", "yflip", "scale", "rotate", "aniso", "translate"]
# Numbers among the augment labels, by transformation, in this order
_LABEL_DIMS: dict[Name, int] = {"xflip": 1, "yflip": 1, "scale": 1, "rotate": 2, "aniso": 2, "translate": 2}


@dataclass(frozen=True)
class Augmentation:
    """The changes of b images. They are drawn for a whole batch, of which a caller then takes its rows."""

    flipped: Bool[Tensor, "b 2"]  # left with right, top with bottom
    is_warped: Rows  # whether A or the shift changes the image
    a: Float[Tensor, "b 2 2"]  # A of the formula above
    shift: Float[Tensor, "b 2"]  # right and down, in sides of the image
    augment_labels: Float[Tensor, "b n"]  # the net's condition

    def __getitem__(self, rows: slice) -> "Augmentation":
        """The changes of some of the images."""
        return Augmentation(
            self.flipped[rows], self.is_warped[rows], self.a[rows], self.shift[rows], self.augment_labels[rows]
        )


class Edm(Spec):
    """EDM's augmentation for CIFAR-10; MeanFlow turns off `yflip` and `rotate`."""

    kind: Literal["edm"] = "edm"
    yflip: bool = True  # top and bottom, half as often as the others
    rotate: bool = True  # by any angle

    @property
    def probabilities(self) -> dict[Name, float]:
        """The probability of each transformation, without those that are turned off."""
        probabilities: dict[Name, float] = {
            "xflip": 0.5,  # left and right
            "yflip": 0.5 * _PROBABILITY,
            "scale": _PROBABILITY,
            "rotate": _PROBABILITY,
            "aniso": _PROBABILITY,  # longer along one axis, shorter across
            "translate": _PROBABILITY,
        }
        return {name: probability for name, probability in probabilities.items() if getattr(self, name, True)}

    @property
    def augment_dim(self) -> int:
        """How many augment labels an image has."""
        return sum(_LABEL_DIMS[name] for name in self.probabilities)

    def draw(self, n: int, g: Generator) -> Augmentation:
        """Draw the changes of n images."""
        return draw_changes(self.probabilities, n, g)

    def __call__(self, x: Sample, change: Augmentation) -> Sample:
        """Change images (b, channels, side, side). The result of an image does not depend on the others."""
        left_right, top_bottom = change.flipped.T
        x = torch.where(lift(left_right, x), x.flip(-1), x)
        x = torch.where(lift(top_bottom, x), x.flip(-2), x)
        warped_rows = change.is_warped.nonzero().flatten()
        if not len(warped_rows):
            return x
        warped = warp(x[warped_rows], change.a[warped_rows], change.shift[warped_rows])
        return x.index_copy(0, warped_rows, warped)


def draw_changes(probabilities: Mapping[Name, float], n: int, g: Generator) -> Augmentation:
    """Draw the changes of n images; a transformation that has no probability is not made, and has no labels.

    The draws do not depend on which transformations are made.
    """
    # whether each transformation is made, and how far
    p = torch.tensor([probabilities.get(name, 0.0) for name in _LABEL_DIMS])
    is_made = torch.rand(len(_LABEL_DIMS), n, generator=g) < p[:, None]
    xflip, yflip, scale, rotate, aniso, translate = is_made.float()
    size, stretch, *shift = torch.randn(4, n, generator=g)
    angle, axis = pi * (2 * torch.rand(2, n, generator=g) - 1)
    size = scale * size
    angle = rotate * angle
    stretch = aniso * stretch
    axis = axis * (torch.rand(n, generator=g) < _OBLIQUE_SHARE)
    right, down = (translate * s for s in shift)

    # the labels that say so, in units of the standard deviations
    labels_by_name: dict[Name, tuple[PerSample, ...]] = {
        "xflip": (xflip,),
        "yflip": (yflip,),
        "scale": (size,),
        "rotate": (angle.cos() - 1, angle.sin()),
        "aniso": (stretch * axis.cos(), stretch * axis.sin()),
        "translate": (right, down),
    }
    labels: list[PerSample] = []
    for name, labels_of_name in labels_by_name.items():
        if name in probabilities:
            labels += labels_of_name
    return Augmentation(
        flipped=is_made[:2].T,
        is_warped=is_made[2:].any(0),
        a=lookup_matrix((SIZE_SD * size).exp2(), angle, (STRETCH_SD * stretch).exp2(), axis),
        shift=SHIFT_SD * torch.stack([right, down], 1),
        augment_labels=torch.stack(labels, 1),
    )


def lookup_matrix(size: PerSample, angle: PerSample, k: PerSample, axis: PerSample) -> Float[Tensor, "b 2 2"]:
    """The matrix A: an image `size` times as large, rotated by `angle`, and stretched by k along `axis`, in radians."""
    stretch = torch.diag_embed(torch.stack([1 / k, k], 1))
    return _rotation(angle - axis) @ stretch @ _rotation(axis) / size[:, None, None]


def warp(x: Sample, a: Float[Tensor, "b 2 2"], shift: Float[Tensor, "b 2"]) -> Sample:
    """Look each pixel o, (right, down) from the middle, up at A (o - shift); the shift is in sides of the image."""
    b, channels, side, _ = x.shape
    refine, restore = (m.to(x) for m in _filter_matrices(side))
    half_fine_side = len(refine) / 2  # of the fine grid of the image and its reflections
    result_side = restore.shape[1]  # of the fine grid of the result
    a = a.to(x)
    shift = side * shift.to(x)
    # `affine_grid` takes A and the start in halves of a grid. On a fine grid a pixel stands half a position before the
    # middle of its two: at 2 o - 1/2 from the middle of all.
    start = (a * (0.5 - 2 * shift)[:, None]).sum(2, keepdim=True) - 0.5
    theta = torch.cat([a * result_side / 2, start], 2) / half_fine_side
    images: list[Tensor] = []
    for row in torch.arange(b).split(1):  # the last bits of a batched product may depend on its size
        grid = F.affine_grid(theta[row], [1, channels, result_side, result_side], align_corners=False)
        refined = refine @ (x[row] @ refine.T)
        warped = F.grid_sample(refined, grid, mode="bilinear", align_corners=False)
        images.append(restore @ warped @ restore.T)
    return torch.cat(images)


def _rotation(angle: PerSample) -> Float[Tensor, "b 2 2"]:
    """The rotations by some angles, in radians."""
    cos = angle.cos()
    sin = angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


@cache
def _filter_matrices(side: int) -> tuple[Float[Tensor, "fine side"], Float[Tensor, "side coarse"]]:
    """The matrix that refines a line of pixels with its two reflections, and the one that restores the middle pixels.

    The first has two rows for each of the 3 side - 2 pixels. The second takes the fine positions of the image itself,
    and _MARGIN more on each side.
    """
    h = torch.tensor(SYM6, dtype=torch.float64)
    taps = torch.arange(len(SYM6))

    # refine: each pixel, reflected or not, adds the filter around its own fine position
    pixels = torch.arange(1 - side, 2 * side - 1)[:, None]  # the image is 0 ... side - 1
    source_pixel = side - 1 - (side - 1 - pixels % max(2 * side - 2, 1)).abs()  # of which a reflection is a copy
    fine_position = 2 * (pixels + side - 1) + taps - _CENTER_TAP
    refine = torch.zeros(2 * len(pixels), side, dtype=torch.float64)
    is_inside = (fine_position >= 0) & (fine_position < len(refine))
    refine.index_put_(
        (fine_position[is_inside], source_pixel.expand_as(fine_position)[is_inside]),
        h.expand_as(fine_position)[is_inside],
        accumulate=True,
    )

    # restore: a pixel is the filter's mean of the fine positions around its own
    restore = torch.zeros(side, 2 * (side + _MARGIN), dtype=torch.float64)
    pixels = torch.arange(side)[:, None]
    restore[pixels, 2 * pixels + taps + _MARGIN - _CENTER_TAP] = h
    return refine, restore
