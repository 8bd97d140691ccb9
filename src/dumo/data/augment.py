"""EDM's non-leaking augmentation: the network is conditioned on the transformations of each image.

`Edm` is the spec. `Edm.draw` draws the transformations of a batch, and calling `Edm` applies them. Each transformation
has its own probability (Karras et al. 2022, EDM, App. F.2 and Tab. 6). Its parameters are EDM's "augment labels", a row
of numbers per image. All zeros is an unchanged image, the condition for sampling.

Images are flipped first, then scaled, rotated, stretched or shifted by `warp`.

**Geometry** (Karras et al. 2020, ADA, App. B). With positions in pixels from the middle of the image, the pixel at o is
looked up at A (o - shift), where (`lookup_matrix`)

    A = turn(angle) turn(-axis) diag(1 / k, k) turn(axis) / size

**Interpolation.** `warp` interpolates on a grid with twice the resolution. A wavelet's low-pass filter h upsamples the
image to this grid, and the mirrored filter downsamples the result. The filter is orthogonal to its even shifts,
sum_i h[i] h[i + 2j] = (j = 0), so a shift by whole pixels is exact. Images are extended by one reflection at each edge,
and by grey beyond. Both steps are linear in rows and in columns, so each is two matrix products (`_filter_matrices`).
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
# The index of the filter tap at the pixel itself.
_CENTER_TAP = 5
# The number of fine positions beyond each edge that the downsampling filter needs.
_MARGIN = len(SYM6) // 2

# Constants of EDM: the probability of a transformation, the standard deviations of log2 size, log2 k, and the shift in
# image sides, and the share of stretches along an oblique axis.
_PROBABILITY = 0.12
SIZE_SD = 0.2
STRETCH_SD = 0.2
_OBLIQUE_SHARE = 0.5
SHIFT_SD = 0.125

Name = Literal["xflip", "yflip", "scale", "rotate", "aniso", "translate"]
# The number of augment labels per transformation, in their order.
_LABEL_DIMS: dict[Name, int] = {"xflip": 1, "yflip": 1, "scale": 1, "rotate": 2, "aniso": 2, "translate": 2}


@dataclass(frozen=True)
class Augmentation:
    """The transformations of b images, drawn for a whole batch.

    flipped: horizontally, vertically.
    is_warped: whether A or the shift changes the image.
    a: A of the formula above.
    shift: right and down, in sides of the image.
    augment_labels: the network's condition.
    """

    flipped: Bool[Tensor, "b 2"]
    is_warped: Rows
    a: Float[Tensor, "b 2 2"]
    shift: Float[Tensor, "b 2"]
    augment_labels: Float[Tensor, "b n"]

    def __getitem__(self, rows: slice) -> "Augmentation":
        """Return the transformations of these rows."""
        return Augmentation(
            self.flipped[rows], self.is_warped[rows], self.a[rows], self.shift[rows], self.augment_labels[rows]
        )


class Edm(Spec):
    """EDM's augmentation for CIFAR-10. MeanFlow disables `yflip` and `rotate`."""

    kind: Literal["edm"] = "edm"
    # Vertical flips, with half the probability of the remaining transformations.
    yflip: bool = True
    # Rotations by any angle.
    rotate: bool = True

    @property
    def probabilities(self) -> dict[Name, float]:
        """The probabilities of all enabled transformations."""
        probabilities: dict[Name, float] = {
            "xflip": 0.5,
            "yflip": 0.5 * _PROBABILITY,
            "scale": _PROBABILITY,
            "rotate": _PROBABILITY,
            "aniso": _PROBABILITY,
            "translate": _PROBABILITY,
        }
        return {name: probability for name, probability in probabilities.items() if getattr(self, name, True)}

    @property
    def augment_dim(self) -> int:
        """The number of augment labels."""
        return sum(_LABEL_DIMS[name] for name in self.probabilities)

    def draw(self, n: int, g: Generator) -> Augmentation:
        """Draw the transformations of n images."""
        return draw_transformations(self.probabilities, n, g)

    def __call__(self, x: Sample, augmentation: Augmentation) -> Sample:
        """Transform images (b, channels, side, side). The result of an image does not depend on its batch."""
        left_right, top_bottom = augmentation.flipped.T
        x = torch.where(lift(left_right, x), x.flip(-1), x)
        x = torch.where(lift(top_bottom, x), x.flip(-2), x)
        warped_rows = augmentation.is_warped.nonzero().flatten()
        if not len(warped_rows):
            return x
        warped = warp(x[warped_rows], augmentation.a[warped_rows], augmentation.shift[warped_rows])
        return x.index_copy(0, warped_rows, warped)


