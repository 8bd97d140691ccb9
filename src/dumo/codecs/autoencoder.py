"""Published autoencoders, through diffusers: Stable Diffusion's VAE and the deep-compression one, DC-AE.

Both take images in [-1, 1]. `weights` is a folder with config.json and diffusion_pytorch_model.safetensors, or the name
of such a model on the Hugging Face hub, from where diffusers' client brings it once.
"""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from dumo.bound import CHANNELS, PIXELS
from dumo.codecs.scaled import Images, Latent, Moments, Opened, Scale, Scaled
from dumo.io.path import user_path
from dumo.io.weights import checked
from dumo.types import UserError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
HINT = f"codec.weights names a folder with {CONFIG} and {WEIGHTS}, or a model of the Hugging Face hub."
DEEP = {  # the scaling_factor in each published model's config
    "in": ("mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", 0.3189),
    "mix": ("mit-han-lab/dc-ae-f32c32-mix-1.0-diffusers", 0.4552),
    "sana": ("mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", 0.41407),
}


class SdVae(Scaled):
    """The VAE of Stable Diffusion 1: fine-tuned as ft-ema (the default), or as stabilityai/sd-vae-ft-mse.

    The scale is one over the deviation over the first batch it was trained on (Rombach et al. 2022, App. G).
    """

    kind: Literal["sd-vae"] = "sd-vae"
    gaussian: ClassVar[bool] = True
    channels: int = Field(default=4, ge=1, le=CHANNELS)
    factor: int = Field(default=8, ge=1, le=PIXELS)
    scale: Scale = 0.18215
    weights: str = "stabilityai/sd-vae-ft-ema"

    def open(self, device: str | torch.device = "cpu") -> Opened:
        """Read the weights. Raises UserError where diffusers or they are missing, damaged or not the ones meant."""
        net, found = _opened("AutoencoderKL", self)
        return Opened(self, Variational(net.to(device)), found, torch.device(device))


class DcAe(Scaled):
    """DC-AE f32c32 (Chen et al. 2024), one 32nd of the side: trained on ImageNet (in), a mixture (mix), or for SANA.

    Weights and scale follow from the variant, where they are not given. Its channels differ in scale: see `normalised`.
    """

    kind: Literal["dc-ae"] = "dc-ae"
    variant: Literal["in", "mix", "sana"] = "in"
    channels: int = Field(default=32, ge=1, le=CHANNELS)
    factor: int = Field(default=32, ge=1, le=PIXELS)

    @model_validator(mode="before")
    @classmethod
    def _of_the_variant(cls, given: Any) -> Any:  # noqa: ANN401, whatever was given is checked after this
        if not isinstance(given, dict):
            return given
        weights, scale = DEEP.get(str(given.get("variant", "in")), ("", 1.0))
        return {"weights": weights, "scale": scale} | given

    def open(self, device: str | torch.device = "cpu") -> Opened:
        """Read the weights. Raises UserError where diffusers or they are missing, damaged or not the ones meant."""
        net, found = _opened("AutoencoderDC", self)
        return Opened(self, Deep(net.to(device)), found, torch.device(device))


class Variational:
    """diffusers' AutoencoderKL."""

    def __init__(self, net: nn.Module) -> None:
        self.net: Any = net

    def encode(self, images: Images) -> Moments:
        """Means, then standard deviations."""
        law = self.net.encode(images).latent_dist
        return torch.cat([law.mean, law.std], 1)

    def decode(self, raw: Latent) -> Images:
        """Images, about in [-1, 1]."""
        return self.net.decode(raw).sample


class Deep:
    """diffusers' AutoencoderDC."""

    def __init__(self, net: nn.Module) -> None:
        self.net: Any = net

    def encode(self, images: Images) -> Moments:
        """The latent; there are no deviations."""
        return self.net.encode(images).latent

    def decode(self, raw: Latent) -> Images:
        """Images, about in [-1, 1]."""
        return self.net.decode(raw).sample


def _opened(name: str, codec: Scaled) -> tuple[nn.Module, str]:
    """The model of diffusers' class `name`, and the SHA-256 of its weights."""
    try:
        import diffusers  # slow to import, and an extra
    except ImportError as error:
        raise UserError(f"{codec.about} needs diffusers: pip install 'dumo[diffusers]'") from error
    folder = _folder(codec.weights)
    found = checked(_weights(folder), codec.sha256, HINT)
    try:
        model = getattr(diffusers, name)
        net, told = model.from_pretrained(folder, output_loading_info=True, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no {name} that diffusers can load ({error}). {HINT}") from error
    if wrong := [key for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in told.get(keys, ())]:
        raise UserError(f"{folder / WEIGHTS} does not fit its {CONFIG}: {wrong[0]} is missing, unknown or misshapen")
    blocks = net.config.get("block_out_channels") or net.config["encoder_block_out_channels"]
    has = (net.config["latent_channels"], 2 ** (len(blocks) - 1))
    if has != (codec.channels, codec.factor):
        raise UserError(f"{folder} has {has[0]} channels and factor {has[1]}, {codec.about} says {codec.channels}, "
                        f"{codec.factor}: set codec.channels and codec.factor, or take other weights")  # fmt: skip
    return net.float().eval().requires_grad_(False), found


def _folder(name: str) -> Path:
    """The folder of a model: a path, or what the hub's client keeps of a model named `owner/model`."""
    path = user_path(name, "codec.weights")
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"{name} is no folder. {HINT}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is no folder, and not available from the hub ({error}). {HINT}") from error


def _weights(folder: Path) -> Path:
    """The safetensors file in a folder, or the pickle that stands in its place."""
    pickled = (folder / WEIGHTS).with_suffix(".bin")
    return pickled if pickled.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS
