"""The U-Net of EDM for CIFAR-10 (Karras et al. 2022, Tab. 7, "DDPM++"), after Song et al. 2021.

It has residual blocks at decreasing resolutions, two in the middle, and blocks at increasing resolutions with skip
connections. Downsampling is the mean of 2 x 2 pixels and upsampling their repetition: the filter [1, 1]. With 3
channels and one head it has 55.73 M parameters. It differs from EDM's network in the embedding of times (`Scalars`),
and in the last convolution of each branch, which is initialized to zero instead of 1e-5 of its usual scale.

A head is one output layer: norm, SiLU, convolution; an additional head has 7 k parameters.

`UNet` is the spec with the sizes, `UNet.build` creates the module, a `UNetModule`, and `block_specs` defines the order
of the blocks.
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
from dumo.nets.embed import Gauges, HeadEmbeddings, Scalars, label_table, side_of
from dumo.nets.precondition import Precondition, apply_precondition
from dumo.runtime.limits import BLOCKS, CHANNELS, FACTOR
from dumo.types import QUIET, Array, Cond, Heads, Needs, Sample, Spec, Time, UserError

EPS = 1e-6  # of group norms (Song et al.)
_EMBED_RATIO = 4  # the width of the embedding divided by that of the network (Song et al.)
SKIP_SCALE = sqrt(0.5)  # preserves the variance of a sum of two (Song et al.)


class UNet(Spec):
    """The sizes of a U-Net, by default EDM's for CIFAR-10. Attention has one head, as in EDM."""

    kind: Literal["unet"] = "unet"
    # Attributes of every network spec that a U-Net does not support.
    texts: ClassVar[None] = None
    lora: ClassVar[None] = None
    checkpoint: ClassVar[None] = None
    # Channels at multiplier 1, and the multipliers of each resolution, the largest resolution first.
    width: int = Field(default=128, ge=4, le=CHANNELS, multiple_of=4)
    multipliers: tuple[Annotated[int, Field(ge=1, le=CHANNELS)], ...] = Field(
        default=(2, 2, 2), min_length=1, max_length=14
    )
    # Blocks at each resolution of the encoder; the decoder has one more.
    depth: int = Field(default=4, ge=1, le=BLOCKS)
    # Image sides with attention, in addition to the middle.
    attend: tuple[int, ...] = (16,)
    # EDM uses 0.13 for CIFAR-10.
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # The number of augmentation parameters as condition; EDM has 9.
    augment: int = Field(default=0, ge=0, le=CHANNELS)
    # By default, times are not scaled (UCGM).
    time_scale: float = Field(default=1.0, gt=0, le=FACTOR)
    # Scaling of the inputs and outputs of the layers, in EDM "edm"; linear path only.
    precondition: Precondition = Field(default="none", json_schema_extra=QUIET)

    def build(self, needs: Needs, shape: tuple[int, ...], classes: int) -> "UNetModule":
        """Create the network with the inputs, heads and gauges of `needs` for square images of `shape`.

        With 0 classes it has no label. Raises UserError if sizes are not compatible with each other or with the images.
        """
        side = side_of(shape, self.kind)
        halvings = len(self.multipliers) - 1
        factor = 2**halvings
        if side % factor != 0:
            raise UserError(
                f"net.multipliers has {len(self.multipliers)} resolutions, so the image side must be a multiple of "
                f"{factor}, got {side}: remove multipliers"
            )
        if self.augment and classes:
            raise UserError(
                f"net.augment = {self.augment} uses augmentation parameters as the condition, but the data has "
                f"{classes} classes: set net.augment=0, or use data without labels"
            )
        return UNetModule(self, needs, shape, classes)


class BlockSpec(NamedTuple):
    """The channels and the role of a block."""

    in_channels: int
    out_channels: int
    path: Literal["down", "middle", "up"]
    attends: bool = False
    resample: Literal["half", "same", "double"] = "same"

    @property
    def keeps_output(self) -> bool:
        """Whether its output is kept for a skip connection."""
        return self.path == "down"

    @property
    def takes_skip(self) -> bool:
        """Whether its input is concatenated with the last kept output."""
        return self.path == "up" and self.resample == "same"


