"""Published autoencoders, through diffusers: Stable Diffusion's VAE, the deep-compression one, DC-AE, and a pipeline's.

All take images in [-1, 1]. `SdVae`, `DcAe` and `PipelineVae` are the specs. Their `weights` is a folder, with a config
and weights (`dumo.encoders.part`), or the name of such a model on the Hugging Face Hub.

The order of events in `DiffusersCodec.open`:

1. The folder is found, or fetched, and the hash of its weights is compared with that of the run.
2. diffusers loads its class of autoencoder.
3. A config of another variant is refused. The numbers of a variant are in `variants`; `PipelineVae` has none, and reads
   its numbers from the config.
4. The `LoadedCodec` calls the autoencoder through `_DiffusersCoder`, which gives latents or moments.

To accept another class of a pipeline's autoencoder, add it to `KINDS`.
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
HINT = f"{FIELD}=... names a folder with {CONFIG} and {DIFFUSERS_FILE}, or a model of the Hugging Face Hub, OWNER/NAME"


class DiffusersCodec(CodecSpec):
    """A codec whose autoencoder is a class of diffusers."""

    class_name: ClassVar[str]  # in diffusers
    takes_videos: ClassVar[bool] = False  # (b, c, frames, h, w): an image is one frame

    def find_folder(self) -> Path:
        """Return the folder of config and weights, fetched if it is on the Hub. Raises UserError if there is none."""
        folder = hub.path_of(self.weights, FIELD, choose_files)
        if not folder.is_dir():
            raise UserError(f"{FIELD}: there is no folder {self.weights}. {HINT}")
        return folder

    def open(self, device: str | torch.device = "cpu") -> LoadedCodec:
        """Read the weights. Raises UserError where diffusers or they are missing, damaged or of another variant."""
        net, sha256 = _load_model(self)
        coder = _DiffusersCoder(net.to(device), self)
        return LoadedCodec(self, coder, sha256, torch.device(device))


class SdVae(DiffusersCodec):
    """The VAE of Stable Diffusion 1, fine-tuned as ft-ema.

    The scale is one over the deviation over the first batch it was trained on (Rombach et al. 2022, App. G).
    """

    kind: Literal["sd-vae"] = "sd-vae"
    variant: Literal["sd"] = "sd"
    class_name: ClassVar[str] = "AutoencoderKL"
    is_gaussian: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, PublishedCodec]] = {
        "sd": PublishedCodec("stabilityai/sd-vae-ft-ema", channels=4, factor=8, scale=0.18215)
    }


class DcAe(DiffusersCodec):
    """DC-AE f32c32 (Chen et al. 2024), a 32nd of the side: trained on ImageNet (in), a mixture (mix), or for SANA.

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
    """What is particular about a class of autoencoders."""

    is_gaussian: bool = False  # the encoder gives a Gaussian per pixel
    takes_videos: bool = False  # (b, c, frames, h, w): an image is one frame
    has_patch_norm: bool = False  # a net learns patches of 2 x 2 of its latent, normalized by numbers in the weights
    default_scale: float | None = None  # diffusers' own, for configs from before they had one; None: there are none


KINDS = {  # of the autoencoders of pipelines, by their class in diffusers
    "AutoencoderKL": VaeKind(is_gaussian=True, default_scale=0.18215),
    "AutoencoderDC": VaeKind(),
    "AutoencoderKLQwenImage": VaeKind(is_gaussian=True, takes_videos=True),
    "AutoencoderKLWan": VaeKind(is_gaussian=True, takes_videos=True),
    "AutoencoderKLFlux2": VaeKind(is_gaussian=True, has_patch_norm=True),
}


