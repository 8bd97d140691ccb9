"""Tiny autoencoders of the TAESD family: two plain stacks of 3x3 convolutions, an eighth of the side, images in [0, 1].

Madebyollin's TAESD (github.com/madebyollin/taesd, MIT) is distilled from large autoencoders. Its FLUX.2 variant, taef2,
has 32 channels and 2.68 M parameters, and blocks at the lowest resolution that see a wider view through a pool branch.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dumo.encoders.codec import FIELD, Images, Latent, Moments, Opened, Published, Scaled
from dumo.io.read import user_path
from dumo.io.weights import compare, load, whole_digest

WIDTH = 64
SHA256 = "ba389353bb096ea6ca323a1685d45ff8af8e1994f1c0d6fea810f5c1ef2a0db4"  # of taef2.safetensors
HINT = f"It is taef2 of github.com/madebyollin/taesd; say where you keep it with --set {FIELD}=..."


class Taef2(Scaled):
    """TAESD for FLUX.2's latent space.

    Its latent has a standard deviation of 0.83 over photographs at 256x256 and of 0.89 at 64x64 (measured on eight
    images of ImageNet), hence the scale of 1 / 0.83; its mean is near 0.
    """

    kind: Literal["taef2"] = "taef2"
    variants: ClassVar[Mapping[str, Published]] = {"": Published("$DUMO_DATA/taef2/taef2.safetensors", 32, 8, 1.2)}

    def open(self, device: str | torch.device = "cpu") -> Opened:
        """Read the weights. Raises UserError where they are missing, damaged or of another net."""
        file = user_path(self.weights, FIELD)
        self.require(found := whole_digest(file, HINT))
        with torch.device("meta"):
            net = Tiny(self.channels)
        compare(file, weights := load(file), net.state_dict(), "the codec", "these are other weights", dtypes=False)
        net.load_state_dict(weights, assign=True)
        return Opened(self, net.to(device, torch.float32).eval().requires_grad_(False), found, torch.device(device))


class Tiny(nn.Module):
    """Encoder and decoder; a latent pixel sees and makes 8x8 pixels and their surroundings."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv(3, WIDTH),
            TaesdBlock(),
            conv(WIDTH, WIDTH, stride=2),
            *blocks(),
            conv(WIDTH, WIDTH, stride=2),
            *blocks(),
            conv(WIDTH, WIDTH, stride=2),
            *blocks(pool=True),
            conv(WIDTH, channels),
        )
        self.decoder = nn.Sequential(
            Clamp(),
            conv(channels, WIDTH),
            nn.ReLU(),
            *blocks(pool=True),
            *upsample(),
            *blocks(),
            *upsample(),
            *blocks(),
            *upsample(),
            TaesdBlock(),
            conv(WIDTH, 3),
        )

    def encode(self, images: Images) -> Moments:
        """The latent; there are no deviations."""
        return self.encoder((images + 1) / 2)

    def decode(self, raw: Latent) -> Images:
        """Images, about in [-1, 1]."""
        return self.decoder(raw) * 2 - 1


class TaesdBlock(nn.Module):
    """relu(y + conv(relu(conv(relu(conv y))))), where y is x, plus the pool branch of x if there is one."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))
        wide = 4 * WIDTH
        branch = (nn.Conv2d(WIDTH, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU())
        self.pool = nn.Sequential(*branch, nn.Conv2d(wide, WIDTH, 1, bias=False)) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are (b, 64, h, w)."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """3 tanh(x / 3): a soft bound on what is decoded."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return 3 * torch.tanh(x / 3)


def blocks(pool: bool = False) -> list[TaesdBlock]:
    """Three of a kind."""
    return [TaesdBlock(pool) for _ in range(3)]


def upsample() -> list[nn.Module]:
    """Twice the side."""
    return [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]


def conv(a: int, b: int, *, stride: int = 1, bias: bool | None = None) -> nn.Conv2d:
    """A 3x3 convolution; those that halve the side have no bias."""
    return nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=stride == 1 if bias is None else bias)
