"""A Diffusion Transformer with several heads: `DumoDiT`, which a pipeline calls at each pass.

This file lies in an exported model, next to the weights, and dumo need not be installed there: it needs torch and
diffusers alone. dumo keeps it in export/shipped; export/standalone.py copies it, writes the weights, and refuses a
model whose output is not, bit by bit, that of dumo's own net (nets/dit.py).

Time runs from t = 0, an image, to t = 1, noise: x_t = (1 - t) x + t z. Head u jumps to the image, x = x_t - t u; head v
is the velocity dx_t/dt of the flow.
"""

from collections.abc import Sequence
from math import log

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

WAVES = 128  # frequencies of the embedding of time


def norm(h: Tensor) -> Tensor:
    """Scale h (..., width) to mean 0 and variance 1 over the last axis."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6)


class Block(nn.Module):
    """Attention and perceptron, each modulated and gated by the condition."""

    def __init__(self, width: int, attention: int) -> None:
        """For tokens of `width` numbers; `attention` is the number of attention heads."""
        super().__init__()
        self.attention = attention
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Map tokens h (b, tokens, width) to the same shape, given the condition e (b, width)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(e).unsqueeze(1).chunk(6, -1)
        a = norm(h) * (1 + scale_1) + shift_1
        q, k, v = self.qkv(a).view(*a.shape[:2], 3, self.attention, -1).permute(2, 0, 3, 1, 4).unbind(0)
        h = h + gate_1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        a = norm(h) * (1 + scale_2) + shift_2
        return h + gate_2 * self.down(F.gelu(self.up(a), approximate="tanh"))


class Head(nn.Module):
    """An output layer: a norm, modulated by the condition, then a linear layer."""

    def __init__(self, width: int, out: int) -> None:
        """Map tokens of `width` numbers to `out` numbers each."""
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Map tokens h (b, tokens, width) to (b, tokens, out), given the condition e (b, width)."""
        shift, scale = self.modulation(e).unsqueeze(1).chunk(2, -1)
        return self.out(norm(h) * (1 + scale) + shift)


class DumoDiT(ModelMixin, ConfigMixin):
    """The net. All its embeddings of time take t: a net that learned of a second time r is used at r = 0."""

    @register_to_config
    def __init__(
        self,
        channels: int,
        side: int,
        classes: int,
        patch: int,
        width: int,
        depth: int,
        attention: int,
        time_scale: float = 1.0,
        time_names: Sequence[str] = ("t",),
        head_names: Sequence[str] = ("v", "u"),
    ) -> None:
        """For square images of `side` pixels, or latents of that side; `classes` 0: it takes no label."""
        super().__init__()
        self.patch = patch
        self.grid = side // patch  # patches on a side
        self.time_scale = time_scale
        self.embed = nn.Linear(channels * patch**2, width)
        self.register_buffer("positions", torch.zeros(self.grid**2, width))
        self.times = nn.ModuleDict()
        for name in time_names:
            self.times[name] = nn.Sequential(nn.Linear(2 * WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList(Block(width, attention) for _ in range(depth))
        self.heads = nn.ModuleDict({name: Head(width, channels * patch**2) for name in head_names})

    def forward(self, x: Tensor, t: Tensor, c: Tensor, head: str = "u") -> Tensor:
        """Return the output of `head`, of the shape of x (b, channels, side, side), at times t (b,).

        c (b,) are labels; the index `classes` is for no label.
        """
        b = len(x)
        g = self.grid
        p = self.patch
        tokens = x.reshape(b, -1, g, p, g, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        h = self.embed(tokens.to(self.dtype)) + self.positions
        falling = torch.exp(-log(10_000.0) * torch.arange(WAVES, device=t.device) / WAVES)
        angles = t[:, None] * (self.time_scale * falling)
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.dtype)
        e, *others = [embed(waves) for embed in self.times.values()]
        for other in others:
            e = e + other
        if self.label is not None:
            e = e + self.label(c)
        e = F.silu(e)
        for block in self.blocks:
            h = block(h, e)
        y = self.heads[head](h, e).view(b, g, g, -1, p, p)
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).to(x.dtype)