def block_specs(spec: UNet, side: int) -> Iterator[BlockSpec]:
    """Yield the specs of the blocks in order, for images of this side."""
    widths = [spec.width * multiplier for multiplier in spec.multipliers]
    attends = [side >> level in spec.attend for level in range(len(widths))]
    channels = spec.width
    # The channels of the kept outputs.
    skips = [channels]

    # Downsample.
    for level, width in enumerate(widths):
        if level > 0:
            yield BlockSpec(channels, channels, "down", resample="half")
            skips.append(channels)
        for _ in range(spec.depth):
            yield BlockSpec(channels, width, "down", attends[level])
            channels = width
            skips.append(channels)

    # Process the lowest resolution.
    yield BlockSpec(channels, channels, "middle", attends=True)
    yield BlockSpec(channels, channels, "middle")

    # Upsample.
    lowest_level = len(widths) - 1
    for level in range(lowest_level, -1, -1):
        width = widths[level]
        if level < lowest_level:
            yield BlockSpec(channels, channels, "up", resample="double")
        for i in range(spec.depth + 1):
            is_last = i == spec.depth
            yield BlockSpec(channels + skips.pop(), width, "up", attends[level] and is_last)
            channels = width


class UNetNorm(nn.GroupNorm):
    """Group norm with gcd(32, channels / 4) groups: at most 32, of at least 4 channels.

    It computes in the dtype of its weights, because on a CPU torch would otherwise return a tangent of another dtype
    than the output.
    """

    def __init__(self, channels: int) -> None:
        """Create a norm of `channels` channels, a multiple of 4."""
        super().__init__(gcd(32, channels // 4), channels, EPS)

    def forward(self, input: Array) -> Array:
        """Normalize each group over its channels and all pixels, then scale and shift."""
        return super().forward(input.to(self.weight.dtype))


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection, then optional attention. Sums are scaled by SKIP_SCALE."""

    # The number of matrices that are stacked in the weight of a layer. Muon orthogonalizes each separately.
    fused: ClassVar[dict[str, int]] = {"qkv": 3}

    def __init__(self, spec: BlockSpec, embed_width: int, dropout: float = 0.0) -> None:
        """Create the layers for a condition of `embed_width` channels, with dropout before the last convolution."""
        super().__init__()
        in_channels = spec.in_channels
        out_channels = spec.out_channels
        self.attends = spec.attends
        self.resample = spec.resample
        self.norm_1 = UNetNorm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        # A bias per channel from the condition.
        self.shift = nn.Linear(embed_width, out_channels)
        self.norm_2 = UNetNorm(out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = dropout
        if in_channels == out_channels and spec.resample == "same":
            self.skip = nn.Identity()
        else:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)
        if self.attends:
            self.norm_3 = UNetNorm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.out = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, h: Array, condition: Array, keys: Keys | None = None) -> Array:
        """Return (b, out_channels, side, side), with half or twice the side if the block resamples.

        h: (b, in_channels, side, side).
        condition: (b, embed_width), after its SiLU.
        keys: dropout keys per row, or None for no dropout.
        """
        a = self.conv_1(self._resample(F.silu(self.norm_1(h))))
        a = a + self.shift(condition)[:, :, None, None]
        a = F.silu(self.norm_2(a))
        if keys is not None:
            a = drop(a, keys, self.dropout)
        a = self.conv_2(a)
        h = (self.skip(self._resample(h)) + a) * SKIP_SCALE
        if not self.attends:
            return h
        return (h + self.attend(h)) * SKIP_SCALE

    def attend(self, h: Array) -> Array:
        """Apply self-attention over the pixels of h (b, out_channels, side, side), with one head."""
        b, channels, side, _ = h.shape
        q, k, v = self.qkv(self.norm_3(h)).view(b, 3, 1, -1, side**2).transpose(3, 4).unbind(1)
        a = F.scaled_dot_product_attention(q, k, v)
        return self.out(a.transpose(2, 3).reshape(b, channels, side, side))

    def _resample(self, h: Array) -> Array:
        """Halve or double the side of h (b, channels, side, side), or return it unchanged."""
        if self.resample == "half":
            return F.avg_pool2d(h, 2)
        if self.resample == "double":
            return F.interpolate(h, scale_factor=2.0, mode="nearest")
        return h


class UNetHead(nn.Sequential):
    """An output layer: norm, SiLU, convolution. A head with its own inputs modulates the norm by their embedding."""

    def __init__(self, channels: int, out_channels: int) -> None:
        """Create a layer from `channels` to `out_channels` channels."""
        super().__init__(UNetNorm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, input: Array, embedding: Array | None = None) -> Array:
        """Return (b, out_channels, side, side).

        input: (b, channels, side, side).
        embedding: (b, 2 channels), a shift and a scale, or None.
        """
        norm, silu, conv = self
        a = norm(input)
        if embedding is not None:
            shift, scale = embedding[:, :, None, None].chunk(2, 1)
            a = a * (1 + scale) + shift
        return conv(silu(a))


class UNetModule(nn.Module):
    """The network of a `UNet` spec. `blocks` has one block for each of `block_specs`."""

    def __init__(self, spec: UNet, needs: Needs, shape: tuple[int, ...], classes: int) -> None:
        """See `UNet.build`."""
        super().__init__()
        width = spec.width
        embed_width = _EMBED_RATIO * width
        channels, side, _ = shape
        self.block_specs = tuple(block_specs(spec, side))
        last_channels = self.block_specs[-1].out_channels
        # The order of the layers determines their random initial weights.
        self.scalars = Scalars(needs.shared, embed_width, spec.time_scale, count=width // 2)
        self.label = label_table(classes, width) if classes else None
        self.augment = nn.Linear(spec.augment, width, bias=False) if spec.augment else None
        self.embed = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(block, embed_width, spec.dropout) for block in self.block_specs)
        self.own = HeadEmbeddings(needs, 2 * last_channels, spec.time_scale)
        self.heads = nn.ModuleDict({name: UNetHead(last_channels, channels) for name in needs.heads})
        self.gauges = Gauges(needs, width, spec.time_scale) if needs.gauges else None
        self.dropout = spec.dropout
        self.precondition: Precondition = spec.precondition
        self._initialize()

    def forward(self, x: Sample, c: Cond, /, **inputs: Time) -> Heads:
        """Return the heads, shaped like x (b, channels, side, side), then the gauges, (b,), in the needs' order.

        c is (b,), or (b, augment) augmentation parameters. Each of the inputs is (b,). Raises TypeError for inputs that
        the needs do not name.
        """
        shared_inputs, head_embeddings = self.own(**inputs)
        x, to_output = apply_precondition(self.precondition, x, shared_inputs["t"])
        condition = F.silu(self.scalars(self._wave_offset(x, c), **shared_inputs))
        keys = None
        if self.training and self.dropout:
            keys = dropout.current(x.shape[0])
        h: Array = self.embed(x)
        skips = [h]
        for i, (block, block_spec) in enumerate(zip(self.blocks, self.block_specs, strict=True)):
            if block_spec.takes_skip:
                h = torch.cat([h, skips.pop()], 1)
            block_keys = None if keys is None else dropout.layer_keys(keys, i)
            h = block(h, condition, block_keys)
            if block_spec.keeps_output:
                skips.append(h)
        outputs = [to_output(head(h, head_embeddings.get(name))) for name, head in self.heads.items()]
        if self.gauges is not None:
            outputs += self.gauges(**shared_inputs)
        return tuple(outputs)

    def _wave_offset(self, x: Sample, c: Cond) -> Array | None:
        """Return the embedding of the class or augmentation, (b, width), or None without one."""
        if self.label is not None:
            return self.label(c)
        if self.augment is None or c.ndim < 2:
            return None
        return self.augment(c.to(x.dtype))

    def _initialize(self) -> None:
        """Initialize as EDM: Xavier, with gain sqrt(0.2) for queries, keys and values.

        Unlike in EDM, the last layer of every branch is zero (our choice).
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        zero_layers: list[nn.Module] = []
        for head in self.heads.values():
            assert isinstance(head, UNetHead)
            zero_layers.append(head[-1])
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            zero_layers.append(block.conv_2)
            if block.attends:
                nn.init.xavier_uniform_(block.qkv.weight, sqrt(0.2))
                zero_layers.append(block.out)
        if self.gauges is not None:
            zero_layers.append(self.gauges.out)
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)  # pyright: ignore[reportArgumentType]
