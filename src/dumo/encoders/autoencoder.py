"""Published autoencoders, loaded by diffusers: the VAE of Stable Diffusion, DC-AE, and the VAE of the run's pipeline.

All take images in [-1, 1]. `SdVae`, `DcAe` and `PipelineVae` are the specs. Their `weights` is a folder with a config
and weights (`dumo.encoders.part`), or a repository on the Hugging Face Hub.

The order of events in `DiffusersCodec.open`:

1. The folder is found or downloaded, and the hash of its weights is compared with the hash in the run.
2. diffusers loads the autoencoder class.
3. A config that does not match the variant is refused. `variants` has the shape, shift and scale of each variant;
   `PipelineVae` reads them from the config.
4. The `LoadedCodec` calls the autoencoder through `_DiffusersCoder`, which returns latents or moments.

To support another autoencoder class of pipelines, add it to `KINDS`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dumo.encoders import pipeline_folder as pipelines
from dumo.encoders.codec import FIELD, CodecSpec, Images, Latent, LoadedCodec, Moments, PublishedCodec
from dumo.encoders.part import DIFFUSERS, DIFFUSERS_FILE, choose_files, find_weights, first_unfit_key, require_weights
from dumo.encoders.pipeline_folder import VAE, Pipeline, PipelineSpec
from dumo.encoders.transformers_library import quietly
from dumo.io import hub
from dumo.io.read import brief
from dumo.runtime import import_bitsandbytes, require
from dumo.types import FREE, PINNED, UserError

CONFIG = "config.json"
HINT = (
    f"{FIELD}=... must be a folder with {CONFIG} and {DIFFUSERS_FILE}, or a model on the Hugging Face Hub, OWNER/NAME"
)


class DiffusersCodec(CodecSpec):
    """A codec with a diffusers autoencoder."""

    class_name: ClassVar[str]  # in diffusers
    takes_videos: ClassVar[bool] = False  # (b, c, frames, h, w): an image is one frame

    def find_folder(self) -> Path:
        """Return the folder with config and weights, downloading it if needed. Raises UserError if there is none."""
        folder = hub.path_of(self.weights, FIELD, choose_files)
        if not folder.is_dir():
            raise UserError(f"{FIELD}: there is no folder {self.weights}. {HINT}")
        return folder

    def open(self, device: str | torch.device = "cpu") -> LoadedCodec:
        """Load the weights. Raises UserError if diffusers or weights are missing, or weights damaged or mismatched."""
        net, sha256 = _load_model(self)
        coder = _DiffusersCoder(net.to(device), self)
        return LoadedCodec(self, coder, sha256, torch.device(device))


class SdVae(DiffusersCodec):
    """The VAE of Stable Diffusion 1, in its ft-ema version.

    The scale is the inverse standard deviation over its first training batch (Rombach et al. 2022, App. G).
    """

    kind: Literal["sd-vae"] = "sd-vae"
    variant: Literal["sd"] = "sd"
    class_name: ClassVar[str] = "AutoencoderKL"
    is_gaussian: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, PublishedCodec]] = {
        "sd": PublishedCodec("stabilityai/sd-vae-ft-ema", channels=4, factor=8, scale=0.18215)
    }


class DcAe(DiffusersCodec):
    """DC-AE f32c32 (Chen et al. 2024), a downsampling factor of 32: trained on ImageNet (in), a mixture (mix), or SANA.

    The scale is the scaling_factor of the published config.
    """

    kind: Literal["dc-ae"] = "dc-ae"
    variant: Literal["in", "mix", "sana"] = "in"
    class_name: ClassVar[str] = "AutoencoderDC"
    variants: ClassVar[Mapping[str, PublishedCodec]] = {
        "in": PublishedCodec("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", channels=32, factor=32, scale=0.3189),
        "mix": PublishedCodec("mit-han-lab/dc-ae-f32c32-mix-1.0-diffusers", channels=32, factor=32, scale=0.4552),
        "sana": PublishedCodec("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", channels=32, factor=32, scale=0.41407),
    }


class VaeKind(NamedTuple):
    """The properties of an autoencoder class that its config does not have."""

    is_gaussian: bool = False  # the encoder returns a Gaussian per pixel
    takes_videos: bool = False  # (b, c, frames, h, w): an image is one frame
    has_patch_norm: bool = False  # latents are 2 x 2 patches, normalized by a batch norm in the weights
    default_scale: float | None = None  # of diffusers, for old configs without a scaling factor


KINDS = {  # by class in diffusers
    "AutoencoderKL": VaeKind(is_gaussian=True, default_scale=0.18215),
    "AutoencoderDC": VaeKind(),
    "AutoencoderKLQwenImage": VaeKind(is_gaussian=True, takes_videos=True),
    "AutoencoderKLWan": VaeKind(is_gaussian=True, takes_videos=True),
    "AutoencoderKLFlux2": VaeKind(is_gaussian=True, has_patch_norm=True),
}


class PipelineVae(PipelineSpec, DiffusersCodec):
    """The autoencoder of the run's pipeline, with the shift and scale of its config."""

    kind: Literal["pipeline"] = "pipeline"
    weights: str = Field(default="", exclude=True, json_schema_extra=FREE)  # set by `within`
    sha256: str | None = Field(default=None, exclude=True, json_schema_extra=PINNED)  # set by `within`
    variants: ClassVar[Mapping[str, PublishedCodec]] = {}

    def within(self, pipeline: Pipeline | None) -> Self:
        """Return this spec for a run with this pipeline, with the path and the hash of the autoencoder's weights."""
        codec = super().within(pipeline)
        weights = ""
        sha256 = None
        if pipeline:
            weights = f"{pipeline.source}/{VAE}"
            sha256 = (pipeline.facts or {}).get("vae.weights")
        return codec.model_copy(update={"weights": weights, "sha256": sha256})

    @property
    def config(self) -> Mapping[str, Any]:
        """The autoencoder's config.json. Raises UserError if it is missing, or has changed since the run started."""
        return self.pipeline.config(VAE)

    @property
    def class_name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride], of the folder, not of the class
        """The autoencoder's class in diffusers. Raises UserError for a class that is not in KINDS."""
        class_name = str(self.config.get("_class_name"))
        if class_name not in KINDS:
            raise UserError(
                f"{pipelines.FIELD}: {self.weights} is a {class_name}, which is not supported: use one of "
                f"{', '.join(KINDS)}"
            )
        return class_name

    @property
    def takes_videos(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride], as `class_name`
        """Whether the autoencoder takes videos. Raises UserError for a class that is not in KINDS."""
        return KINDS[self.class_name].takes_videos

    @property
    def is_gaussian(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride], as `class_name`
        """Whether the encoder returns a Gaussian per pixel. Raises UserError for a class that is not in KINDS."""
        return KINDS[self.class_name].is_gaussian

    @property
    def published(self) -> PublishedCodec:
        """The shape, shift and scale of latents from the config. Raises UserError if the config has none."""
        channels, factor = _latent_size(self.config)
        kind = KINDS[self.class_name]
        if kind.has_patch_norm:  # which replaces shift and scale
            return PublishedCodec(self.weights, channels=4 * channels, factor=2 * factor, scale=1.0)
        shift_and_scale = _shift_and_scale(self.config)
        scale = shift_and_scale.get("scale", kind.default_scale)
        if scale is None:
            raise UserError(
                f"{pipelines.FIELD}: {self.weights}/{CONFIG} has no shift and scale for latents (scaling_factor, "
                f"or latents_mean and latents_std) of a {self.class_name}: restore the published config"
            )
        return PublishedCodec(
            self.weights,
            channels=channels,
            factor=factor,
            scale=_float_or_floats(scale),
            shift=_float_or_floats(shift_and_scale.get("shift", 0.0)),
        )

    def facts(self) -> dict[str, Any]:
        """Return the settings that the latents depend on, from the config, without the path of the weights."""
        facts: dict[str, Any] = {"kind": self.kind, "name": self.class_name}
        for name, value in self.published._asdict().items():
            if name != "weights":
                facts[name] = np.asarray(value).tolist()
        return facts

    def digest(self) -> str | None:
        """Return the SHA-256 of the weights, or None if they are not on this machine."""
        if self.pipeline.is_published:
            return None
        weights = find_weights(self.pipeline.part_folder(VAE), DIFFUSERS)
        return None if weights is None else weights.sha256()

    def require_hash(self, sha256: str) -> None:
        """Raise UserError if the SHA-256 of the weights has changed since the run started."""
        self.pipeline.require_fact("vae.weights", sha256)

    def find_folder(self) -> Path:
        """Return the folder of the pipeline's autoencoder, downloading it if needed. Raises as `Pipeline.fetch`."""
        self.pipeline.fetch()
        return self.pipeline.part_folder(VAE)


class _DiffusersCoder:
    """Adapts a diffusers autoencoder to `Autoencoder`."""

    def __init__(self, net: nn.Module, spec: DiffusersCodec) -> None:
        """Take a diffusers autoencoder of the class of `spec`."""
        self.net: Any = net
        self.spec = spec
        self.patch_norm: Any = getattr(net, "bn", None)  # FLUX.2's batch norm of 2 x 2 patches

    def encode(self, images: Images) -> Moments:
        """Encode images (b, 3, h, w) to latents, or to means and then standard deviations, along the channels."""
        if self.spec.takes_videos:
            images = images.unsqueeze(2)
        encoded = self.net.encode(images)
        if not self.spec.is_gaussian:
            return encoded.latent
        mean: Latent = encoded.latent_dist.mean
        sd: Latent = encoded.latent_dist.std
        if self.patch_norm:
            patch_mean, patch_sd = self._patch_moments()
            mean = (pixel_unshuffle(mean, 2) - patch_mean) / patch_sd
            sd = pixel_unshuffle(sd, 2) / patch_sd
        moments = torch.cat([mean, sd], 1)
        return moments.squeeze(2) if self.spec.takes_videos else moments

    def decode(self, raw: Latent) -> Images:
        """Decode latents (b, l, y, x) to images (b, 3, h, w), about in [-1, 1]."""
        if self.patch_norm:
            patch_mean, patch_sd = self._patch_moments()
            raw = pixel_shuffle(raw * patch_sd + patch_mean, 2)
        if self.spec.takes_videos:
            return self.net.decode(raw.unsqueeze(2)).sample.squeeze(2)
        return self.net.decode(raw).sample

    def _patch_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and standard deviation of each channel of a patch, (c, 1, 1)."""
        mean = self.patch_norm.running_mean.detach()[:, None, None]
        variance = self.patch_norm.running_var.detach()[:, None, None]
        return mean, (variance + self.net.config.batch_norm_eps).sqrt()


def _load_model(codec: DiffusersCodec) -> tuple[nn.Module, str]:
    """Load a codec's autoencoder with diffusers, in float32. Returns it and the SHA-256 of its weights.

    Raises UserError as `DiffusersCodec.open`.
    """
    class_name = codec.class_name
    import_bitsandbytes()
    diffusers = require("diffusers", "diffusers", codec.label)
    folder = codec.find_folder()
    part_weights = require_weights(folder, DIFFUSERS, FIELD, HINT)
    sha256 = part_weights.sha256(HINT)
    codec.require_hash(sha256)
    with quietly("diffusers"):  # hides its progress bar of shards
        net, report = part_weights.build_model(getattr(diffusers, class_name))
    unfit_key = first_unfit_key(report)
    if unfit_key is not None:
        raise UserError(f"{folder}: the weights do not fit {CONFIG}: {unfit_key} is missing, unknown or misshapen")
    if codec.variants:
        _require_variant(codec, net.config, folder)
    return net.float().eval().requires_grad_(False), sha256


def _require_variant(codec: CodecSpec, config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError, naming the matching variant, if a model's config does not match the codec's variant."""
    channels, factor = _latent_size(config)
    shift_and_scale = _shift_and_scale(config)
    matching: dict[PublishedCodec, str] = {}
    for name, published in codec.variants.items():
        has_size = (published.channels, published.factor) == (channels, factor)
        if has_size and _has_shift_and_scale(published, shift_and_scale):
            matching[published] = name
    if codec.published in matching:
        return
    fix = "it is not supported"
    if matching:
        fix = f"set codec.variant={next(iter(matching.values()))}"
    affine_text = ", ".join(f"{name} {brief(value, 40)}" for name, value in shift_and_scale.items())
    raise UserError(f"{folder} is not {codec.label}: {channels} channels, factor {factor}, {affine_text}; {fix}")


def _shift_and_scale(config: Mapping[str, Any]) -> dict[str, float | list[float]]:
    """Return the shift and scale of latents in an autoencoder's config, or {}.

    Each is one number or a list with one per channel. Standard deviations are divided by the scaling factor, if there
    is one, as in the pipelines of Stable Diffusion XL.
    """
    if config.get("latents_mean") and config.get("latents_std"):
        factor = config.get("scaling_factor", 1.0)
        return {"shift": config["latents_mean"], "scale": [factor / sd for sd in config["latents_std"]]}
    if "scaling_factor" in config:
        return {"shift": config.get("shift_factor") or 0.0, "scale": config["scaling_factor"]}
    return {}


def _has_shift_and_scale(published: PublishedCodec, shift_and_scale: Mapping[str, float | list[float]]) -> bool:
    """Whether the shift and scale of a config equal the published ones. A config without them matches any codec."""
    expected = {"shift": published.shift, "scale": published.scale}
    for name, value in shift_and_scale.items():
        if np.size(value) not in (1, published.channels) or not np.allclose(value, expected[name], rtol=1e-3):
            return False
    return True


def _float_or_floats(value: float | list[float]) -> float | tuple[float, ...]:
    """Convert a number to a float, or a list with one per channel to a tuple of floats."""
    array = np.asarray(value, float)
    return tuple(array.tolist()) if array.ndim else float(array)


def _latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of latent channels and the downsampling factor from an autoencoder's config."""
    if "z_dim" in config:  # a video VAE: each block halves height and width
        halvings = len(config["temperal_downsample"])
        return config["z_dim"], config.get("scale_factor_spatial") or 2**halvings  # larger with patches
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return config["latent_channels"], 2 ** (len(blocks) - 1)  # all blocks but the last halve the sides
