"""Published autoencoders, through diffusers: Stable Diffusion's VAE, the deep-compression one, DC-AE, and a pipeline's.

All take images in [-1, 1]. `weights` is a folder with config.json and diffusion_pytorch_model.safetensors, or the name
of such a model on the Hugging Face hub, owner/model or owner/model/folder, from where its client brings it once.
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
from dumo.encoders.codec import FIELD, WEIGHTS, Images, Latent, Moments, Opened, Published, Scaled
from dumo.encoders.pipeline import VAE, Pipeline, PipelineSpec
from dumo.io.read import brief, foreign, read_settings, user_path
from dumo.io.weights import whole_digest
from dumo.runtime import import_bitsandbytes, install
from dumo.types import FREE, PINNED, UserError

CONFIG = "config.json"
HINT = f"--set {FIELD}=... names a folder with {CONFIG} and {WEIGHTS}, or a model of the Hugging Face hub."


class Model(Scaled):
    """An autoencoder that diffusers has."""

    name: ClassVar[str]  # of its class there
    video: ClassVar[bool] = False  # whether it takes videos (b, c, frames, h, w): an image is one frame

    def open(self, device: str | torch.device = "cpu") -> Opened:
        """Read the weights. Raises UserError where diffusers or they are missing, damaged or of another variant."""
        net, found = _loaded(self.name, self)
        return Opened(self, DiffusersCoder(net.to(device), self), found, torch.device(device))


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
        found = super().within(pipeline)
        facts = (pipeline.facts or {}) if pipeline else {}
        place = f"{pipeline.source}/{VAE}" if pipeline else ""
        return found.model_copy(update={"weights": place, "sha256": facts.get("vae.weights")})

    @property
    def config(self) -> Mapping[str, Any]:
        """What the folder says. Raises UserError where it has none, or another than the run began with."""
        return self.pipeline.config(VAE)

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride], of the folder, not of the class
        """Its class. Raises UserError for one that is none of KINDS."""
        if (name := str(self.config.get("_class_name"))) not in KINDS:
            known = ", ".join(KINDS)
            raise UserError(
                f"{pipelines.FIELD}: {self.weights} is a {name}, which dumo does not decode with: take one of {known}"
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
            (channels, factor), theirs = _latent(self.config), numbers(self.config)
            if "patched" in KINDS[self.name]:  # a net learns patches of its latent, by numbers in the weights
                return Published(self.weights, 4 * channels, 2 * factor, 1.0)
            given = (np.asarray(theirs.get(name, none), float) for name, none in (("scale", 1.0), ("shift", 0.0)))
            return Published(
                self.weights, channels, factor, *(tuple(x.tolist()) if x.ndim else float(x) for x in given)
            )

    def facts(self) -> dict[str, Any]:
        """As `Scaled.facts`, with what the config says."""
        published = {name: np.asarray(x).tolist() for name, x in self.published._asdict().items() if name != "weights"}
        return {"kind": self.kind, "name": self.name, **published}

    def digest(self) -> str | None:
        """As `Scaled.digest`."""
        return None if self.pipeline.is_published else super().digest()

    def require(self, found: str) -> None:
        """As `Scaled.require`."""
        self.pipeline.require("vae.weights", found)

    def open(self, device: str | torch.device = "cpu") -> Opened:
        """As `Model.open`. Raises UserError, with the command that brings it, where it is missing."""
        self.pipeline.part_folder(VAE)
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

        self.patches: Any = getattr(net, "bn", None)  # Flux 2's: the mean and variance of patches of 2 x 2

    def encode(self, images: Images) -> Moments:
        """The latent; of Gaussians their means, then their standard deviations."""
        found = self.net.encode(images.unsqueeze(2) if self.spec.video else images)
        if not self.spec.gaussian:
            return found.latent
        parts = [found.latent_dist.mean, found.latent_dist.std]
        if self.patches:
            mean, sd = self._numbers()
            parts = [(pixel_unshuffle(parts[0], 2) - mean) / sd, pixel_unshuffle(parts[1], 2) / sd]
        moments = torch.cat(parts, 1)
        return moments.squeeze(2) if self.spec.video else moments

    def decode(self, raw: Latent) -> Images:
        """Images, about in [-1, 1]."""
        if self.patches:
            mean, sd = self._numbers()
            raw = pixel_shuffle(raw * sd + mean, 2)
        return self.net.decode(raw.unsqueeze(2)).sample.squeeze(2) if self.spec.video else self.net.decode(raw).sample

    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of patches, (c, 1, 1)."""
        mean, variance = (x.detach()[:, None, None] for x in (self.patches.running_mean, self.patches.running_var))
        return mean, (variance + self.net.config.batch_norm_eps).sqrt()


