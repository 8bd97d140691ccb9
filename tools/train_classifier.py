"""Train again the small classifiers whose inner activations are the features of dumo's own metrics.

    python tools/train_classifier.py digits       # seconds; on one machine byte for byte
    python tools/train_classifier.py cifar10      # from the images in $DUMO_DATA/cifar10, twelve minutes of one core

Each is written into src/dumo/encoders, and changes every number that is measured with it. Nothing is written that is
not good enough on images that training has not seen.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dumo.data import Digits
from dumo.data.parquet import Parquet
from dumo.encoders import classifier
from dumo.encoders.classifier import cifar10, digits
from dumo.io.picture import from_uint8
from dumo.io.read import user_path
from dumo.runtime.random import stream
from dumo.types import UserError

Images = Float[Tensor, "n c h w"]
Pixels = UInt8[Tensor, "n 3 32 32"]
Labels = Int64[Tensor, " n"]
N = TypeVar("N", bound=nn.Module)
Tick = Callable[[int, float], None]  # called with the number of an epoch, from 0, and its mean loss

KEYS = {"digits": "dumo.metrics.classifier", "cifar10": "dumo.metrics.cifar"}  # of the draws of the shipped weights
SHARE, STEPS, FLOOR = 0.2, 1000, 0.98  # of digits: held out; and the accuracy on them below which no file is written
BATCH, RATE, DECAY = 64, 4e-3, 0.01  # ours
EPOCHS, CIFAR_FLOOR = 10, 0.8
CIFAR_BATCH, CIFAR_RATE, MOMENTUM, CIFAR_DECAY = 128, 0.1, 0.9, 5e-4  # ours
SHIFT = 4  # pixels each way that a training image of CIFAR-10 is moved by, at most (He et al. 2016)
FILES = {"train": "train-00000-of-00001.parquet", "test": "test-00000-of-00001.parquet"}


def accuracy(net: nn.Module, x: Images, c: Labels) -> float:
    """The share of right answers, in [0, 1]."""
    with torch.no_grad():
        answers = torch.cat([net(part).argmax(1) for part in x.split(500)])
    return (answers == c).double().mean().item()


def fresh(kind: type[N], generator: Generator) -> N:
    """An untrained net: weights of He et al. 2015, biases 0, norms the identity, a block's last one 0 (Goyal 2017)."""
    with torch.device("meta"):
        net = kind()
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


def require(right: float, floor: float) -> None:
    """Raise `UserError` for too low an accuracy."""
    if right < floor:
        raise UserError(f"accuracy on what was held out is {right:.4f}, below {floor}: nothing written")


def versions(*names: str) -> str:
    """Of these packages."""
    return ", ".join(f"{name} {version(name)}" for name in names)


def write(path: Path, weights: dict[str, Tensor], origin: dict[str, str]) -> dict[str, str]:
    """Write the weights with what is known of them."""
    save_file(weights, path, {"origin": json.dumps(origin)})  # several keys would come in any order
    return origin


def split_digits(n: int) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " h"]]:
    """The rows to train on and those held out: of a permutation keyed by name, the first `SHARE` is held out."""
    order = torch.randperm(n, generator=stream(KEYS["digits"], "hold-out"))
    return order[int(SHARE * n) :], order[: int(SHARE * n)]


def train_digits(x: Images, c: Labels) -> nn.Module:
    """Train on all these rows: AdamW with one cycle of the rate, images shifted by up to a pixel each way."""
    draws = stream(KEYS["digits"], "train")
    net = fresh(classifier.DigitsClassifier, draws)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(net(shifted(x[rows], draws)), c[rows]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def make_digits(path: Path) -> dict[str, str]:
    """Train, check and write the file; what it says of itself. Raises `UserError` where it is not good enough."""
    table = Digits().originals()
    taught, held = split_digits(table.size)
    net = train_digits(table.x[taught], table.c[taught])
    right = accuracy(net, table.x[held], table.c[held])
    require(right, FLOOR)
    return write(
        path,
        net.state_dict(),
        {
            "recipe": "python tools/train_classifier.py digits",
            "data": "scikit-learn load_digits, 1,797 images, of the UCI set Optical Recognition of Handwritten Digits",
            "held_out": f"{len(held)} rows: the first {SHARE:.0%} of a keyed permutation (split_digits)",
            "accuracy": f"{right:.4f}",
            "features": f"{digits.width}",
            "versions": versions("torch", "scikit-learn", "safetensors"),
        },
    )


def shifted(x: Images, generator: Generator) -> Images:
    """Every image moved by -1, 0 or 1 pixel each way, background (-1) moving in."""
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1), 8)  # (n, 64, 9)
    which = torch.randint(9, (len(x),), generator=generator)
    return patches[torch.arange(len(x)), :, which].view_as(x)


