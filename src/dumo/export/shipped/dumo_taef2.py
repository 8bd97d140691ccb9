"""The decoder of taef2, a tiny autoencoder for FLUX.2's latents (github.com/madebyollin/taesd, MIT)."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class Block(nn.Module):
    """Three convolutions and a skip; with `pool`, a branch of group norm before them."""

    def __init__(self, width: int, pool: bool) -> None:
        """For `width` channels."""
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])
        wide = 4 * width
        branch = (nn.Conv2d(width, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU())
        self.pool = nn.Sequential(*branch, nn.Conv2d(wide, width, 1, bias=False)) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are (b, width, h, w)."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """3 tanh(x / 3)."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return 3 * torch.tanh(x / 3)


class DumoTaef2(ModelMixin, ConfigMixin):
    """Three times twice the side."""

    @register_to_config
    def __init__(self, channels: int = 32, width: int = 64) -> None:
        """For latents of this many channels."""
        super().__init__()
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for pool in (True, False, False):
            layers += [Block(width, pool) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, Block(width, False), nn.Conv2d(width, 3, 3, padding=1))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Images, about in [-1, 1], eight times as large."""
        return DecoderOutput(sample=self.decoder(latents) * 2 - 1)
