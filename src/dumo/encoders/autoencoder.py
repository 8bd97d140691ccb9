"""Published autoencoders, through diffusers: Stable Diffusion's VAE, the deep-compression one, DC-AE, and a pipeline's.

All take images in [-1, 1]. `weights` is a folder with config.json and weights (`dumo.encoders.part`), or the name of
such a model on the Hugging Face hub, owner/model or owner/model/folder, from where its client brings it once.

`Model.open` finds the folder, compares the hash of its weights, loads the class of diffusers, and refuses a config of
another variant. Where the numbers come from: `Published` for a variant, the pipeline's config for `PipelineVae`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from dumo.encoders import pipeline as pipelines
from dumo.encoders.codec import FIELD, Images, Latent, Moments, Opened, Published, Scaled
from dumo.encoders.library import quietly
from dumo.encoders.part import DIFFUSERS, DIFFUSERS_FILE, first_unfit_key, require_weights
from dumo.encoders.pipeline import VAE, Pipeline, PipelineSpec
from dumo.io.read import brief, foreign, read_settings, user_path
from dumo.runtime import import_bitsandbytes, install_command
from dumo.types import FREE, PINNED, UserError

CONFIG = "config.json"
HINT = f"{FIELD}=... names a folder with {CONFIG} and {DIFFUSERS_FILE}, or a model of the Hugging Face hub."


class Model(Scaled):
    """An autoencoder that diffusers has."""

    name: ClassVar[str]  # of its class there
    video: ClassVar[bool] = False  # whether it takes videos (b, c, frames, h, w): an image is one frame

    def open(self, device: str | torch.device = "cpu") -> Opened:
        """Read the weights. Raises UserError where diffusers or they are missing, damaged or of another variant."""
        net, sha256 = _load_model(self.name, self)
        return Opened(self, DiffusersCoder(net.to(device), self), sha256, torch.device(device))


class SdVae(Model):
    """The VAE of Stable Diffusion 1, fine-tuned as ft-ema.

    The scale is one over the deviation over the first batch it was trained on (Rombach et al. 2022, App. G).
    """

    kind: Literal["sd-vae"] = "sd-vae"
    variant: Literal["sd"] = "sd"
    name: ClassVar[str] = "AutoencoderKL"
    gaussian: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Published]] = {"sd": Published("stabilityai/sd-vae-ft-ema", 4, 8, 0.18215)}


class DcAe(Model):
    """DC-AE f32c32 (Chen et al. 2024), a 32nd of the side: trained on ImageNet (in), a mixture (mix), or for SANA.

    The scale is the scaling_factor of the published config.
    """

    kind: Literal["dc-ae"] = "dc-ae"
    variant: Literal["in", "mix", "sana"] = "in"
    name: ClassVar[str] = "AutoencoderDC"
    variants: ClassVar[Mapping[str, Published]] = {
        "in": Published("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", 32, 32, 0.3189),
        "mix": Published("mit-han-lab/dc-ae-f32c32-mix-1.0-diffusers", 32, 32, 0.4552),
        "sana": Published("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", 32, 32, 0.41407),
    }


V = TypeVar("V", bound="PipelineVae")


class PipelineVae(PipelineSpec, Model):
    """The autoencoder of the run's pipeline, with the shift and scale that its config says."""

    kind: Literal["pipeline"] = "pipeline"
    weights: str = Field(default="", exclude=True, json_schema_extra=FREE)  # of the pipeline, as is
    sha256: str | None = Field(default=None, exclude=True, json_schema_extra=PINNED)
    variants: ClassVar[Mapping[str, Published]] = {}

    def within(self: V, pipeline: Pipeline | None) -> V:
        """As `PipelineSpec.within`, with the place and the hash of the weights."""
        codec = super().within(pipeline)
        weights = ""
        sha256 = None
        if pipeline:
            weights = f"{pipeline.source}/{VAE}"
            sha256 = (pipeline.facts or {}).get("vae.weights")
        return codec.model_copy(update={"weights": weights, "sha256": sha256})

    @property
    def config(self) -> Mapping[str, Any]:
        """What the folder says. Raises UserError where it has none, or another than the run began with."""
        return self.pipeline.config(VAE)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride], of the folder, not of the class
        """Its class. Raises UserError for one that is none of KINDS."""
        name = str(self.config.get("_class_name"))
        if name not in KINDS:
            raise UserError(
                f"{pipelines.FIELD}: {self.weights} is a {name}, which dumo does not decode with: take one of "
                f"{', '.join(KINDS)}"
            )
        return name

    @property
    def video(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride], as `name`
        """Whether it takes videos."""
        return "video" in KINDS[self.name]

    @property
    def gaussian(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride], as `name`
        """Whether the encoder gives a Gaussian per pixel."""
        return "gaussian" in KINDS[self.name]

    @property
    def published(self) -> Published:
        """Its sizes and numbers. Raises UserError where the config says none."""
        with foreign(f"{self.weights} says no sizes, shift or scale of latents", HINT):
            channels, factor = _latent_size(self.config)
            if "patched" in KINDS[self.name]:  # a net learns patches of its latent, by numbers in the weights
                return Published(self.weights, 4 * channels, 2 * factor, 1.0)
            numbers = latent_numbers(self.config)
            scale = _float_or_floats(numbers.get("scale", 1.0))
            shift = _float_or_floats(numbers.get("shift", 0.0))
            return Published(self.weights, channels, factor, scale, shift)

    def facts(self) -> dict[str, Any]:
        """As `Scaled.facts`, with what the config says."""
        facts: dict[str, Any] = {"kind": self.kind, "name": self.name}
        for name, value in self.published._asdict().items():
            if name != "weights":
                facts[name] = np.asarray(value).tolist()
        return facts

    def digest(self) -> str | None:
        """As `Scaled.digest`."""
        return None if self.pipeline.is_published else super().digest()

    def require(self, sha256: str) -> None:
        """As `Scaled.require`."""
        self.pipeline.require("vae.weights", sha256)

    def open(self, device: str | torch.device = "cpu") -> Opened:
        """As `Model.open`. Raises UserError, with the command that brings it, where it or its weights are missing."""
        self.pipeline.weights(VAE)
        return super().open(device)


