"""The network of the FID: Inception-v3 as published by TensorFlow in December 2015, with the original weight names.

- `load` checks the user's weight file and loads it into an `Inception`, which maps images to `InceptionFeatures`.
- `weights_path` returns the path of the file, and `facts` the entries of a report on a loaded network.

The tables `STEM` and `BLOCKS` define the network: a sequence of blocks of parallel branches, each a sequence of steps.
Names and shapes are those of the published file, so loading it checks both. It differs from the Inception-v3 of later
libraries (Szegedy et al. 2015): it has 1008 classes, average pooling excludes the padding, and the last block has max
pooling instead of average pooling.

Images are resized as in TensorFlow 1 (`resize_tf1`). Output pixel i is at i n / m of the n input pixels, not at
(i + 1/2) n / m - 1/2 (half a pixel off), and downsampling interpolates between two neighbours only (no antialiasing).
Both are known defects but part of the metric: another resize changes the FID (Parmar et al. 2022). Columns are
interpolated before rows, and positions are rounded to float32, to agree with TensorFlow to the last bits.

The weights are published as a pickle, which dumo does not read, because unpickling can run arbitrary code. A command in
docs/data.md converts it to a safetensors file that records the SHA-256 of its source.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.io import digest
from dumo.io.picture import Pixels
from dumo.io.tensor_files import compare, read
from dumo.types import UserError

SIZE = 299  # pixels along each side of the network's input
CLASSES = 1008  # including unused ones
WIDTH = 2048  # number of FID features; elsewhere in this file `width` is a number of channels
PLANES = 7  # channels of the sFID's map (Nash et al. 2021), for about as many features as the FID
SPATIAL_WIDTH = 17 * 17 * PLANES  # number of sFID features
VARIABLE = "DUMO_INCEPTION"  # the environment variable with the path of the weights
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the published file
FILE = "pt_inception-2015-12-05-6726825d.pth"


class InceptionFeatures(NamedTuple):
    """Features of n images from one forward pass."""

    f64: Float[Tensor, "n 64"]
    f192: Float[Tensor, "n 192"]
    f768: Float[Tensor, "n 768"]
    # For FID, KID, precision and recall.
    pool: Float[Tensor, "n 2048"]
    # For sFID: row by row, channels last, as in ADM's reference files.
    spatial: Float[Tensor, "n 2023"]
    # For the Inception Score, which omits the bias of the last layer.
    logits: Float[Tensor, "n 1008"]


class Conv(NamedTuple):
    """A step of a branch: convolution without bias, normalisation, ReLU."""

    name: str  # in the published file
    out_channels: int
    kernel: int | tuple[int, int] = 1  # one side, or (height, width)
    stride: int = 1
    is_padded: bool = True  # padding keeps height and width, at stride 1


Pool = Callable[[Tensor], Tensor]  # a step without weights
Step = Conv | Pool | list[Conv]  # a list means parallel convolutions
Branch = tuple[Step, ...]


_average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halving_max_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


def _chain(prefix: str, *shapes: tuple[int, int | tuple[int, int]]) -> Branch:
    """Return consecutive convolutions named `prefix`_1, _2 ..., each with (output channels, kernel)."""
    return tuple(Conv(f"{prefix}_{i}", channels, kernel) for i, (channels, kernel) in enumerate(shapes, 1))


def _block_35(pool_channels: int) -> tuple[Branch, ...]:
    """Return a block on the 35 x 35 map, with `pool_channels` output channels in its pool branch."""
    return (
        (Conv("branch1x1", 64),),
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        (_average_pool, Conv("branch_pool", pool_channels)),
    )


def _block_17(inner: int) -> tuple[Branch, ...]:
    """Return a block on the 17 x 17 map, with `inner` channels inside its 7 x 7 branches.

    Each 7 x 7 kernel is factorized into a row and a column.
    """
    row = (1, 7)
    column = (7, 1)
    return (
        (Conv("branch1x1", 192),),
        _chain("branch7x7", (inner, 1), (inner, row), (192, column)),
        _chain(
            "branch7x7dbl",
            (inner, 1),
            (inner, column),
            (inner, row),
            (inner, column),
            (192, row),
        ),
        (_average_pool, Conv("branch_pool", 192)),
    )


def _block_8(pool: Pool) -> tuple[Branch, ...]:
    """Return a block on the 8 x 8 map. Its two 3 x 3 branches end in a row and a column in parallel."""
    three_by_three = [Conv("branch3x3_2a", 384, kernel=(1, 3)), Conv("branch3x3_2b", 384, kernel=(3, 1))]
    double_three_by_three = [Conv("branch3x3dbl_3a", 384, kernel=(1, 3)), Conv("branch3x3dbl_3b", 384, kernel=(3, 1))]
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), three_by_three),
        (*_chain("branch3x3dbl", (448, 1), (384, 3)), double_three_by_three),
        (pool, Conv("branch_pool", 192)),
    )


STEM = (
    (
        Conv("Conv2d_1a_3x3", 32, kernel=3, stride=2, is_padded=False),
        Conv("Conv2d_2a_3x3", 32, kernel=3, is_padded=False),
        Conv("Conv2d_2b_3x3", 64, kernel=3),
        _halving_max_pool,
    ),
    (Conv("Conv2d_3b_1x1", 80), Conv("Conv2d_4a_3x3", 192, kernel=3, is_padded=False), _halving_max_pool),
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": (
        (Conv("branch3x3", 384, kernel=3, stride=2, is_padded=False),),
        (*_chain("branch3x3dbl", (64, 1), (96, 3)), Conv("branch3x3dbl_3", 96, kernel=3, stride=2, is_padded=False)),
        (_halving_max_pool,),
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, kernel=3, stride=2, is_padded=False)),
        (
            *_chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1))),
            Conv("branch7x7x3_4", 192, kernel=3, stride=2, is_padded=False),
        ),
        (_halving_max_pool,),
    ),
    "Mixed_7b": _block_8(_average_pool),
    "Mixed_7c": _block_8(_max_pool),
}
# The first branch of this block (mixed_6/conv in TensorFlow) has the sFID features.
SPATIAL_BLOCK = "Mixed_6d"


class InceptionNorm(nn.Module):
    """Batch normalisation with fixed moments, without torch's `num_batches_tracked`, which the published file lacks."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - mean) / sqrt(var + 0.001) weight + bias for each channel of x (n, c, h, w)."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-3)


class InceptionUnit(nn.Module):
    """A `Conv` with its weights: convolution, normalisation, ReLU."""

    def __init__(self, spec: Conv, width: int) -> None:
        super().__init__()
        kernel = (spec.kernel, spec.kernel) if isinstance(spec.kernel, int) else spec.kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if spec.is_padded else (0, 0)
        self.conv = nn.Conv2d(width, spec.out_channels, kernel, spec.stride, padding, bias=False)
        self.bn = InceptionNorm(spec.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n, width, h, w) to (n, out_channels, h', w')."""
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Parallel branches, whose outputs are concatenated along the channels."""

    def __init__(self, branches: Sequence[Branch], width: int) -> None:
        super().__init__()
        self.branches = branches
        self.width = 0
        for branch in branches:
            self.width += _add_weights(self, branch, width)

    def forward(self, x: Tensor) -> Tensor:
        """Run every branch on x (n, c, h, w), and return (n, width, h', w')."""
        return torch.cat([_run_branch(self, branch, x) for branch in self.branches], 1)


class Inception(nn.Module):
    """The network, in evaluation mode and without gradients. It is untrained until weights are loaded."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for branch in STEM:
            width = _add_weights(self, branch, width)
        for name, branches in BLOCKS.items():
            block = InceptionBlock(branches, width)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, CLASSES)
        self.origin: dict[str, str] = {}  # from the header of the weight file
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Pixels) -> InceptionFeatures:
        """Return the features of images of any size, with colours 0 ... 255.

        They are computed in float32, regardless of autocast.
        """
        device = self.fc.weight.device
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = (resize_tf1(images.to(device, torch.float32), SIZE) - 128) / 128
            maps: dict[str, Tensor] = {}  # by name
            for name, branch in zip(("f64", "f192"), STEM, strict=True):
                x = _run_branch(self, branch, x)
                maps[name] = x
            for name in BLOCKS:
                x = self.get_submodule(name)(x)
                maps[name] = x
            pool = maps["Mixed_7c"].mean((2, 3))
            return InceptionFeatures(
                f64=maps["f64"].mean((2, 3)),
                f192=maps["f192"].mean((2, 3)),
                f768=maps["Mixed_6e"].mean((2, 3)),
                pool=pool,
                spatial=maps[SPATIAL_BLOCK][:, :PLANES].permute(0, 2, 3, 1).flatten(1),
                logits=pool @ self.fc.weight.T,
            )


def _add_weights(module: nn.Module, branch: Branch, width: int) -> int:
    """Add the weights of a branch with `width` input channels to a module, by name.

    Returns the number of output channels.
    """
    for step in branch:
        if isinstance(step, Conv):
            convs = [step]
        elif isinstance(step, list):
            convs = step
        else:
            continue  # pooling keeps the number of channels
        for conv in convs:
            module.add_module(conv.name, InceptionUnit(conv, width))
        width = sum(conv.out_channels for conv in convs)
    return width


def _run_branch(module: nn.Module, branch: Branch, x: Tensor) -> Tensor:
    """Run the steps of a branch on x (n, c, h, w), with the weights in a module."""
    for step in branch:
        if isinstance(step, Conv):
            x = module.get_submodule(step.name)(x)
        elif isinstance(step, list):
            x = torch.cat([module.get_submodule(conv.name)(x) for conv in step], 1)
        else:
            x = step(x)
    return x


def resize_tf1(x: Float[Tensor, "n 3 h w"], size: int) -> Float[Tensor, "n 3 s s"]:
    """Resize images to `size` x `size` pixels, as tf.image.resize_bilinear of TensorFlow 1 with its defaults."""
    columns_resized = _resize_axis(x, size, 3)
    return _resize_axis(columns_resized, size, 2)


def _resize_axis(x: Tensor, size: int, dim: int) -> Tensor:
    """Resize the axis `dim` of x to `size` pixels by a + (b - a) share between neighbouring pixels a and b.

    The last pixel is repeated.
    """
    n = x.shape[dim]
    position = torch.arange(size, dtype=torch.float32) * torch.tensor(n / size, dtype=torch.float32)
    low = position.long()
    share = (position - low).to(x).view(-1, *(1,) * (3 - dim))
    high = (low + 1).clamp(max=n - 1)
    a = x.index_select(dim, low.to(x.device))
    b = x.index_select(dim, high.to(x.device))
    return a + (b - a) * share


def weights_path(path: Path | str | None = None) -> Path | None:
    """Return the path of the weights: `path`, or the value of `VARIABLE`, or None if neither is set."""
    path = path or os.environ.get(VARIABLE)
    return Path(path) if path else None


def load(path: Path | str | None = None, device: torch.device | str = "cpu") -> Inception:
    """Load the network with the published weights from `path`, or from the path in `VARIABLE`.

    Raises UserError if there is no file, if a weight has a wrong name or shape or is not finite float32, or if the
    SHA-256 of the source that the file records is not `SHA256`.
    """
    file = weights_path(path)
    if file is None:
        raise UserError(
            f"the FID needs Inception weights, but no path is given and {VARIABLE} is not set.\n{_how_to_get_weights()}"
        )
    with torch.device("meta"):
        net = Inception()
    weights, origin = read(file, _how_to_get_weights())
    _require_published(net, origin, weights, file)
    net.load_state_dict(weights, assign=True)
    net.origin = origin
    return net.to(device)


def facts(weights: Mapping[str, Tensor], origin: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a report on a network: the source in `origin` and the hash of its weights."""
    parts: list[bytes] = []
    for name, weight in sorted(weights.items()):
        parts.append(f"{name} {tuple(weight.shape)}".encode() + weight.cpu().numpy().tobytes())
    source = origin.get("sha256", "unknown")
    return {
        "features": f"Inception of December 2015, of a file of sha256 {source}",
        "features_sha256": digest.of_bytes(*parts),
    }


def _require_published(net: Inception, origin: dict[str, str], weights: dict[str, Tensor], file: Path) -> None:
    """Raise UserError if names, shapes or source of the weights differ from the published file's.

    `num_batches_tracked` is removed from `weights`, because the network has none.
    """
    for name in list(weights):
        if name.endswith("num_batches_tracked"):
            del weights[name]
    fix = f"these are not Inception's weights.\n{_how_to_get_weights()}"
    compare(file, weights, net.state_dict(), "Inception", fix)
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise UserError(f"{file}: {name} is not finite: {fix}")
    source = origin.get("sha256", "nothing")
    if source != SHA256:
        raise UserError(
            f"{file} was converted from a file with SHA-256 {source}, not {SHA256}.\n{_how_to_get_weights()}"
        )


def _how_to_get_weights() -> str:
    """Return how to get the weights, for messages."""
    return f"Fetch and convert them as docs/data.md says, and set {VARIABLE} to inception.safetensors."
