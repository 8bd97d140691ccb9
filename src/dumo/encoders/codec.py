"""The base class of codecs. A codec is a published autoencoder, followed by an affine normalisation of its latents.

Normalised latents have about mean 0 and standard deviation 1. With shift s and scale a, one number each or one per
channel, a net learns x = (raw - s) a, and raw = x / a + s is decoded. Some encoders return a Gaussian per pixel: means
and standard deviations, concatenated along the channels. Means are mapped as x is, and standard deviations are
multiplied by a.

- `CodecSpec` is the spec, with the shapes and the normalisation. It reads no weights. Its subclasses in
  `dumo.encoders.autoencoder` and `dumo.encoders.taesd` implement `open`.
- `open` loads the weights and returns a `LoadedCodec`, which encodes images and decodes latents.
- `PublishedCodec` has the shape, shift and scale of a published autoencoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from dumo.encoders.part import DIFFUSERS, find_weights
from dumo.io import digest
from dumo.io.read import user_path
from dumo.runtime.random import keyed_normal
from dumo.types import HUB_MODEL, MAYBE_PLACE, PINNED, Spec, UserError

Images = Float[Tensor, "b 3 h w"]  # in [-1, 1]
Moments = Float[Tensor, "b m y x"]  # m channels, or 2 m: means and standard deviations
Latent = Float[Tensor, "b l y x"]

FIELD = "data.codec.weights"  # the field of run.yaml, for messages
PIXELS_AT_ONCE = 2**20  # per batch: 16 images of 256 x 256 (our choice)


def images_at_once(height: int, width: int) -> int:
    """Return the batch size of an autoencoder for images of this size."""
    return max(1, PIXELS_AT_ONCE // (height * width))


class PublishedCodec(NamedTuple):
    """The weights, shape, shift and scale of a published autoencoder."""

    weights: str  # a file, a folder, or a repository on the Hugging Face Hub
    channels: int  # of a latent
    factor: int  # the downsampling factor
    # x = (raw - shift) scale, where raw is the encoder's output; one number each, or one per channel.
    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...] = 0.0


class CodecSpec(Spec):
    """A published autoencoder, before its weights are loaded. Its latents have about zero mean and unit variance."""

    is_gaussian: ClassVar[bool] = False  # whether the encoder returns a Gaussian per pixel, not a latent
    variants: ClassVar[Mapping[str, PublishedCodec]]  # by name, the default first; a codec without variants has ""
    # Where the weights are, by default as published; environment variables and ~ are expanded.
    weights: str = Field(default="", json_schema_extra=MAYBE_PLACE | HUB_MODEL)
    # The SHA-256 of the weights, written when a run begins. From then on the run refuses other weights.
    sha256: str | None = Field(default=None, exclude_if=lambda sha256: sha256 is None, json_schema_extra=PINNED)

    @model_validator(mode="before")
    @classmethod
    def _add_published_weights(cls, fields: Any) -> Any:  # noqa: ANN401, of any type: pydantic checks it after this
        """Add the path of the published weights if the fields have none."""
        if not isinstance(fields, dict):
            return fields
        default_variant = next(iter(cls.variants), "")
        published = cls.variants.get(str(fields.get("variant", default_variant)))
        if published is None:
            return fields
        return {"weights": published.weights} | fields

    @property
    def published(self) -> PublishedCodec:
        """The published weights, shape, shift and scale of the chosen variant."""
        return self.variants[getattr(self, "variant", "")]

    @property
    def channels(self) -> int:
        """The number of latent channels."""
        return self.published.channels

    @property
    def factor(self) -> int:
        """The downsampling factor."""
        return self.published.factor

    def digest(self) -> str | None:
        """Return the SHA-256 of the weights, or None if they are missing."""
        try:
            path = user_path(self.weights, FIELD)
        except UserError:
            return None
        if path.is_file():
            return digest.of_file(path)
        if not path.is_dir():
            return None
        part_weights = find_weights(path, DIFFUSERS)
        return None if part_weights is None else part_weights.sha256()

    def require_hash(self, sha256: str) -> None:
        """Raise UserError if the SHA-256 of the weights has changed since the run started."""
        if self.sha256 not in (None, sha256):
            raise UserError(
                f"{FIELD}: {self.weights} has SHA-256 {sha256}, but this run was trained with {self.sha256}: restore "
                f"those weights, or set {FIELD} to their path"
            )

    def facts(self) -> dict[str, Any]:
        """Return the fields that the latents depend on, without the path of the weights."""
        return self.model_dump(exclude={"weights", "sha256"})

    def shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """Return the shape (channels, height, width) of the latent of an image with this height and width in pixels.

        The image is square if `width` is None. Raises UserError if a side is not a multiple of the downsampling factor.
        """
        if width is None:
            width = height
        for side in (height, width):
            if side % self.factor:
                raise UserError(
                    f"{self.label} needs sides that are multiples of {self.factor} pixels, got {side}: resize the "
                    "images"
                )
        return self.channels, height // self.factor, width // self.factor

    def sample(self, moments: Moments, *key: int | str, rows: Sequence[int]) -> Latent:
        """Draw a latent from each row's Gaussians, with random numbers keyed by `key` and the row's number in `rows`.

        If the codec has no Gaussians, the moments are latents and are returned unchanged.
        """
        if moments.shape[1] == self.channels:
            return moments
        mean, deviation = moments.split(self.channels, 1)
        return mean + deviation * keyed_normal(*key, rows=rows, shape=mean.shape[1:]).to(mean)

    def normalise(self, raw: Moments) -> Moments:
        """Normalise an encoder's output (b, m, y, x), latents or moments."""
        mean, *deviations = raw.split(self.channels, 1)  # no deviation, or one
        shift, scale = self._shift_and_scale(raw)
        normalised = [(mean - shift) * scale]
        for deviation in deviations:
            normalised.append(deviation * scale)
        return torch.cat(normalised, 1)

    def restore(self, x: Moments) -> Moments:
        """Invert `normalise` on x (b, m, y, x)."""
        mean, *deviations = x.split(self.channels, 1)  # no deviation, or one
        shift, scale = self._shift_and_scale(x)
        restored = [mean / scale + shift]
        for deviation in deviations:
            restored.append(deviation / scale)
        return torch.cat(restored, 1)

    @property
    def label(self) -> str:
        """The name of the codec for messages, such as "codec sd-vae sd"."""
        words = ["codec", getattr(self, "kind", ""), getattr(self, "variant", "")]
        return " ".join(word for word in words if word)

    def _shift_and_scale(self, like: Tensor) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
        """Return shift and scale of each channel, of the dtype and on the device of the tensor `like`."""
        shift = torch.tensor(self.published.shift, dtype=like.dtype, device=like.device)
        scale = torch.tensor(self.published.scale, dtype=like.dtype, device=like.device)
        return shift.expand(self.channels)[:, None, None], scale.expand(self.channels)[:, None, None]


