"""The network of the FID: Inception-v3 as TensorFlow published it in December 2015, its weights under their own names.

- `load` checks the user's file of weights and loads it into an `Inception`. A call of the `Inception` takes images and
  returns `InceptionFeatures`.
- `weights_path` says where the file should be, and `facts` what a report says of a loaded network.

The network is in the tables `STEM` and `BLOCKS`. Blocks follow one another, a block is branches side by side, and a
branch is a row of steps. Names and shapes are those of the published file, so loading it checks both. It is not the
Inception-v3 of later libraries (Szegedy et al. 2015): there are 1008 classes, an average takes no padding in, and the
last block takes a maximum where its sibling takes an average.

Images are resized as the first TensorFlow did it (`resize_tf1`). Output pixel i lies at i n / m of the n input pixels,
not at (i + 1/2) n / m - 1/2 (half a pixel off), and only its two neighbours count even where the image shrinks (no
antialiasing). Both are known defects, and part of the measure: with another resize the FID is another number (Parmar
et al. 2022). Columns are interpolated before rows, and positions are rounded to float32, so the numbers are the same to
the last bits.

The weights are published as a pickle, and dumo reads none, because a pickle can run anything. A command in docs/data.md
makes a safetensors file of it, which also notes the SHA-256 of its source.
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
CLASSES = 1008  # of the published network
WIDTH = 2048  # number of features of the FID; elsewhere in this file `width` is a number of channels
PLANES = 7  # channels of the sFID's map (Nash et al. 2021): then it has about as many features as the FID
SPATIAL_WIDTH = 17 * 17 * PLANES  # number of features of the sFID
VARIABLE = "DUMO_INCEPTION"  # of the environment: the path of the weights
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the published file
FILE = "pt_inception-2015-12-05-6726825d.pth"


class InceptionFeatures(NamedTuple):
    """Features of n images, from one pass. All but `spatial` and `logits` are means over a map."""

    f64: Float[Tensor, "n 64"]
    f192: Float[Tensor, "n 192"]
    f768: Float[Tensor, "n 768"]
    pool: Float[Tensor, "n 2048"]  # of the FID, KID, precision and recall
    spatial: Float[Tensor, "n 2023"]  # of the sFID, row by row, channels last, as ADM's reference files have it
    logits: Float[Tensor, "n 1008"]  # of the Inception Score, which leaves out the last layer's bias


class Conv(NamedTuple):
    """A step of a branch: convolution without bias, normalisation, ReLU."""

    name: str  # of its weights in the published file
    out_channels: int
    kernel: int | tuple[int, int] = 1  # pixels: a side, or height and width
    stride: int = 1
    is_padded: bool = True  # padding keeps height and width, at stride 1


Pool = Callable[[Tensor], Tensor]  # a step without weights
Step = Conv | Pool | list[Conv]  # a list: convolutions side by side on one input
Branch = tuple[Step, ...]


_average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_halving_max_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


def _chain(prefix: str, *shapes: tuple[int, int | tuple[int, int]]) -> Branch:
    """Return convolutions in a row, named `prefix`_1, _2 ..., each of (output channels, kernel)."""
    return tuple(Conv(f"{prefix}_{i}", channels, kernel) for i, (channels, kernel) in enumerate(shapes, 1))


def _block_35(pool_channels: int) -> tuple[Branch, ...]:
    """Return a block on the 35 x 35 map, with `pool_channels` outputs of its pool branch."""
    return (
        (Conv("branch1x1", 64),),
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        (_average_pool, Conv("branch_pool", pool_channels)),
    )


def _block_17(inner: int) -> tuple[Branch, ...]:
    """Return a block on the 17 x 17 map, with `inner` channels inside of its 7 x 7 branches.

    Each 7 x 7 kernel is split into a row and a column.
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
    """Return a block on the 8 x 8 map. Its two 3 x 3 branches end in a row and a column side by side."""
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
# The block whose first channels are the sFID's: those of its first branch, TensorFlow's mixed_6/conv.
SPATIAL_BLOCK = "Mixed_6d"


