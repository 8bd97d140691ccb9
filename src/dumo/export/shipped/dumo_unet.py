"""A U-Net with several heads, as EDM's for CIFAR-10 (Karras et al. 2022): `DumoUNet`, which a pipeline calls.

This file lies in an exported model, next to the weights, and dumo need not be installed there: it needs torch and
diffusers alone. dumo keeps it in export/shipped; export/standalone.py copies it, writes the weights, and refuses a
model whose output is not, bit by bit, that of dumo's own net (nets/unet.py).

The names of attributes are the keys of the weights, and the arguments of `DumoUNet` those of its config: neither can be
renamed.

Time runs from t = 0, an image, to t = 1, noise: x_t = (1 - t) x + t z. Head u is a mean velocity, which jumps to an
earlier time r, x_r = x_t - (t - r) u, where r = 0 is the image; head v is the velocity dx_t/dt of the flow.
"""

from collections.abc import Mapping, Sequence
from math import gcd, log, sqrt

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WAVES = 128  # frequencies of the embedding of times that one head reads
SKIP_SCALE = sqrt(0.5)  # keeps the variance of a sum of two


def group_norm(channels: int) -> nn.GroupNorm:
    """A norm of groups of at least four channels, at most 32 groups."""
    return nn.GroupNorm(gcd(32, channels // 4), channels, 1e-6)


class Times(nn.Module):
    """The sum of the embeddings of one or two times: of t, and for r of the gap t - r."""

    def __init__(self, names: Sequence[str], width: int, time_scale: float, waves: int) -> None:
        """For the times `names`, t or r, by `waves` frequencies; an embedding has `width` numbers."""
        super().__init__()
        self.time_scale = time_scale
        self.waves = waves
        self.embedders = nn.ModuleDict()
        for name in names:
            self.embedders[name] = nn.Sequential(nn.Linear(2 * waves, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, r: Tensor, wave_offset: Tensor | None = None) -> Tensor:
        """Return (b, width), given times (b,); `wave_offset` (b, 2 waves) is added to the waves of each."""
        frequencies = torch.exp(-log(10_000.0) * torch.arange(self.waves, device=t.device) / self.waves)
        parts: list[Tensor] = []
        for name, embedder in self.embedders.items():
            time = t if name == "t" else t - r
            angles = time[:, None] * (self.time_scale * frequencies)
            waves = torch.cat([angles.cos(), angles.sin()], -1).to(next(embedder.parameters()).dtype)
            parts.append(embedder(waves if wave_offset is None else waves + wave_offset))
        return sum(parts[1:], parts[0])


class Block(nn.Module):
    """Two convolutions and a skip, then perhaps attention."""

    def __init__(
        self, channels: int, out_channels: int, embed_width: int, *, attends: bool, resample: str = ""
    ) -> None:
        """From `channels` to `out_channels`, given `embed_width` numbers. `resample`: half, double, or neither."""
        super().__init__()
        self.attends = attends
        self.resample = resample
        self.norm_1 = group_norm(channels)
        self.conv_1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.shift = nn.Linear(embed_width, out_channels)
        self.norm_2 = group_norm(out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if channels == out_channels and not resample else nn.Conv2d(channels, out_channels, 1)
        if attends:
            self.norm_3 = group_norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.out = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Map h (b, channels, side, side) to (b, out_channels, ...), given the condition e (b, embed_width)."""
        # convolutions
        residual = self.conv_1(self.resampled(F.silu(self.norm_1(h)))) + self.shift(e)[:, :, None, None]
        residual = self.conv_2(F.silu(self.norm_2(residual)))
        h = (self.skip(self.resampled(h)) + residual) * SKIP_SCALE
        if not self.attends:
            return h

        # attention of one head
        b, channels, side, _ = h.shape
        q, k, v = self.qkv(self.norm_3(h)).view(b, 3, 1, -1, side**2).transpose(3, 4).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, channels, side, side)
        return (h + self.out(attended)) * SKIP_SCALE

    def resampled(self, h: Tensor) -> Tensor:
        """Halve or double the side of h, or return it as it is."""
        if self.resample == "half":
            return F.avg_pool2d(h, 2)
        if self.resample == "double":
            return F.interpolate(h, scale_factor=2.0, mode="nearest")
        return h


class Head(nn.Sequential):
    """An output layer: a norm, modulated by the times that this head alone reads, SiLU, a convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        """From `channels` to `out_channels`."""
        super().__init__(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, input: Tensor, modulation: Tensor | None = None) -> Tensor:
        """Map (b, channels, side, side) to (b, out_channels, side, side).

        `modulation` (b, 2 channels) is shift and scale.
        """
        norm, silu, conv = self
        h = norm(input)
        if modulation is not None:
            shift, scale = modulation[:, :, None, None].chunk(2, 1)
            h = h * (1 + scale) + shift
        return conv(silu(h))


class DumoUNet(ModelMixin, ConfigMixin):
    """The net: `DumoUNet.from_pretrained(folder)`, then `(u,) = net(x, t, c)`, and x - t u is the image."""

    @register_to_config
    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        width: int,
        multipliers: Sequence[int],
        depth: int,
        attend: Sequence[int],
        time_scale: float = 1.0,
        time_names: Sequence[str] = ("t",),
        head_names: Sequence[str] = ("v", "u"),
        own_time_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """For square images of `side` pixels, or latents of that side; `classes` 0: it takes no label.

        A level has `depth` blocks of `width` times its entry of `multipliers` channels, and half the side of the level
        above. `attend` are the sides with attention. Times are multiplied by `time_scale`. `own_time_names` are the
        times that single heads read, by head.
        """
        super().__init__()
        embed_width = 4 * width
        self.times = Times(time_names, embed_width, time_scale, width // 2)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.embed = nn.Conv2d(channels, width, 3, padding=1)

        # each block, and what it does with skip connections (`add`)
        self.blocks = nn.ModuleList()
        self.skip_uses: list[str] = []
        in_channels = width  # of the next block
        skip_channels = [in_channels]  # of the outputs that are kept for the way up

        # down
        for level, multiplier in enumerate(multipliers):
            attends = side >> level in attend
            if level:
                self.add(Block(in_channels, in_channels, embed_width, attends=False, resample="half"), skip_use="keep")
                skip_channels.append(in_channels)
            for _ in range(depth):
                self.add(Block(in_channels, width * multiplier, embed_width, attends=attends), skip_use="keep")
                in_channels = width * multiplier
                skip_channels.append(in_channels)

        # middle
        self.add(Block(in_channels, in_channels, embed_width, attends=True))
        self.add(Block(in_channels, in_channels, embed_width, attends=False))

        # up: in each level the last block alone attends, as in EDM
        for level in reversed(range(len(multipliers))):
            if level < len(multipliers) - 1:
                self.add(Block(in_channels, in_channels, embed_width, attends=False, resample="double"))
            for i in range(depth + 1):
                attends = side >> level in attend and i == depth
                out_channels = width * multipliers[level]
                block = Block(in_channels + skip_channels.pop(), out_channels, embed_width, attends=attends)
                self.add(block, skip_use="take")
                in_channels = out_channels

        self.own = nn.ModuleDict()
        for name, names in (own_time_names or {}).items():
            self.own[name] = Times(names, 2 * in_channels, time_scale, HEAD_WAVES)
        self.heads = nn.ModuleDict({name: Head(in_channels, channels) for name in head_names})

    def add(self, block: Block, *, skip_use: str = "") -> None:
        """Add a block.

        `skip_use` "keep": its output is kept for the way up; "take": the last output that was kept is joined to its
        input; "": neither.
        """
        self.blocks.append(block)
        self.skip_uses.append(skip_use)

    def forward(
        self, x: Tensor, t: Tensor, c: Tensor, heads: Sequence[str] = ("u",), r: Tensor | None = None
    ) -> list[Tensor]:
        """Return the outputs of `heads`, of the shape of x (b, channels, side, side), at times t (b,).

        c (b,) are labels; the index `classes` is for no label. r (b,) is where a jump ends; None: at the image. It
        counts only for a net whose times include r.
        """
        if r is None:
            r = torch.zeros_like(t)
        label = None if self.label is None else self.label(c)
        e = F.silu(self.times(t, r, label))
        h = self.embed(x.to(self.dtype))
        skips = [h]  # outputs for the way up
        for block, skip_use in zip(self.blocks, self.skip_uses, strict=True):
            if skip_use == "take":
                h = torch.cat([h, skips.pop()], 1)
            h = block(h, e)
            if skip_use == "keep":
                skips.append(h)
        outputs: list[Tensor] = []
        for name in heads:
            modulation = self.own[name](t, r) if name in self.own else None
            outputs.append(self.heads[name](h, modulation).to(x.dtype))
        return outputs