@runtime_checkable
class Autoencoder(Protocol):
    """An encoder and a decoder, on one device, in float32."""

    def encode(self, images: Images) -> Moments:
        """Encode images to latents, or to means and standard deviations of Gaussians, before any normalisation."""
        ...

    def decode(self, raw: Latent) -> Images:
        """Decode latents to images, about in [-1, 1]."""
        ...


@dataclass(frozen=True)
class LoadedCodec:
    """A codec with its weights. Encodes and decodes in small batches, without gradients."""

    codec: CodecSpec
    net: Autoencoder
    sha256: str  # of the weights' file
    device: torch.device

    @torch.no_grad()
    def encode(self, images: Images) -> Moments:
        """Encode images in [-1, 1] to normalised latents x, or to the moments of x.

        Raises UserError if height or width is not a multiple of the downsampling factor, or if the encoder's output
        does not have the shape in the spec.
        """
        height, width = images.shape[2:]
        channels, *sides = self.codec.shape(height, width)  # raises
        shape = (2 * channels if self.codec.is_gaussian else channels, *sides)
        encoded: list[Tensor] = []
        for part in images.split(images_at_once(height, width)):
            raw = self.net.encode(part.to(self.device, torch.float32))
            if raw.shape[1:] != shape:
                raise UserError(
                    f"{self.codec.label}: {self.codec.weights} encodes {width} x {height} pixels to shape "
                    f"{tuple(raw.shape[1:])}, but its config implies {shape}: restore the published config, or use "
                    "another autoencoder"
                )
            encoded.append(self.codec.normalise(raw).contiguous())
        return torch.cat(encoded)

    @torch.no_grad()
    def decode(self, x: Latent) -> Images:
        """Decode normalised latents x to images, clamped to [-1, 1]."""
        height, width = x.shape[2:]
        factor = self.codec.factor
        decoded: list[Tensor] = []
        for part in x.split(images_at_once(factor * height, factor * width)):
            raw = self.codec.restore(part.to(self.device, torch.float32))
            decoded.append(self.net.decode(raw).clamp(-1, 1))
        return torch.cat(decoded)

    def shape(self, side: int) -> tuple[int, int, int]:
        """Return the shape of the latent of a square image of `side` pixels. Raises UserError as `CodecSpec.shape`."""
        return self.codec.shape(side)