class PipelineVae(PipelineSpec, DiffusersCodec):
    """The autoencoder of the run's pipeline, with the shift and scale of its config. Its weights are the pipeline's."""

    kind: Literal["pipeline"] = "pipeline"
    weights: str = Field(default="", exclude=True, json_schema_extra=FREE)  # set by `within`
    sha256: str | None = Field(default=None, exclude=True, json_schema_extra=PINNED)  # set by `within`
    variants: ClassVar[Mapping[str, PublishedCodec]] = {}

    def within(self, pipeline: Pipeline | None) -> Self:
        """Return this spec for a run with this pipeline, with the place and the hash of the autoencoder's weights."""
        codec = super().within(pipeline)
        weights = ""
        sha256 = None
        if pipeline:
            weights = f"{pipeline.source}/{VAE}"
            sha256 = (pipeline.facts or {}).get("vae.weights")
        return codec.model_copy(update={"weights": weights, "sha256": sha256})

    @property
    def config(self) -> Mapping[str, Any]:
        """The autoencoder's config.json. Raises UserError where there is none, or another than the run began with."""
        return self.pipeline.config(VAE)

    @property
    def class_name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride], of the folder, not of the class
        """The autoencoder's class in diffusers. Raises UserError for one that is none of KINDS."""
        class_name = str(self.config.get("_class_name"))
        if class_name not in KINDS:
            raise UserError(
                f"{pipelines.FIELD}: {self.weights} is a {class_name}, which dumo does not decode with: take one of "
                f"{', '.join(KINDS)}"
            )
        return class_name

    @property
    def takes_videos(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride], as `class_name`
        """Whether the autoencoder takes videos. Raises UserError for a class that is none of KINDS."""
        return KINDS[self.class_name].takes_videos

    @property
    def is_gaussian(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride], as `class_name`
        """Whether the encoder gives a Gaussian per pixel. Raises UserError for a class that is none of KINDS."""
        return KINDS[self.class_name].is_gaussian

    @property
    def published(self) -> PublishedCodec:
        """The shape, shift and scale of latents by the config. Raises UserError where the config says none."""
        channels, factor = _latent_size(self.config)
        kind = KINDS[self.class_name]
        if kind.has_patch_norm:  # which takes the place of shift and scale
            return PublishedCodec(self.weights, channels=4 * channels, factor=2 * factor, scale=1.0)
        shift_and_scale = _shift_and_scale(self.config)
        scale = shift_and_scale.get("scale", kind.default_scale)
        if scale is None:
            raise UserError(
                f"{pipelines.FIELD}: {self.weights}/{CONFIG} says no shift and scale of latents (scaling_factor, "
                f"or latents_mean and latents_std) of a {self.class_name}: put the published config back"
            )
        return PublishedCodec(
            self.weights,
            channels=channels,
            factor=factor,
            scale=_float_or_floats(scale),
            shift=_float_or_floats(shift_and_scale.get("shift", 0.0)),
        )

    def facts(self) -> dict[str, Any]:
        """Return what the codec computes, by the config, wherever its weights are."""
        facts: dict[str, Any] = {"kind": self.kind, "name": self.class_name}
        for name, value in self.published._asdict().items():
            if name != "weights":
                facts[name] = np.asarray(value).tolist()
        return facts

    def digest(self) -> str | None:
        """Return the SHA-256 of the weights; None where they are not here."""
        if self.pipeline.is_published:
            return None
        weights = find_weights(self.pipeline.part_folder(VAE), DIFFUSERS)
        return None if weights is None else weights.sha256()

    def require_hash(self, sha256: str) -> None:
        """Raise UserError if the weights have another SHA-256 than those that the run began with."""
        self.pipeline.require_fact("vae.weights", sha256)

    def find_folder(self) -> Path:
        """Return the folder of the pipeline's autoencoder, fetched if it is on the Hub. Raises UserError."""
        self.pipeline.fetch()
        return self.pipeline.part_folder(VAE)


class _DiffusersCoder:
    """An autoencoder of diffusers as an `Autoencoder`."""

    def __init__(self, net: nn.Module, spec: DiffusersCodec) -> None:
        """Take an autoencoder of diffusers, of the class of `spec`."""
        self.net: Any = net
        self.spec = spec
        self.patch_norm: Any = getattr(net, "bn", None)  # FLUX.2's batch norm: mean and variance of patches of 2 x 2

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
    """Load a codec's autoencoder by diffusers, in float32. Returns it, and the SHA-256 of its weights.

    Raises UserError as `DiffusersCodec.open`.
    """
    class_name = codec.class_name
    import_bitsandbytes()
    diffusers = require("diffusers", "diffusers", codec.label)
    folder = codec.find_folder()
    part_weights = require_weights(folder, DIFFUSERS, FIELD, HINT)
    sha256 = part_weights.sha256(HINT)
    codec.require_hash(sha256)
    with quietly("diffusers"):  # it would show a bar of shards
        net, report = part_weights.build_model(getattr(diffusers, class_name))
    unfit_key = first_unfit_key(report)
    if unfit_key is not None:
        raise UserError(f"{folder}: the weights do not fit {CONFIG}: {unfit_key} is missing, unknown or misshapen")
    if codec.variants:
        _require_variant(codec, net.config, folder)
    return net.float().eval().requires_grad_(False), sha256


def _require_variant(codec: CodecSpec, config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where a model's config is not of the codec's variant, naming the variant that it is of."""
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
    """Return the shift and scale of latents by an autoencoder's config; {} where it has none.

    Each is one number, or a list of one per channel. Deviations are in units of a scaling factor, where there is one,
    as in the pipelines of Stable Diffusion XL.
    """
    if config.get("latents_mean") and config.get("latents_std"):
        factor = config.get("scaling_factor", 1.0)
        return {"shift": config["latents_mean"], "scale": [factor / sd for sd in config["latents_std"]]}
    if "scaling_factor" in config:
        return {"shift": config.get("shift_factor") or 0.0, "scale": config["scaling_factor"]}
    return {}


def _has_shift_and_scale(published: PublishedCodec, shift_and_scale: Mapping[str, float | list[float]]) -> bool:
    """Whether the shift and scale of a config are the published ones. A config without them fits any codec."""
    expected = {"shift": published.shift, "scale": published.scale}
    for name, value in shift_and_scale.items():
        if np.size(value) not in (1, published.channels) or not np.allclose(value, expected[name], rtol=1e-3):
            return False
    return True


def _float_or_floats(value: float | list[float]) -> float | tuple[float, ...]:
    """Convert a number of a config to a float, or a list of one per channel to a tuple of floats."""
    array = np.asarray(value, float)
    return tuple(array.tolist()) if array.ndim else float(array)


def _latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the channels of a latent by an autoencoder's config, and its factor: image pixels for each of its own."""
    if "z_dim" in config:  # of videos: each entry is a block that halves the sides, and maybe the time
        halvings = len(config["temperal_downsample"])
        return config["z_dim"], config.get("scale_factor_spatial") or 2**halvings  # more where it cuts patches first
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return config["latent_channels"], 2 ** (len(blocks) - 1)  # all blocks but the last halve the sides