KINDS = {  # classes of autoencoders of pipelines, and what is particular about each
    "AutoencoderKL": ("gaussian",),
    "AutoencoderDC": (),
    "AutoencoderKLQwenImage": ("gaussian", "video"),
    "AutoencoderKLWan": ("gaussian", "video"),
    "AutoencoderKLFlux2": ("gaussian", "patched"),
}


class DiffusersCoder:
    """Encoder and decoder of diffusers."""

    def __init__(self, net: nn.Module, spec: Model) -> None:
        self.net: Any = net
        self.spec = spec
        self.patch_norm: Any = getattr(net, "bn", None)  # Flux 2's: the mean and variance of patches of 2 x 2

    def encode(self, images: Images) -> Moments:
        """The latent; of Gaussians their means, then their standard deviations."""
        encoded = self.net.encode(images.unsqueeze(2) if self.spec.video else images)
        if not self.spec.gaussian:
            return encoded.latent
        mean: Latent = encoded.latent_dist.mean
        sd: Latent = encoded.latent_dist.std
        if self.patch_norm:
            patch_mean, patch_sd = self._patch_moments()
            mean = (pixel_unshuffle(mean, 2) - patch_mean) / patch_sd
            sd = pixel_unshuffle(sd, 2) / patch_sd
        moments = torch.cat([mean, sd], 1)
        return moments.squeeze(2) if self.spec.video else moments

    def decode(self, raw: Latent) -> Images:
        """Images, about in [-1, 1]."""
        if self.patch_norm:
            patch_mean, patch_sd = self._patch_moments()
            raw = pixel_shuffle(raw * patch_sd + patch_mean, 2)
        if self.spec.video:
            return self.net.decode(raw.unsqueeze(2)).sample.squeeze(2)
        return self.net.decode(raw).sample

    def _patch_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of patches, (c, 1, 1)."""
        mean = self.patch_norm.running_mean.detach()[:, None, None]
        variance = self.patch_norm.running_var.detach()[:, None, None]
        return mean, (variance + self.net.config.batch_norm_eps).sqrt()


def _load_model(name: str, codec: Scaled) -> tuple[nn.Module, str]:
    """The model of diffusers' class `name`, and the SHA-256 of its weights."""
    import_bitsandbytes()
    try:
        import diffusers  # slow to import, and an extra
    except ImportError as error:
        raise UserError(f"{codec.about} needs diffusers: {install_command('diffusers')}") from error
    folder = _folder(codec.weights)
    part_weights = require_weights(folder, DIFFUSERS, FIELD, HINT)
    sha256 = part_weights.sha256(HINT)
    codec.require(sha256)
    if (folder / CONFIG).is_file():
        read_settings(folder / CONFIG, HINT)
    with foreign(f"{folder} holds no {name} that diffusers can load", HINT):
        model_class = getattr(diffusers, name)
        with quietly("diffusers"):  # it would show a bar of shards
            net, report = part_weights.build_model(model_class)
        unfit_key = first_unfit_key(report)
        if unfit_key is not None:
            raise RuntimeError(f"{unfit_key} is missing, unknown or misshapen, by its {CONFIG}")
        if codec.variants:
            require_variant(codec, net.config, folder)
        return net.float().eval().requires_grad_(False), sha256