def _loaded(name: str, codec: Scaled) -> tuple[nn.Module, str]:
    """The model of diffusers' class `name`, and the SHA-256 of its weights."""
    import_bitsandbytes()
    try:
        import diffusers  # slow to import, and an extra
    except ImportError as error:
        raise UserError(f"{codec.about} needs diffusers: {install('diffusers')}") from error
    folder = _folder(codec.weights)
    codec.require(found := whole_digest(_weights(folder), HINT))
    if (folder / CONFIG).is_file():
        read_settings(folder / CONFIG, HINT)
    with foreign(f"{folder} holds no {name} that diffusers can load", HINT):
        model = getattr(diffusers, name)
        net, info = model.from_pretrained(folder, output_loading_info=True, use_safetensors=True, local_files_only=True)
        keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
        if wrong := [key for kind in keys for key in info.get(kind, ())]:
            raise RuntimeError(f"{wrong[0]} is missing, unknown or misshapen, by its {CONFIG}")
        if codec.variants:
            require(codec, net.config, folder)
        return net.float().eval().requires_grad_(False), found


def require(codec: Scaled, config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError where a model's config is not of the codec's variant, naming the one that it is of."""
    size, theirs = _latent(config), numbers(config)
    fits = {k: name for name, k in codec.variants.items() if size == (k.channels, k.factor) and same(theirs, k)}
    if codec.published in fits:
        return
    way = f"set codec.variant={name}" if (name := next(iter(fits.values()), None)) else "it is not supported"
    raise UserError(f"{folder} is not {codec.about}: {size[0]} channels, factor {size[1]}, {words(theirs)}; {way}")


def numbers(config: Mapping[str, Any]) -> dict[str, float | list[float]]:
    """The shift and scale of latents that a decoder's config says: one, or one per channel; {} where it says none."""
    if config.get("latents_mean") and config.get("latents_std"):
        return {"shift": config["latents_mean"], "scale": [1 / sd for sd in config["latents_std"]]}
    if "scaling_factor" in config:
        return {"shift": config.get("shift_factor") or 0.0, "scale": config["scaling_factor"]}
    return {}


def same(theirs: Mapping[str, float | list[float]], known: Published) -> bool:
    """Whether these are the published numbers."""
    ours = {"shift": known.shift, "scale": known.scale}
    return all(
        np.size(x) in (1, known.channels) and np.allclose(x, ours[name], rtol=1e-3) for name, x in theirs.items()
    )


def words(theirs: Mapping[str, float | list[float]]) -> str:
    """The numbers in words."""
    return ", ".join(f"{name} {brief(x, 40)}" for name, x in theirs.items())


def _latent(config: Mapping[str, Any]) -> tuple[int, int]:
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
    named = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/([\w-]+))?", name)
    why = ""
    if named and not path.exists():
        from huggingface_hub import snapshot_download

        model, inside = named[1], named[2] or ""
        files = [f"{inside}/{file}" if inside else file for file in (CONFIG, WEIGHTS)]
        try:
            return Path(snapshot_download(model, allow_patterns=files)) / inside
        except (OSError, ValueError) as error:
            why = f", and not available from the hub ({error})"
    raise UserError(f"{name} is no folder{why}. {HINT}")


def _weights(folder: Path) -> Path:
    """The safetensors file in a folder, or the pickle that stands in its place."""
    pickled = (folder / WEIGHTS).with_suffix(".bin")
    return pickled if pickled.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS
