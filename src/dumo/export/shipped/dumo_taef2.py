"""The decoder of taef2, a tiny autoencoder for FLUX.2's latents (github.com/madebyollin/taesd, MIT).

`DumoTaef2.decode` is what a pipeline calls. This file lies in an exported model, next to the decoder's weights, and
dumo need not be installed there: it needs torch and diffusers alone. dumo keeps it in export/shipped, and
export/standalone.py copies it and writes the weights. They fit by the order of layers in `DumoTaef2.decoder`, which
must be that of `TinyAutoencoder.decoder` in dumo's encoders/taesd.py.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn


class Block(nn.Module):
    """relu(y + conv(relu(conv(relu(conv y))))), where y is x, or x plus a branch with a group norm if `has_pool`."""

    def __init__(self, width: int, *, has_pool: bool = False) -> None:
        """Take `width` channels, and give as many."""
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])
        wide = 4 * width
        branch = (nn.Conv2d(width, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU())
        self.pool = nn.Sequential(*branch, nn.Conv2d(wide, width, 1, bias=False)) if has_pool else None

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are (b, width, h, w)."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """3 tanh(x / 3), a soft bound on latents."""

    def forward(self, x: Tensor) -> Tensor:
        """Bound each number of x; the shape stays."""
        return 3 * torch.tanh(x / 3)


class DumoTaef2(ModelMixin, ConfigMixin):
    """A stack of blocks with three upsamplings, each of which doubles height and width."""

    @register_to_config
    def __init__(self, channels: int = 32, width: int = 64) -> None:
        """Take latents of `channels` channels; the layers between them and the image have `width`."""
        super().__init__()
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for has_pool in (True, False, False):
            layers += [Block(width, has_pool=has_pool) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, Block(width), nn.Conv2d(width, 3, 3, padding=1))

    @apply_forward_hook  # so that offloading brings the weights to the GPU
    def decode(self, latents: Tensor) -> DecoderOutput:
        """Decode latents (b, channels, h, w) to images (b, 3, 8 h, 8 w), about in [-1, 1]."""
        return DecoderOutput(sample=self.decoder(latents) * 2 - 1)
