"""What all codecs share: an autoencoder, and the affine map after it that brings a latent near mean 0 and deviation 1.

With shift s and scale a, both numbers or one per channel, a net learns x = (raw - s) a, and raw = x / a + s is decoded.
Where the encoder gives a Gaussian per pixel, its moments stand one after the other along the channels: the mean, which
is mapped as x is, then the standard deviation, which is multiplied by a.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from dumo.io import digest
from dumo.io.read import user_path
from dumo.runtime.random import keyed
from dumo.types import MAYBE_PLACE, PINNED, Spec, UserError

Images = Float[Tensor, "b 3 h w"]  # in [-1, 1]
Moments = Float[Tensor, "b m y x"]  # m channels, or 2 m: means and standard deviations
Latent = Float[Tensor, "b l y x"]

WEIGHTS = "diffusion_pytorch_model.safetensors"  # in a folder of diffusers
FIELD = "data.codec.weights"
PIECE = 2**20  # pixels at a time: 16 images of 256 x 256. Ours


class Published(NamedTuple):
    """What an autoencoder was published with."""

    weights: str  # where they are
    channels: int  # of the latent
    factor: int  # pixels along an axis for each of the latent's
    scale: float | tuple[float, ...]  # multiplies the encoder's output, less the shift
    shift: float | tuple[float, ...] = 0.0  # both one per channel, or one for all


class Scaled(Spec):
    """A published autoencoder, before its weights are read."""

    gaussian: ClassVar[bool] = False  # whether the encoder gives a Gaussian per pixel, else a point
    variants: ClassVar[Mapping[str, Published]]  # the first by default; of "" where there is one alone
    # Where they are: as published, if not given; environment variables and ~ are expanded.
    weights: str = Field(default="", json_schema_extra=MAYBE_PLACE)
    # Of the weights: found when a run begins, so that it decodes by these alone.
    sha256: str | None = Field(default=None, exclude_if=lambda sha256: sha256 is None, json_schema_extra=PINNED)

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, given: Any) -> Any:  # noqa: ANN401, whatever was given is checked after this
        if not isinstance(given, dict):
            return given
        found = cls.variants.get(str(given.get("variant", next(iter(cls.variants), ""))))
        return {"weights": found.weights} | given if found else given

    @property
    def published(self) -> Published:
        """The variant."""
        return self.variants[getattr(self, "variant", "")]

    @property
    def channels(self) -> int:
        """Of the latent."""
        return self.published.channels

    @property
    def factor(self) -> int:
        """Pixels along an axis for each of the latent's."""
        return self.published.factor

    def digest(self) -> str | None:
        """The SHA-256 of the weights, where they lie on this machine at the path that is set; else None."""
        try:
            place = user_path(self.weights, FIELD)
        except UserError:
            return None
        file = place / WEIGHTS if place.is_dir() else place
        return digest.of_file(file) if file.is_file() else None

    def require(self, found: str) -> None:
        """Raise UserError for weights of another SHA-256 than those that the run began with."""
        if self.sha256 not in (None, found):
            raise UserError(
                f"{FIELD}: {self.weights} has SHA-256 {found}, and this run has {self.sha256}: put those weights back, "
                f"or say where they are with --set {FIELD}=..."
            )

    def facts(self) -> dict[str, Any]:
        """What it does, wherever its weights lie."""
        return self.model_dump(exclude={"weights", "sha256"})

    def shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """The latent of images of these pixels; squares, if no width is given.

        Raises UserError where they do not divide evenly.
        """
        sides = height, height if width is None else width
        for side in sides:
            if side % self.factor:
                raise UserError(
                    f"{side} pixels do not divide by {self.factor}, as {self.about} needs: resize the images"
                )
        return self.channels, sides[0] // self.factor, sides[1] // self.factor

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

    @property
    def about(self) -> str:
        """The codec in a few words, for messages."""
        return " ".join(filter(None, ("codec", getattr(self, "kind", ""), getattr(self, "variant", ""))))

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, (channels, 1, 1), of the dtype and on the device of a tensor."""
        numbers = self.published.shift, self.published.scale
        both = (torch.tensor(v, dtype=like.dtype, device=like.device) for v in numbers)
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
    sha256: str  # of the weights' file
    device: torch.device

    @torch.no_grad()
    def encode(self, images: Images) -> Moments:
        """Images in [-1, 1] as x, or as the moments of x, of mean 0 and deviation 1 or near. Raises as `shape` does."""
        self.codec.shape(*images.shape[2:])
        few = max(1, PIECE // (images.shape[2] * images.shape[3]))
        parts = (self.net.encode(part.to(self.device, torch.float32)) for part in images.split(few))
        return torch.cat([self.codec.normalise(part).contiguous() for part in parts])

    @torch.no_grad()
    def decode(self, x: Latent) -> Images:
        """Images in [-1, 1], what overshoots is cut off; a few at a time, whatever the memory."""
        few = max(1, PIECE // (self.codec.factor**2 * x.shape[2] * x.shape[3]))
        parts = (self.net.decode(self.codec.restore(part.to(self.device, torch.float32))) for part in x.split(few))
        return torch.cat([part.clamp(-1, 1) for part in parts])

    def shape(self, side: int) -> tuple[int, int, int]:
        """As the codec's `shape`."""
        return self.codec.shape(side)