def cifar_images(folder: Path, split: str, count: int | None = None) -> tuple[Pixels, Labels]:
    """The first `count` images (None: all) of `train` or `test`, 0 ... 255, and their classes.

    The files are as on the Hugging Face hub (`dumo.data.parquet`). Raises `UserError` where there is none, or a damaged
    one.
    """
    from PIL import Image  # slow to import

    if not (file := folder / FILES[split]).is_file():
        raise UserError(f"there is no {file}: set DUMO_DATA to the folder whose cifar10 holds {FILES[split]}")
    table = Parquet([str(file)], label="label")
    assert table.labels
    some = range(len(table) if count is None else count)
    pixels = [np.asarray(Image.open(BytesIO(table.read(i))).convert("RGB")) for i in some]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), table.labels.c[:count]


def train_cifar10(x: Pixels, c: Labels, tick: Tick = lambda epoch, loss: None) -> nn.Module:
    """Train on all these images: SGD with one cycle of the rate, images mirrored and shifted (He et al. 2016)."""
    draws = stream(KEYS["cifar10"], "train")
    net = fresh(classifier.Cifar10, draws)
    steps = len(x) // CIFAR_BATCH
    optimizer = torch.optim.SGD(net.parameters(), CIFAR_RATE, MOMENTUM, weight_decay=CIFAR_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, CIFAR_RATE, total_steps=EPOCHS * steps, pct_start=0.25, cycle_momentum=False
    )
    for epoch in range(EPOCHS):
        total = torch.zeros(())
        for rows in torch.randperm(len(x), generator=draws)[: steps * CIFAR_BATCH].split(CIFAR_BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(from_uint8(moved(x[rows], draws))), c[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        tick(epoch, (total / steps).item())
    return net.eval()


def make_cifar10(path: Path, folder: Path, tick: Tick = lambda epoch, loss: None) -> dict[str, str]:
    """Train, check and write the file; what it says of itself. Raises `UserError` where it is not good enough.

    Weights are kept in half precision, which halves the file; what is checked is what is kept.
    """
    net = train_cifar10(*cifar_images(folder, "train"), tick)
    kept = {name: w.detach().half() if w.ndim > 1 else w for name, w in net.state_dict().items()}
    net.load_state_dict({name: w.float() for name, w in kept.items()})
    x, c = cifar_images(folder, "test")
    right = accuracy(net, from_uint8(x), c)
    require(right, CIFAR_FLOOR)
    return write(
        path,
        kept,
        {
            "recipe": "python tools/train_classifier.py cifar10",
            "data": "CIFAR-10 (Krizhevsky 2009) re-encoded as JPEG: trained on the 50,000 training images",
            "accuracy": f"{right:.4f}",
            "tested": f"on the {len(x):,} test images, which neither training nor choices have seen",
            "features": f"{cifar10.width}",
            "versions": versions("torch", "pillow", "safetensors"),
        },
    )


def moved(x: Pixels, generator: Generator) -> Pixels:
    """Half of the images mirrored, all moved by up to `SHIFT` pixels each way, their mirrored edges moving in."""
    n, side = len(x), x.shape[-1]
    flip = torch.rand(n, 1, generator=generator) < 0.5
    down, right = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=generator)
    place = torch.arange(side)
    rows, columns = place + down, torch.where(flip, place.flip(0), place) + right
    x = F.pad(x.float(), (SHIFT,) * 4, mode="reflect").to(x.dtype).permute(0, 2, 3, 1)
    return x[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def main() -> None:
    """Make one of the files again."""
    parser = argparse.ArgumentParser(description="Train a classifier of dumo's metrics again.")
    name = parser.add_argument("name", choices=KEYS) and parser.parse_args().name
    torch.set_num_threads(1)  # the order of sums, so the same weights on the same processor
    if name == "digits":
        origin = make_digits(digits.file)
    else:
        folder = user_path("$DUMO_DATA/cifar10", "the recipe's folder")
        origin = make_cifar10(cifar10.file, folder, lambda n, loss: print(f"epoch {n + 1}: loss {loss:.4f}"))
    for key, value in origin.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