def require_variant(codec: Scaled, config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where a model's config is not of the codec's variant, naming the one that it is of."""
    channels, factor = _latent_size(config)
    numbers = latent_numbers(config)
    matching: dict[Published, str] = {}
    for name, published in codec.variants.items():
        if (published.channels, published.factor) == (channels, factor) and are_numbers_of(published, numbers):
            matching[published] = name
    if codec.published in matching:
        return
    fix = "it is not supported"
    if matching:
        fix = f"set codec.variant={next(iter(matching.values()))}"
    raise UserError(
        f"{folder} is not {codec.about}: {channels} channels, factor {factor}, {numbers_in_words(numbers)}; {fix}"
    )


def latent_numbers(config: Mapping[str, Any]) -> dict[str, float | list[float]]:
    """The shift and scale of latents that a decoder's config says: one, or one per channel; {} where it says none."""
    if config.get("latents_mean") and config.get("latents_std"):
        return {"shift": config["latents_mean"], "scale": [1 / sd for sd in config["latents_std"]]}
    if "scaling_factor" in config:
        return {"shift": config.get("shift_factor") or 0.0, "scale": config["scaling_factor"]}
    return {}


def are_numbers_of(published: Published, numbers: Mapping[str, float | list[float]]) -> bool:
    """Whether shift and scale, where a config says them, are the published ones."""
    expected = {"shift": published.shift, "scale": published.scale}
    for name, value in numbers.items():
        if np.size(value) not in (1, published.channels) or not np.allclose(value, expected[name], rtol=1e-3):
            return False
    return True


def numbers_in_words(numbers: Mapping[str, float | list[float]]) -> str:
    """Such as "shift 0.0, scale 0.18215"."""
    return ", ".join(f"{name} {brief(value, 40)}" for name, value in numbers.items())


def _float_or_floats(value: float | list[float]) -> float | tuple[float, ...]:
    """One number, or a tuple of one per channel."""
    array = np.asarray(value, float)
    return tuple(array.tolist()) if array.ndim else float(array)


def _latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """The channels of a latent, and pixels along an axis for each of its own: blocks but the last halve the side."""
    if "z_dim" in config:
        return config["z_dim"], 2 ** len(config["temperal_downsample"])  # one step of the sides for each
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return config["latent_channels"], 2 ** (len(blocks) - 1)


def _folder(name: str) -> Path:
    """The folder of a model: a path, or what the hub's client keeps of `owner/model` or `owner/model/folder`."""
    path = user_path(name, FIELD)
    if path.is_dir():
        return path
    on_hub = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w-]+))?", name)
    if on_hub is None or path.exists():
        raise UserError(f"{name} is no folder. {HINT}")

    from huggingface_hub import snapshot_download  # slow to import

    repository = on_hub[1]
    subfolder = on_hub[2] or ""
    patterns = [f"{subfolder}/{file}" if subfolder else file for file in (CONFIG, DIFFUSERS_FILE)]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns)) / subfolder
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is no folder, and not available from the hub ({error}). {HINT}") from error