def draw_transformations(probabilities: Mapping[Name, float], n: int, g: Generator) -> Augmentation:
    """Draw the transformations of n images. Transformations without a probability are disabled and have no labels.

    Disabling transformations does not change the draws of the remaining ones.
    """
    # Draw which transformations are applied, and their parameters.
    p = torch.tensor([probabilities.get(name, 0.0) for name in _LABEL_DIMS])
    is_applied = torch.rand(len(_LABEL_DIMS), n, generator=g) < p[:, None]
    xflip, yflip, scale, rotate, aniso, translate = is_applied.float()
    size, stretch, *shift = torch.randn(4, n, generator=g)
    angle, axis = pi * (2 * torch.rand(2, n, generator=g) - 1)
    size = scale * size
    angle = rotate * angle
    stretch = aniso * stretch
    axis = axis * (torch.rand(n, generator=g) < _OBLIQUE_SHARE)
    right, down = (translate * s for s in shift)

    # Compute the augment labels, in units of the standard deviations.
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
        flipped=is_applied[:2].T,
        is_warped=is_applied[2:].any(0),
        a=lookup_matrix((SIZE_SD * size).exp2(), angle, (STRETCH_SD * stretch).exp2(), axis),
        shift=SHIFT_SD * torch.stack([right, down], 1),
        augment_labels=torch.stack(labels, 1),
    )


def lookup_matrix(size: PerSample, angle: PerSample, k: PerSample, axis: PerSample) -> Float[Tensor, "b 2 2"]:
    """Compute A for images scaled by `size`, rotated by `angle`, and stretched by k along `axis` (in radians)."""
    stretch = torch.diag_embed(torch.stack([1 / k, k], 1))
    return _rotation(angle - axis) @ stretch @ _rotation(axis) / size[:, None, None]


def warp(x: Sample, a: Float[Tensor, "b 2 2"], shift: Float[Tensor, "b 2"]) -> Sample:
    """Look up each pixel o, (right, down) from the middle, at A (o - shift); the shift is in sides of the image."""
    b, channels, side, _ = x.shape
    upsample, downsample = (m.to(x) for m in _filter_matrices(side))
    # The fine grids of the reflected image and of the result have different sizes.
    half_fine_side = len(upsample) / 2
    result_side = downsample.shape[1]
    a = a.to(x)
    shift = side * shift.to(x)
    # `affine_grid` takes A and the start in units of half a grid. On the fine grid, a pixel is half a position before
    # the middle of its two positions: at 2 o - 1/2 from the middle of the grid.
    start = (a * (0.5 - 2 * shift)[:, None]).sum(2, keepdim=True) - 0.5
    theta = torch.cat([a * result_side / 2, start], 2) / half_fine_side
    images: list[Tensor] = []
    # Warp images one by one, since the last bits of a batched product may depend on the batch size.
    for row in torch.arange(b).split(1):
        grid = F.affine_grid(theta[row], [1, channels, result_side, result_side], align_corners=False)
        upsampled = upsample @ (x[row] @ upsample.T)
        warped = F.grid_sample(upsampled, grid, mode="bilinear", align_corners=False)
        images.append(downsample @ warped @ downsample.T)
    return torch.cat(images)


def _rotation(angle: PerSample) -> Float[Tensor, "b 2 2"]:
    """Return the rotation matrices of angles in radians."""
    cos = angle.cos()
    sin = angle.sin()
    return torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)


@cache
def _filter_matrices(side: int) -> tuple[Float[Tensor, "fine side"], Float[Tensor, "side coarse"]]:
    """Return the matrix that reflects and upsamples a line of pixels, and the matrix that downsamples the result.

    The first has two rows for each of the 3 side - 2 pixels of the reflected line. The second takes the fine positions
    of the line and _MARGIN more on each side.
    """
    h = torch.tensor(SYM6, dtype=torch.float64)
    taps = torch.arange(len(SYM6))

    # Upsample: each pixel, including reflections, adds the filter around its fine position. The line itself has the
    # pixels 0 ... side - 1.
    pixels = torch.arange(1 - side, 2 * side - 1)[:, None]
    source_pixel = side - 1 - (side - 1 - pixels % max(2 * side - 2, 1)).abs()
    fine_position = 2 * (pixels + side - 1) + taps - _CENTER_TAP
    upsample = torch.zeros(2 * len(pixels), side, dtype=torch.float64)
    is_inside = (fine_position >= 0) & (fine_position < len(upsample))
    upsample.index_put_(
        (fine_position[is_inside], source_pixel.expand_as(fine_position)[is_inside]),
        h.expand_as(fine_position)[is_inside],
        accumulate=True,
    )

    # Downsample: each pixel is the filtered mean of the fine positions around it.
    downsample = torch.zeros(side, 2 * (side + _MARGIN), dtype=torch.float64)
    pixels = torch.arange(side)[:, None]
    downsample[pixels, 2 * pixels + taps + _MARGIN - _CENTER_TAP] = h
    return upsample, downsample
