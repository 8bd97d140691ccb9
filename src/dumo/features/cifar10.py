"""A small classifier of CIFAR-10, whose inner activations are the features of that data's metrics.

Images are 32x32, RGB, in [-1, 1], ten classes. The 128 features are the means of the last activations over the image,
standardised (about mean 0, variance 1 over the training images), so no feature outweighs another and a Fréchet distance
counts in variances; the last layer reads them as they are. The net is residual (He et al. 2016), 16 M multiply-adds an
image, so that a processor reads thousands of images a second. It is trained without label smoothing, which draws the
features of a class together (Müller et al. 2019): what tells a good image of a class from a poor one would go. Two of
the features do not vary over the training images, and count for nothing.

`python -m dumo.features.cifar10` makes the shipped file again, from the images in `$DUMO_DATA/cifar10`, in about twelve
minutes of one core.
"""

import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dumo.io import digest, weights
from dumo.io.parquet import image_column, open_table, read_group, read_labels
from dumo.io.path import user_path
from dumo.io.picture import from_uint8
from dumo.random import stream
from dumo.types import UserError

Images = Float[Tensor, "n 3 32 32"]
Pixels = UInt8[Tensor, "n 3 32 32"]
Labels = Int64[Tensor, " n"]
Tick = Callable[[int, float], None]  # told the number of an epoch, from 0, and its mean loss

WIDTH = 128  # features
FLOOR = 0.8  # accuracy on the test images, below which no file is written
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 10, 128, 0.1, 0.9, 5e-4  # ours
SHIFT = 4  # pixels each way that a training image is moved by, at most (He et al. 2016)
PIECE = 500  # images at a time through the net
KEY = "dumo.metrics.cifar"  # of the draws: what this module was called when the shipped weights were made
WEIGHTS = Path(__file__).with_name("cifar10.safetensors")
FILES = {"train": "train-00000-of-00001.parquet", "test": "test-00000-of-00001.parquet"}


class Residual(nn.Module):
    """x plus two convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = _conv(width, width), _conv(width, width)

    def forward(self, x: Float[Tensor, "n w h h"]) -> Float[Tensor, "n w h h"]:
        """The same shape, not negative."""
        return F.relu(x + self.two(F.relu(self.one(x))))


class Classifier(nn.Module):
    """Residual blocks at 16x16, 8x8 and 4x4, their mean over the image, `WIDTH` features, one output per class."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(_conv(3, 32, size=4, stride=2), nn.ReLU(), Residual(32)),
            *(_conv(32, 64, stride=2), nn.ReLU(), Residual(64)),
            *(_conv(64, WIDTH, stride=2), nn.ReLU(), Residual(WIDTH)),
        )
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.head = nn.Linear(WIDTH, 10)

    def features(self, x: Images) -> Float[Tensor, "n f"]:
        """What the last layer reads."""
        x = x.contiguous(memory_format=torch.channels_last)  # a third quicker on a processor
        return self.norm(self.trunk(x).mean((2, 3)))

    def forward(self, x: Images) -> Float[Tensor, "n 10"]:
        """A logit per class."""
        return self.head(self.features(x))


@cache
def shipped() -> Classifier:
    """The classifier with the weights that come with the package, on the CPU, in evaluation mode."""
    with torch.device("meta"):  # no weights are drawn, so nobody's random numbers move
        net = Classifier()
    net.load_state_dict({name: w.float() for name, w in weights.load(WEIGHTS).items()}, assign=True)
    return net.eval().requires_grad_(False)


def origin(path: Path = WEIGHTS) -> dict[str, str]:
    """Where the weights come from: recipe, data, accuracy, versions."""
    return json.loads(weights.notes(path)["origin"])


@cache
def sha256(path: Path = WEIGHTS) -> str:
    """Of the file of the weights, as it goes with every number that was measured with them."""
    return digest.of_file(path)


def features(x: Images) -> Float[Tensor, "n f"]:
    """The `WIDTH` features of images in [-1, 1], in float32 on the CPU."""
    return torch.cat([shipped().features(part) for part in x.to("cpu", torch.float32).split(PIECE)])


def predict(x: Images) -> Labels:
    """The most probable class of images in [-1, 1]."""
    return classify(features(x))


def classify(f: Float[Tensor, "n f"]) -> Labels:
    """The most probable class of images with these features."""
    return shipped().head(f).argmax(1)


