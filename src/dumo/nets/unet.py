"""The U-Net that EDM trains on CIFAR-10 (Karras et al. 2022, Tab. 7, "DDPM++"), after Song et al. 2021, DDPM++.

Residual blocks at falling resolution, two in the middle, and blocks at rising resolution, each of which takes in one
output of the way down. Halving is the mean of 2 x 2 places and doubling their repetition: the filter [1, 1].
With 3 channels in and out and one head it has 55.73 M parameters. That is EDM's net, except for the times, which enter
as in all nets of dumo (`Scalars`), and for the last convolution of each branch, which starts at zero, not at 1e-5 of
its size.

A head is one output layer: norm, SiLU, convolution; a further one has 7 k parameters.
"""

from collections.abc import Iterator
from math import gcd, sqrt
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from dumo.flow import dropout
from dumo.flow.dropout import Keys, drop
from dumo.nets.embed import Gauges, Own, Scalars, label_table, side_of
from dumo.nets.precondition import Precondition
from dumo.runtime.bound import BLOCKS, CHANNELS, FACTOR
from dumo.types import Array, Cond, Heads, Needs, Sample, Spec, Time, UserError

EPS = 1e-6  # of group norms: Song et al.
EMBED = 4  # width of the embedding over the net's


class UNet(Spec):
    """A U-Net by its sizes; the defaults are EDM's for CIFAR-10. Attention has one head, as there."""

    kind: Literal["unet"] = "unet"
    precondition: ClassVar[Precondition] = "none"
    texts: ClassVar[None] = None
    lora: ClassVar[None] = None
    checkpoint: ClassVar[None] = None
    width: int = Field(default=128, ge=4, le=CHANNELS, multiple_of=4)  # channels at multiplier 1
    # of the channels, per resolution
    multipliers: tuple[Annotated[int, Field(ge=1, le=CHANNELS)], ...] = Field(
        default=(2, 2, 2), min_length=1, max_length=14
    )
    depth: int = Field(default=4, ge=1, le=BLOCKS)  # blocks per resolution on the way down; one more on the way up
    attend: tuple[int, ...] = (16,)  # image sides with attention; the middle always has it
    dropout: float = Field(default=0.0, ge=0, lt=1)  # EDM: 0.13 for CIFAR-10
    augment: int = Field(default=0, ge=0, le=CHANNELS)  # numbers that describe an augmentation; EDM has 9
    time_scale: float = Field(default=1.0, gt=0, le=FACTOR)  # times enter raw (UCGM)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> "Convolutional":
        """A net with the inputs, heads and gauges of `needs` for square images of `shape`; 0 classes: no label.

        Raises UserError where the sizes do not fit one another or the images.
        """
        if side_of(shape, self.kind) % (factor := 2 ** (len(self.multipliers) - 1)):
            raise UserError(
                f"net.multipliers names {len(self.multipliers)} resolutions, so the image side must be a multiple of "
                f"{factor}, not {shape[1]}"
            )
        if self.augment and classes:
            raise UserError(
                f"net.augment takes {self.augment} numbers as the condition c, but the data has {classes} classes: "
                "use net.augment=0, or data without labels"
            )
        return Convolutional(self, needs, shape, classes)


class BlockPlace(NamedTuple):
    """The channels and the role of a block, by its place in the net."""

    into: int  # channels
    out: int
    way: Literal["down", "through", "up"]  # down: its output is kept; up: it takes in the last kept output
    attends: bool = False
    resample: Literal["half", "same", "double"] = "same"


def plan(spec: UNet, side: int) -> Iterator[BlockPlace]:
    """The blocks in their order, for images of this side."""
    widths = [spec.width * m for m in spec.multipliers]
    attends = [side >> level in spec.attend for level in range(len(widths))]
    now = spec.width
    bottom = len(widths) - 1
    kept = [now]
    for level, out in enumerate(widths):
        if level:
            yield BlockPlace(now, now, "down", resample="half")
            kept.append(now)
        for _ in range(spec.depth):
            yield BlockPlace(now, now := out, "down", attends[level])
            kept.append(now)
    yield BlockPlace(now, now, "through", attends=True)
    yield BlockPlace(now, now, "through")
    for level, out in reversed([*enumerate(widths)]):
        if level < bottom:
            yield BlockPlace(now, now, "through", resample="double")
        for i in range(spec.depth + 1):
            yield BlockPlace(now + kept.pop(), now := out, "up", attends[level] and i == spec.depth)


