"""Tiny autoencoders of the TAESD family: 3x3 convolutions, a downsampling factor of 8, images in [0, 1].

Madebyollin's TAESD (github.com/madebyollin/taesd, MIT) is distilled from large autoencoders. Its FLUX.2 variant, taef2,
has 32 channels, 2.68 M parameters, and a pool branch in the blocks at the lowest resolution.

`Taef2` is the spec of the codec, and `Taef2.open` loads the weights into a `TinyAutoencoder`, whose layer order is that
of the published file. An export copies a decoder with the same layer order, `export/shipped/dumo_taef2.py`.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dumo.encoders.codec import FIELD, CodecSpec, Images, Latent, LoadedCodec, Moments, PublishedCodec
from dumo.io.read import user_path
from dumo.io.tensor_files import compare, load, whole_digest

WIDTH = 64  # channels inside the net
TAEF2_WEIGHTS = "dumo:cifar10-trained/taef2.safetensors"  # bundled with dumo


class Taef2(CodecSpec):
    """TAESD for FLUX.2's latent space.

    Its latent has a standard deviation of 0.83 over photographs at 256x256 and of 0.89 at 64x64 (measured on eight
    images of ImageNet), hence the scale of 1 / 0.83; its mean is near 0.
    """

    kind: Literal["taef2"] = "taef2"
    variants: ClassVar[Mapping[str, PublishedCodec]] = {
        "": PublishedCodec(TAEF2_WEIGHTS, channels=32, factor=8, scale=1.2)
    }

    def open(self, device: str | torch.device = "cpu") -> LoadedCodec:
        """Load the weights. Raises UserError if they are missing, damaged or of another net."""
        file = user_path(self.weights, FIELD)
        fix = f"It is taef2 of github.com/madebyollin/taesd: set {FIELD} to its file"
        sha256 = whole_digest(file, fix)
        self.require_hash(sha256)
        with torch.device("meta"):
            net = TinyAutoencoder(self.channels)
        weights = load(file)
        compare(file, weights, net.state_dict(), "the codec", "these are other weights", dtypes=False)
        net.load_state_dict(weights, assign=True)
        net = net.to(device, torch.float32).eval().requires_grad_(False)
        return LoadedCodec(self, net, sha256, torch.device(device))


class TinyAutoencoder(nn.Module):
    """Encoder and decoder, with a downsampling factor of 8."""

    def __init__(self, channels: int) -> None:
        """Create the net for latents with `channels` channels."""
        super().__init__()
        self.encoder = nn.Sequential(
            _conv(3, WIDTH),
            TaesdBlock(),
            _halving_conv(),
            *_three_blocks(),
            _halving_conv(),
            *_three_blocks(),
            _halving_conv(),
            *_three_blocks(has_pool=True),
            _conv(WIDTH, channels),
        )
        self.decoder = nn.Sequential(
            Clamp(),
            _conv(channels, WIDTH),
            nn.ReLU(),
            *_three_blocks(has_pool=True),
            *_upsampling(),
            *_three_blocks(),
            *_upsampling(),
            *_three_blocks(),
            *_upsampling(),
            TaesdBlock(),
            _conv(WIDTH, 3),
        )

    def encode(self, images: Images) -> Moments:
        """Encode images (b, 3, 8 h, 8 w) in [-1, 1] to latents (b, channels, h, w), without deviations."""
        return self.encoder((images + 1) / 2)

    def decode(self, raw: Latent) -> Images:
        """Decode latents (b, channels, h, w) to images (b, 3, 8 h, 8 w), about in [-1, 1]."""
        return self.decoder(raw) * 2 - 1


class TaesdBlock(nn.Module):
    """relu(y + conv(relu(conv(relu(conv y))))), where y is x, or x plus its pool branch."""

    def __init__(self, *, has_pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(WIDTH, WIDTH),
            nn.ReLU(),
            _conv(WIDTH, WIDTH),
            nn.ReLU(),
            _conv(WIDTH, WIDTH),
        )
        self.pool = _pool_branch() if has_pool else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, WIDTH, h, w) to the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """3 tanh(x / 3), a soft bound on the decoder's input."""

    def forward(self, x: Tensor) -> Tensor:
        """Bound each number of x."""
        return 3 * torch.tanh(x / 3)


def _three_blocks(*, has_pool: bool = False) -> list[TaesdBlock]:
    """Return the blocks at one resolution."""
    return [TaesdBlock(has_pool=has_pool) for _ in range(3)]


def _pool_branch() -> nn.Sequential:
    """Return a branch with a group norm at four times the width. It keeps the shape (b, WIDTH, h, w)."""
    wide = 4 * WIDTH
    return nn.Sequential(
        nn.Conv2d(WIDTH, wide, 1, bias=False),
        nn.GroupNorm(4, wide),
        nn.ReLU(),
        nn.Conv2d(wide, WIDTH, 1, bias=False),
    )


def _upsampling() -> list[nn.Module]:
    """Return layers that double height and width."""
    return [nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]


def _halving_conv() -> nn.Conv2d:
    """Return a 3 x 3 convolution that halves height and width."""
    return nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3 x 3 convolution from `inputs` to `outputs` channels that keeps height and width."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)