def images(folder: Path, split: str, count: int | None = None) -> tuple[Pixels, Labels]:
    """The first `count` images (None: all) of `train` or `test`, 0 ... 255, and their classes.

    The files are as on the Hugging Face hub (`dumo.io.parquet`). Raises `UserError` where there is none, or a damaged
    one.
    """
    from PIL import Image  # slow to import

    if not (file := folder / FILES[split]).is_file():
        raise UserError(f"there is no {file}: set DUMO_DATA to the folder whose cifar10 holds {FILES[split]}")
    table = open_table(file)
    column = image_column(file, table)
    rows = (row.as_py() for group in range(table.num_row_groups) for row in read_group(table, group, column))
    pixels = [np.asarray(Image.open(BytesIO(row)).convert("RGB")) for row in islice(rows, count)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), read_labels(file, table, "label")[:count]


def silent(epoch: int, loss: float) -> None:
    """Say nothing."""


def train(x: Pixels, c: Labels, tick: Tick = silent) -> Classifier:
    """Train on all these images: SGD with one cycle of the rate, images mirrored and shifted (He et al. 2016)."""
    draws = stream(KEY, "train")
    net = _fresh(draws)
    steps = len(x) // BATCH
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=EPOCHS * steps, pct_start=0.25, cycle_momentum=False
    )
    for epoch in range(EPOCHS):
        total = torch.zeros(())
        for rows in torch.randperm(len(x), generator=draws)[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(from_uint8(_moved(x[rows], draws))), c[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        tick(epoch, (total / steps).item())
    return net.eval()


def accuracy(net: Classifier, x: Pixels, c: Labels) -> float:
    """The share of right answers, in [0, 1]."""
    with torch.no_grad():
        said = torch.cat([net(from_uint8(part)).argmax(1) for part in x.split(PIECE)])
    return (said == c).double().mean().item()


def make(folder: Path, path: Path = WEIGHTS, tick: Tick = silent) -> dict[str, str]:
    """Train, check and write the file; what it says of itself. Raises `UserError` where it is not good enough.

    Weights are kept in half precision, which halves the file; what is checked is what is kept.
    """
    net = train(*images(folder, "train"), tick)
    kept = {name: w.detach().half() if w.ndim > 1 else w for name, w in net.state_dict().items()}
    net.load_state_dict({name: w.float() for name, w in kept.items()})
    x, c = images(folder, "test")
    right = accuracy(net, x, c)
    if right < FLOOR:
        raise UserError(
            f"accuracy on the test images is {right:.4f}, below {FLOOR}: nothing written, change the recipe"
        )
    told = {
        "recipe": "python -m dumo.features.cifar10",
        "data": "CIFAR-10 (Krizhevsky 2009) re-encoded as JPEG: trained on the 50,000 training images",
        "accuracy": f"{right:.4f}",
        "tested": f"on the {len(x):,} test images, which neither training nor choices have seen",
        "features": f"{WIDTH}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "pillow", "safetensors")),
    }
    save_file(kept, path, {"origin": json.dumps(told)})  # several keys would come in any order
    return told


def _conv(before: int, after: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution, normalised."""
    conv = nn.Conv2d(before, after, size, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after))


def _fresh(generator: Generator) -> Classifier:
    """An untrained net: weights of He et al. 2015, biases 0, norms the identity, a block's last one 0 (Goyal 2017)."""
    with torch.device("meta"):
        net = Classifier()
    net.to_empty(device="cpu")
    for name, p in net.named_parameters():
        if p.ndim > 1:
            nn.init.kaiming_normal_(p, generator=generator)
        else:
            nn.init.constant_(p, float(name.endswith("weight") and ".two." not in name))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    return net


def _moved(x: Pixels, generator: Generator) -> Pixels:
    """Half of the images mirrored, all moved by up to `SHIFT` pixels each way, their mirrored edges moving in."""
    n, side = len(x), x.shape[-1]
    flip = torch.rand(n, 1, generator=generator) < 0.5
    down, right = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=generator)
    place = torch.arange(side)
    rows, columns = place + down, torch.where(flip, place.flip(0), place) + right
    x = F.pad(x.float(), (SHIFT,) * 4, mode="reflect").to(x.dtype).permute(0, 2, 3, 1)
    return x[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _print(epoch: int, loss: float) -> None:
    print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the order of sums, so the same weights on the same processor
    for key, value in make(user_path("$DUMO_DATA/cifar10", "the recipe's folder"), tick=_print).items():
        print(f"{key}: {value}")
