"""A Diffusion Transformer with several heads: `DumoDiT`, which a pipeline calls at each pass.

This file lies in an exported model, next to the weights, and dumo need not be installed there: it needs torch and
diffusers alone. dumo keeps it in export/shipped; export/standalone.py copies it, writes the weights, and refuses a
model whose output is not, bit by bit, that of dumo's own net (nets/dit.py).

Time runs from t = 0, an image, to t = 1, noise: x_t = (1 - t) x + t z. Head u is a mean velocity, which jumps to an
earlier time r, x_r = x_t - (t - r) u, where r = 0 is the image; head v is the velocity dx_t/dt of the flow.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

Text = tuple[Tensor, Tensor | None, Tensor | None]  # embeddings (b, l, d), mask (b, l), and of all words (b, p)

WAVES = 128  # frequencies of the embedding of a time
EPS = 1e-6  # of all norms
GELU_RMS = 0.652  # the root of E[gelu(x)^2], x ~ N(0, 1)
SWIGLU_RMS = 0.596  # that of silu(x) y


def norm(h: Tensor, *, rms: bool) -> Tensor:
    """Scale h (..., width) over the last axis to mean square 1 with `rms`, else to mean 0 and variance 1."""
    if rms:
        return F.rms_norm(h, h.shape[-1:], eps=EPS)
    return F.layer_norm(h, h.shape[-1:], eps=EPS)


def head_norm(size: int, *, is_used: bool) -> nn.Module:
    """A norm of queries or keys, of `size` numbers for an attention head; the identity where none is used."""
    return nn.RMSNorm(size, eps=EPS) if is_used else nn.Identity()


def rotate(a: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys a (b, heads, tokens, size) by angles of their positions, (tokens, size / 2)."""
    first, second = a.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


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
    """Attention and a perceptron, each modulated and gated by the condition.

    A modern block has RMS norms, norms of queries and keys, and a gated perceptron. A preserving one keeps the mean
    square of what its layers take and give at 1 (EDM2, Karras et al. 2024): their rows have length 1. One that reads
    texts lets the image attend to the text between attention and perceptron (PixArt-alpha, Chen et al. 2023).
    """

    def __init__(
        self, width: int, attention: int, *, modern: bool, preserving: bool, qk_norm: bool, reads_text: bool
    ) -> None:
        """For tokens of `width` numbers; `attention` is the number of attention heads."""
        super().__init__()
        self.attention = attention
        self.modern = modern
        self.preserving = preserving
        hidden = 8 * round(width / 3) if modern else 4 * width
        bias = not preserving
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, 2 * hidden if modern else hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)
        has_norms = modern or qk_norm
        self.q_norm = head_norm(width // attention, is_used=has_norms)
        self.k_norm = head_norm(width // attention, is_used=has_norms)
        if reads_text:
            self.query = nn.Linear(width, width)
            self.kv = nn.Linear(width, 2 * width)
            self.read = nn.Linear(width, width)
            self.query_norm = head_norm(width // attention, is_used=has_norms)
            self.key_norm = head_norm(width // attention, is_used=has_norms)

    def forward(self, h: Tensor, e: Tensor, words: tuple[Tensor, Tensor | None] | None, *rotary: Tensor) -> Tensor:
        """Map tokens h (b, tokens, width) to the same shape, given the condition e (b, width).

        `words` are those of a text (b, l, width), and which of them there are, (b, l) or None for all; None: it reads
        none. `rotary` are cosines and sines for `rotate`, or nothing.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(e).unsqueeze(1).chunk(6, -1)
        h = self.add(h, gate_1, self.attend(self.layer_input(h, shift_1, scale_1), *rotary))
        if words is not None:
            h = h + self.attend_to_text(h, *words)
        return self.add(h, gate_2, self.perceive(self.layer_input(h, shift_2, scale_2)))

    def layer_input(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Modulate and normalize h."""
        if self.preserving:
            return norm(h * (1 + scale) + shift, rms=self.modern)
        return norm(h, rms=self.modern) * (1 + scale) + shift

    def attend(self, a: Tensor, *rotary: Tensor) -> Tensor:
        """Attend over the tokens of a (b, tokens, width)."""
        q, k, v = self.qkv(a).view(*a.shape[:2], 3, self.attention, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rotary:
            q = rotate(q, *rotary)
            k = rotate(k, *rotary)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def attend_to_text(self, h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """Let h (b, tokens, width) attend to the words y (b, l, width) that are in the mask (b, l); None: to all."""
        q = self.query(h).view(*h.shape[:2], self.attention, -1).transpose(1, 2)
        k, v = self.kv(y).view(*y.shape[:2], 2, self.attention, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.query_norm(q)
        k = self.key_norm(k)
        key_mask = None if mask is None else mask[:, None, None]
        return self.read(F.scaled_dot_product_attention(q, k, v, key_mask).transpose(1, 2).flatten(2))

    def perceive(self, a: Tensor) -> Tensor:
        """Apply the perceptron to each token of a (b, tokens, width)."""
        if self.modern:
            gate, up = self.up(a).chunk(2, -1)
            a = self.down(F.silu(gate) * up)
        else:
            a = self.down(F.gelu(self.up(a), approximate="tanh"))
        if self.preserving:
            a = a / (SWIGLU_RMS if self.modern else GELU_RMS)
        return a

    def add(self, h: Tensor, gate: Tensor, a: Tensor) -> Tensor:
        """Add the gated branch a to h, all (b, tokens, width)."""
        if self.preserving:
            return (h + gate * a) / (1 + gate * gate) ** 0.5
        return h + gate * a


class Head(nn.Module):
    """An output layer: a norm, modulated by the condition, then a linear layer."""

    def __init__(self, width: int, out: int, *, modern: bool) -> None:
        """Map tokens of `width` numbers to `out` numbers each."""
        super().__init__()
        self.modern = modern
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, out)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Map tokens h (b, tokens, width) to (b, tokens, out), given the condition e (b, width)."""
        shift, scale = self.modulation(e).unsqueeze(1).chunk(2, -1)
        return self.out(norm(h, rms=self.modern) * (1 + scale) + shift)


class TextEmbedder(nn.Module):
    """Maps a text to the width of the net."""

    def __init__(self, text_width: int, pooled_width: int, width: int) -> None:
        """For words of `text_width` numbers, and `pooled_width` of all words together; 0: there are none of these."""
        super().__init__()
        self.token = nn.Linear(text_width, width)
        self.pool = nn.Linear(pooled_width, width) if pooled_width else None

    def forward(self, text: Text) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return a vector (b, width) that is read as a label is, or None; the words (b, l, width), and their mask."""
        embeddings, mask, pooled = text
        y = norm(self.token(embeddings.to(self.token.weight.dtype)), rms=True)
        vector = None if self.pool is None or pooled is None else self.pool(pooled.to(y.dtype))
        return vector, y, mask


class DumoDiT(ModelMixin, ConfigMixin):
    """The net."""

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
        precondition: str = "none",
        modern: bool = False,
        magnitude: str = "free",
        late: int | None = None,
        time_names: Sequence[str] = ("t",),
        head_names: Sequence[str] = ("v", "u"),
        own_time_names: Mapping[str, Sequence[str]] | None = None,
        qk_norm: bool = False,
        text_width: int = 0,
        pooled_width: int = 0,
    ) -> None:
        """For square images of `side` pixels, or latents of that side; `classes` 0: it takes no label.

        `own_time_names` are the times that single heads read, by head. The blocks after `late`, and the heads, read r
        for t. With `text_width` it reads texts instead of labels (`TextEmbedder`).
        """
        super().__init__()
        self.patch = patch
        self.grid = side // patch  # patches on a side
        self.precondition = precondition
        self.modern = modern
        self.preserving = magnitude == "preserved"
        self.late = late
        self.embed = nn.Linear(channels * patch**2, width)
        tokens = self.grid**2
        if modern:
            self.register_buffer("cos", torch.zeros(tokens, width // attention // 2))
            self.register_buffer("sin", torch.zeros(tokens, width // attention // 2))
        else:
            self.register_buffer("positions", torch.zeros(tokens, width))
        self.times = Times(time_names, width, time_scale, WAVES)
        self.own = nn.ModuleDict()
        for name, names in (own_time_names or {}).items():
            self.own[name] = Times(names, width, time_scale, WAVES)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.text = TextEmbedder(text_width, pooled_width, width) if text_width else None
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = Block(
                width,
                attention,
                modern=modern,
                preserving=self.preserving,
                qk_norm=qk_norm,
                reads_text=self.text is not None,
            )
            self.blocks.append(block)
        self.heads = nn.ModuleDict({name: Head(width, channels * patch**2, modern=modern) for name in head_names})

    def forward(
        self, x: Tensor, t: Tensor, c: Tensor | Text, heads: Sequence[str] = ("u",), r: Tensor | None = None
    ) -> list[Tensor]:
        """Return the outputs of `heads`, of the shape of x (b, channels, side, side), at times t (b,).

        c (b,) are labels; the index `classes` is for no label. Of a net that reads texts, c are these. r (b,) is where
        a jump ends; None: at the image.
        """
        if r is None:
            r = torch.zeros_like(t)
        x_in, to_velocity = self.preconditioned(x, t)
        b = len(x)
        g = self.grid
        p = self.patch
        tokens = x_in.reshape(b, -1, g, p, g, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        h = self.embed(tokens.to(self.dtype))
        rotary = (self.cos, self.sin) if self.modern else ()
        if not self.modern:
            h = h + self.positions
        if self.preserving:
            h = norm(h, rms=True)

        e = self.times(t, r)
        e_late = e if self.late is None else self.times(r, r)
        label = None if self.label is None else self.label(c)
        words = None
        if self.text is not None:
            label, y, mask = self.text(c)
            words = (y, mask)
        if label is not None:
            e = e + label
            e_late = e_late + label
        for i, block in enumerate(self.blocks):
            is_late = self.late is not None and i >= self.late
            h = block(h, F.silu(e_late if is_late else e), words, *rotary)

        outputs: list[Tensor] = []
        for name in heads:
            e_head = e_late + self.own[name](t, r) if name in self.own else e_late
            y = self.heads[name](h, F.silu(e_head)).view(b, g, g, -1, p, p)
            y = y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).to(x.dtype)
            outputs.append(to_velocity(y))
        return outputs

    def preconditioned(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return what the layers read for x at times t, and the function from what they give to a velocity.

        With "edm" both have variance 1 at every time (Karras et al. 2022, Tab. 1).
        """
        if self.precondition == "none":
            return x, lambda y: y
        time = t[:, None, None, None]
        n = (time * time + (1 - time) * (1 - time)) ** 0.5
        skip = (2 * time - 1) / (n * n) * x
        return x / n, lambda y: skip - y / n
