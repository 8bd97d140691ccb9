"""Networks as people write them, for `dumo.Flow`: arguments in any order, dropout, text."""

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.types import Needs


def waves(t: Tensor) -> Tensor:
    """Of up to 10 radians, (b, 16)."""
    angles = t[:, None] * torch.logspace(0, 1, 8, dtype=t.dtype, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], 1)


class Perceptron(nn.Module):
    """Points (b, 2): a tuple of heads, then gauges. What is left of its arguments are knobs."""

    def __init__(self, needs: Needs, classes: int = 0) -> None:
        super().__init__()
        self.heads = len(needs.heads)
        self.gauges = len(needs.gauges)
        knobs = len(set(needs.names) - {"t", "r"})
        self.label = nn.Embedding(classes + 1, 16) if classes else None
        self.body = nn.Sequential(nn.Linear(2 + 32 + knobs, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU())
        self.out = nn.Linear(16, 2 * self.heads + self.gauges)

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, c: Tensor | None = None, **knobs: Tensor
    ) -> tuple[Tensor, ...]:
        end = t if r is None else r
        h = torch.cat([x, waves(t), waves(end), *(knob[:, None] for knob in knobs.values())], 1)
        h = self.body(h)
        if self.label is not None and c is not None:
            h = h + self.label(c)
        out = self.out(h)
        heads = out[:, : 2 * self.heads].chunk(self.heads, 1)
        return (*heads, *out[:, 2 * self.heads :].unbind(1))


class UNet(nn.Module):
    """Images (b, 1, 8, 8), with the class before the time."""

    def __init__(self, classes: int = 0, dropout: float = 0.0, norm: str = "group", activation: str = "silu") -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 8, 3, padding=1)
        self.time = nn.Linear(16, 8)
        self.label = nn.Embedding(classes + 1, 8) if classes else None
        self.norm = nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8)
        self.act = nn.LeakyReLU(0.3, inplace=True) if activation == "leaky" else nn.SiLU()
        self.dropout = nn.Dropout(dropout)
        self.mid = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = nn.Upsample(scale_factor=2)
        self.out = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor | None = None, *, t: Tensor) -> tuple[Tensor, ...]:
        e = self.time(waves(t))
        if self.label is not None and c is not None:
            e = e + self.label(c)
        h = self.act(self.norm(self.down(x) + e[:, :, None, None]))
        low = self.dropout(self.mid(h))
        return self.out(torch.cat([h, self.up(low)], 1)).chunk(2, 1)


class Patches(nn.Module):
    """Images (b, 1, 8, 8), by einops."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4 + 16, 16)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = einops.rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        e = einops.repeat(waves(t), "b d -> b n d", n=h.shape[1])
        h = self.out(F.gelu(self.into(torch.cat([h, e], -1))))
        v, u = (einops.rearrange(y, "b (h w) (p q) -> b 1 (h p) (w q)", h=4, p=2, q=2) for y in h.chunk(2, -1))
        return v, u


class Encoder(nn.Module):
    """Images (b, 1, 8, 8) as 16 tokens through torch's encoder, with dropout as it comes."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.into = nn.Linear(4, 16)
        self.time = nn.Linear(16, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        h = self.into(x.reshape(-1, 16, 4)) + self.time(waves(t))[:, None]
        return self.out(self.body(h)).transpose(1, 2).reshape(-1, 2, 8, 8).chunk(2, 1)


class Numbers(nn.Module):
    """Points (b, 2) with numbers (b, 3) as their condition."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Perceptron(Needs(heads=("v", "u")))
        self.given = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return self.body(x + self.given(c), t)


class Text(nn.Module):
    """Images (b, 1, 8, 8) that attend to tokens (b, n, 5) beside a vector (b, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 16)
        self.time = nn.Linear(16, 16)
        self.read = nn.Linear(5, 16)
        self.pool = nn.Linear(3, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor, t: Tensor, c: dict[str, Tensor]) -> tuple[Tensor, ...]:
        h = self.into(x.reshape(-1, 16, 4)) + (self.time(waves(t)) + self.pool(c["pooled"]))[:, None]
        words = self.read(c["tokens"])
        h = h + self.attend(h, words, words, need_weights=False)[0]
        return self.out(F.silu(h)).transpose(1, 2).reshape(-1, 2, 8, 8).chunk(2, 1)