class UNetNorm(nn.GroupNorm):
    """32 groups, fewer where one would have less than 4 channels or another number than the next.

    In the precision of its weights, as under autocast on a GPU: on a CPU torch would return a tangent of another dtype
    than the output's.
    """

    def __init__(self, channels: int) -> None:
        """`channels` is a multiple of 4."""
        super().__init__(gcd(32, channels // 4), channels, EPS)

    def forward(self, input: Array) -> Array:
        """Mean 0 and variance 1 over the channels of a group and all places; then the weights."""
        return super().forward(input.to(self.weight.dtype))


class ResidualBlock(nn.Module):
    """Two convolutions and a skip, then perhaps attention; sums are scaled by sqrt(1/2), to keep the variance."""

    fused: ClassVar[dict[str, int]] = {"qkv": 3}  # as `dumo.nets.block.Stream.fused`

    def __init__(self, place: BlockPlace, embed: int, dropout: float = 0.0) -> None:
        """`embed` numbers of condition; `dropout` before the last layer."""
        super().__init__()
        into = place.into
        out = place.out
        self.attends = place.attends
        self.resample = place.resample
        self.norm_1 = UNetNorm(into)
        self.conv_1 = nn.Conv2d(into, out, 3, padding=1)
        self.shift = nn.Linear(embed, out)
        self.norm_2 = UNetNorm(out)
        self.conv_2 = nn.Conv2d(out, out, 3, padding=1)
        self.dropout = dropout
        self.skip = nn.Identity() if into == out and place.resample == "same" else nn.Conv2d(into, out, 1)
        if self.attends:
            self.norm_3 = UNetNorm(out)
            self.qkv = nn.Conv2d(out, 3 * out, 1)
            self.out = nn.Conv2d(out, out, 1)

    def forward(self, h: Array, e: Array, rows: Keys | None = None) -> Array:
        """h (b, into, side, side), e (b, embed), already through its SiLU; rows: the keys of dropout, if any."""
        a = self.conv_1(self._resampled(F.silu(self.norm_1(h)))) + self.shift(e)[:, :, None, None]
        a = F.silu(self.norm_2(a))
        a = self.conv_2(a if rows is None else drop(a, rows, self.dropout))
        h = (self.skip(self._resampled(h)) + a) * sqrt(0.5)
        return (h + self.attend(h)) * sqrt(0.5) if self.attends else h

    def attend(self, h: Array) -> Array:
        """Self-attention over the places."""
        b, ch, side, _ = h.shape
        q, k, v = self.qkv(self.norm_3(h)).view(b, 3, 1, -1, side**2).transpose(3, 4).unbind(1)
        a = F.scaled_dot_product_attention(q, k, v)
        return self.out(a.transpose(2, 3).reshape(b, ch, side, side))

    def _resampled(self, h: Array) -> Array:
        if self.resample == "half":
            return F.avg_pool2d(h, 2)
        return F.interpolate(h, scale_factor=2.0, mode="nearest") if self.resample == "double" else h


class UNetHead(nn.Sequential):
    """An output layer: norm, SiLU, convolution; an embedding of its own, if any, shifts and scales its norm."""

    def __init__(self, channels: int, out: int) -> None:
        """From `channels` to `out`."""
        super().__init__(UNetNorm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))

    def forward(self, input: Array, own: Array | None = None) -> Array:
        """input (b, channels, side, side); own (b, 2 channels); returns (b, out, side, side)."""
        norm, bend, convolve = self
        a = norm(input)
        if own is not None:
            shift, scale = own[:, :, None, None].chunk(2, 1)
            a = a * (1 + scale) + shift
        return convolve(bend(a))


class Convolutional(nn.Module):
    """The net of a `UNet` spec. `blocks` has its blocks from first to last, of all three ways."""

    def __init__(self, spec: UNet, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
        """See `UNet.build`."""
        super().__init__()
        width = spec.width
        channels = shape[0]
        self.scalars = Scalars(needs.shared, EMBED * width, spec.time_scale, count=width // 2)
        self.label = label_table(classes, width) if classes else None
        self.augment = nn.Linear(spec.augment, width, bias=False) if spec.augment else None
        self.embed = nn.Conv2d(channels, width, 3, padding=1)
        self.places = tuple(plan(spec, shape[1]))
        self.blocks = nn.ModuleList(ResidualBlock(place, EMBED * width, spec.dropout) for place in self.places)
        self.own = Own(needs, 2 * (last := self.places[-1].out), spec.time_scale)
        self.heads = nn.ModuleDict({name: UNetHead(last, channels) for name in needs.heads})
        self.gauges = Gauges(needs, width, spec.time_scale) if needs.gauges else None
        self.dropout = spec.dropout
        self._initialize()

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x, then the gauges, in the order of the needs."""
        shared, own = self.own(**inputs)
        e = F.silu(self.scalars(self._shift(x, c), **shared))
        rows = dropout.current(x.shape[0]) if self.training and self.dropout else None
        h: Array = self.embed(x)
        kept = [h]
        for i, (block, place) in enumerate(zip(self.blocks, self.places, strict=True)):
            h = torch.cat([h, kept.pop()], 1) if place.way == "up" else h
            h = block(h, e, None if rows is None else dropout.layer_keys(rows, i))
            kept += [h] if place.way == "down" else []
        heads = (head(h, own.get(name)) for name, head in self.heads.items())
        return *heads, *(self.gauges(**shared) if self.gauges else ())

    def _shift(self, x: Sample, c: Cond) -> Array | None:
        """The condition's part in the waves of time: a class's row, or the numbers of an augmentation, if any."""
        if self.label is not None:
            return self.label(c)
        return None if self.augment is None or c.ndim < 2 else self.augment(c.to(x.dtype))

    def _initialize(self) -> None:
        """EDM's: Xavier, queries, keys and values by sqrt(0.2); but the last layer of every branch zero (ours)."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        ends = [head[-1] for head in self.heads.values() if isinstance(head, nn.Sequential)]
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            ends.append(block.conv_2)
            if block.attends:
                nn.init.xavier_uniform_(block.qkv.weight, sqrt(0.2))
                ends.append(block.out)
        for layer in (*ends, *([self.gauges.out] if self.gauges else [])):
            nn.init.zeros_(layer.weight)  # pyright: ignore[reportArgumentType]
