"""What all codecs share: an autoencoder, and the affine map after it that gives each channel mean 0 and deviation 1.

With shift s and scale a, both numbers or one per channel, a net learns x = (raw - s) a, and raw = x / a + s is decoded.
Where the encoder gives a Gaussian per pixel, its moments stand one after the other along the channels: the mean, which
is mapped as x is, then the standard deviation, which is multiplied by a.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from dumo.bound import CHANNELS, PIXELS
from dumo.random import keyed
from dumo.types import Spec, UserError

Images = Float[Tensor, "b 3 h w"]  # in [-1, 1]
Moments = Float[Tensor, "b m y x"]  # m channels, or 2 m: means and standard deviations
Latent = Float[Tensor, "b l y x"]

PIECE = 2**20  # pixels decoded at a time: 16 images of 256 x 256. Ours

S = TypeVar("S", bound="Scaled")
Positive = Annotated[float, Field(gt=0)]
Scale = Positive | tuple[Positive, ...]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None


class Scaled(Spec):
    """What is known of a codec before its weights are read."""

    gaussian: ClassVar[bool] = False  # whether the encoder gives a Gaussian per pixel, else a point
    channels: int = Field(ge=1, le=CHANNELS)  # of the latent
    factor: int = Field(ge=1, le=PIXELS)  # pixels along an axis for each of the latent's
    shift: float | tuple[float, ...] = 0.0  # taken from the encoder's output; one per channel, or one for all
    scale: Scale = 1.0  # then multiplies it
    weights: str = ""  # where they are; environment variables and ~ are expanded
    sha256: Digest = None  # of the weights' file; None: any

    @model_validator(mode="after")
    def _one_per_channel(self) -> "Scaled":
        for name, value in (("shift", self.shift), ("scale", self.scale)):
            if isinstance(value, tuple) and len(value) != self.channels:
                raise ValueError(f"{name} has {len(value)} numbers for {self.channels} channels: give one each, or one")
        return self

    def shape(self, side: int) -> tuple[int, int, int]:
        """The latent of square images of `side` pixels. Raises UserError where they do not divide evenly."""
        if side % self.factor:
            raise UserError(f"{side} pixels do not divide by {self.factor}, as {self.about} needs: resize the images")
        return self.channels, side // self.factor, side // self.factor

    def sample(self, moments: Moments, *key: int | str, rows: Sequence[int]) -> Latent:
        """One draw per row of Gaussians, by the key and the row's number; what is no Gaussian comes back as it is."""
        if moments.shape[1] == self.channels:
            return moments
        mean, deviation = moments.split(self.channels, 1)
        return mean + deviation * keyed(*key, rows=rows, shape=mean.shape[1:]).to(mean)

    def normalise(self, raw: Moments) -> Moments:
        """What the encoder gave, as a net learns it."""
        mean, *deviation = raw.split(self.channels, 1)
        shift, scale = self._columns(raw)
        return torch.cat([(mean - shift) * scale, *(d * scale for d in deviation)], 1)

    def restore(self, x: Moments) -> Moments:
        """The inverse of `normalise`."""
        mean, *deviation = x.split(self.channels, 1)
        shift, scale = self._columns(x)
        return torch.cat([mean / scale + shift, *(d / scale for d in deviation)], 1)

    def normalised(self: S, mean: tuple[float, ...], std: tuple[float, ...]) -> S:
        """The codec whose x has mean 0 and deviation 1 in each channel, given those of this one's, per channel.

        Raises UserError for a channel that never changes.
        """
        if 0 in std:
            raise UserError(f"channel {std.index(0)} never changes, so no scale gives it deviation 1: use one for all")
        shifts, scales = (column.flatten() for column in self._columns(torch.zeros((), dtype=torch.float64)))
        change = {
            "shift": shifts + torch.tensor(mean, dtype=torch.float64) / scales,
            "scale": scales / torch.tensor(std, dtype=torch.float64),
        }
        return self.model_validate(self.model_dump() | {name: tuple(v.tolist()) for name, v in change.items()})

    @property
    def about(self) -> str:
        """The codec in a few words, for messages."""
        return f"codec {getattr(self, 'kind', '')}"

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, (channels, 1, 1), of the dtype and on the device of a tensor."""
        both = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in (self.shift, self.scale))
        shift, scale = (v.expand(self.channels)[:, None, None] for v in both)
        return shift, scale


@runtime_checkable
class Autoencoder(Protocol):
    """An encoder and a decoder, on one device, in float32."""

    def encode(self, images: Images) -> Moments:
        """The latent, or the means and standard deviations of its Gaussians, before any normalisation."""
        ...

    def decode(self, raw: Latent) -> Images:
        """Images, about in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Opened:
    """A codec with its weights, ready to work. Records no gradient."""

    codec: Scaled
    net: Autoencoder
    sha256: str | None  # of the weights' file; None where there is none
    device: torch.device

    @torch.no_grad()
    def encode(self, images: Images) -> Moments:
        """Images in [-1, 1] as x, or as the moments of x, of mean 0 and deviation 1 or near; contiguous.

        Raises as `shape` does.
        """
        for side in images.shape[2:]:
            self.codec.shape(side)
        return self.codec.normalise(self.net.encode(images.to(self.device, torch.float32))).contiguous()

    def sample(self, moments: Moments, *key: int | str, rows: Sequence[int]) -> Latent:
        """As the codec's `sample`."""
        return self.codec.sample(moments, *key, rows=rows)

    @torch.no_grad()
    def decode(self, x: Latent) -> Images:
        """Images in [-1, 1], what overshoots is cut off; a few at a time, whatever the memory."""
        few = max(1, PIECE // (self.codec.factor**2 * x.shape[2] * x.shape[3]))
        parts = (self.net.decode(self.codec.restore(part.to(self.device, torch.float32))) for part in x.split(few))
        return torch.cat([part.clamp(-1, 1) for part in parts])

    def shape(self, side: int) -> tuple[int, int, int]:
        """As the codec's `shape`."""
        return self.codec.shape(side)