class InceptionNorm(nn.Module):
    """Batch normalisation by fixed moments: torch's, without its counter of batches, which the published file lacks."""

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
    """Branches side by side. Their outputs are joined along the channels."""

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
        self.origin: dict[str, str] = {}  # what the header of the file of weights says
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Pixels) -> InceptionFeatures:
        """Return features of images of any size, with colours 0 ... 255.

        They are computed in float32, whatever the precision around the call.
        """
        device = self.fc.weight.device
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = (resize_tf1(images.to(device, torch.float32), SIZE) - 128) / 128
            maps: dict[str, Tensor] = {}  # by the name of a block, or of the features of a branch of the stem
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
    """Add the weights of a branch on `width` channels to a module, by their names.

    Returns the number of channels that come out.
    """
    for step in branch:
        if isinstance(step, Conv):
            convs = [step]
        elif isinstance(step, list):
            convs = step
        else:
            continue  # no weights, and as many channels
        for conv in convs:
            module.add_module(conv.name, InceptionUnit(conv, width))
        width = sum(conv.out_channels for conv in convs)
    return width


def _run_branch(module: nn.Module, branch: Branch, x: Tensor) -> Tensor:
    """Pass x (n, c, h, w) through one step of a branch after another, with the weights in a module."""
    for step in branch:
        if isinstance(step, Conv):
            x = module.get_submodule(step.name)(x)
        elif isinstance(step, list):
            x = torch.cat([module.get_submodule(conv.name)(x) for conv in step], 1)
        else:
            x = step(x)
    return x


def resize_tf1(x: Float[Tensor, "n 3 h w"], size: int) -> Float[Tensor, "n 3 s s"]:
    """Resize images to `size` x `size` pixels, as tf.image.resize_bilinear of TensorFlow 1 does by its defaults."""
    columns_resized = _resize_axis(x, size, 3)
    return _resize_axis(columns_resized, size, 2)


def _resize_axis(x: Tensor, size: int, dim: int) -> Tensor:
    """Resize the axis `dim` of x to `size` pixels: a + (b - a) share, where a and b are the pixels around a position.

    Behind the last pixel that pixel repeats.
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
    """Return where the weights should be: `path`, or what `VARIABLE` says; None: neither is given."""
    path = path or os.environ.get(VARIABLE)
    return Path(path) if path else None


def load(path: Path | str | None = None, device: torch.device | str = "cpu") -> Inception:
    """Load the network with the published weights, from `path` or, without it, from where `VARIABLE` says.

    Raises UserError where there is no file, a weight has another name or shape, one is not finite float32, or the file
    does not say that it was made of a source of the published `SHA256`.
    """
    file = weights_path(path)
    if file is None:
        raise UserError(
            f"no weights of Inception for the FID: no path is given and {VARIABLE} is not set.\n{_how_to_get_weights()}"
        )
    with torch.device("meta"):
        net = Inception()
    weights, origin = read(file, _how_to_get_weights())
    _require_published(net, origin, weights, file)
    net.load_state_dict(weights, assign=True)
    net.origin = origin
    return net.to(device)


def facts(weights: Mapping[str, Tensor], origin: Mapping[str, str]) -> dict[str, str]:
    """Return what a report says of a network, by its weights and `origin`: their source and their hash."""
    parts: list[bytes] = []
    for name, weight in sorted(weights.items()):
        parts.append(f"{name} {tuple(weight.shape)}".encode() + weight.cpu().numpy().tobytes())
    source = origin.get("sha256", "unknown")
    return {
        "features": f"Inception of December 2015, of a file of sha256 {source}",
        "features_sha256": digest.of_bytes(*parts),
    }


def _require_published(net: Inception, origin: dict[str, str], weights: dict[str, Tensor], file: Path) -> None:
    """Raise UserError for weights that are not those of the published file, as far as can be seen.

    Counters of batches are removed from `weights`, because the network has none.
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
        raise UserError(f"{file} says it was made of a file of sha256 {source}, not {SHA256}.\n{_how_to_get_weights()}")


def _how_to_get_weights() -> str:
    """Return what to do to get the weights, for messages."""
    return f"Fetch and convert them as docs/data.md says, and set {VARIABLE} to inception.safetensors."
