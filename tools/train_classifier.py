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
# of digits: ours
DIGITS_HELD_OUT = 0.2  # the share that is not trained on
DIGITS_MIN_ACCURACY = 0.98  # on what is held out, below which no file is written
DIGITS_STEPS = 1000
DIGITS_BATCH = 64
DIGITS_RATE = 4e-3  # of learning, at its highest
DIGITS_DECAY = 0.01  # of weights
# of CIFAR-10: ours, but for the shift
CIFAR_MIN_ACCURACY = 0.8  # on the test images
CIFAR_EPOCHS = 10
CIFAR_BATCH = 128
CIFAR_RATE = 0.1
CIFAR_MOMENTUM = 0.9
CIFAR_DECAY = 5e-4
CIFAR_SHIFT = 4  # pixels each way that a training image is moved by, at most (He et al. 2016)
FILES = {"train": "train-00000-of-00001.parquet", "test": "test-00000-of-00001.parquet"}


def accuracy(net: nn.Module, x: Images, c: Labels) -> float:
    """The share of right answers, in [0, 1]."""
    with torch.no_grad():
        answers = torch.cat([net(part).argmax(1) for part in x.split(500)])
    return (answers == c).double().mean().item()


def draw_net(kind: type[N], generator: Generator) -> N:
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


def require_accuracy(share_right: float, minimum: float) -> None:
    """Raise `UserError` for too low an accuracy."""
    if share_right < minimum:
        raise UserError(f"accuracy on what was held out is {share_right:.4f}, below {minimum}: nothing written")


def versions(*names: str) -> str:
    """The versions of these packages, as text."""
    return ", ".join(f"{name} {version(name)}" for name in names)


def write(path: Path, weights: dict[str, Tensor], origin: dict[str, str]) -> dict[str, str]:
    """Write the weights with `origin`, what is known of them; return that."""
    save_file(weights, path, {"origin": json.dumps(origin)})  # several keys would come in any order
    return origin


def split_digits(n: int) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " h"]]:
    """The rows to train on, and those held out: the first DIGITS_HELD_OUT of a permutation that is keyed by name."""
    order = torch.randperm(n, generator=stream(KEYS["digits"], "hold-out"))
    return order[int(DIGITS_HELD_OUT * n) :], order[: int(DIGITS_HELD_OUT * n)]


def train_digits(x: Images, c: Labels) -> nn.Module:
    """Train on all these rows: AdamW with one cycle of the rate, images shifted by up to a pixel each way."""
    draws = stream(KEYS["digits"], "train")
    net = draw_net(classifier.DigitsClassifier, draws)
    optimizer = torch.optim.AdamW(net.parameters(), DIGITS_RATE, weight_decay=DIGITS_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, DIGITS_RATE, total_steps=DIGITS_STEPS)
    for _ in range(DIGITS_STEPS):
        rows = torch.randint(len(x), (DIGITS_BATCH,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(net(shift_digits(x[rows], draws)), c[rows]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def make_digits(path: Path) -> dict[str, str]:
    """Train, check and write the file; return what it says of itself.

    Raises `UserError` where the net is not good enough.
    """
    table = Digits().originals()
    train_rows, held_rows = split_digits(table.size)
    net = train_digits(table.x[train_rows], table.c[train_rows])
    share_right = accuracy(net, table.x[held_rows], table.c[held_rows])
    require_accuracy(share_right, DIGITS_MIN_ACCURACY)
    return write(
        path,
        net.state_dict(),
        {
            "recipe": "python tools/train_classifier.py digits",
            "data": "scikit-learn load_digits, 1,797 images, of the UCI set Optical Recognition of Handwritten Digits",
            "held_out": f"{len(held_rows)} rows: the first {DIGITS_HELD_OUT:.0%} of a keyed permutation (split_digits)",
            "accuracy": f"{share_right:.4f}",
            "features": f"{digits.width}",
            "versions": versions("torch", "scikit-learn", "safetensors"),
        },
    )


def shift_digits(x: Images, generator: Generator) -> Images:
    """Move every image (n, 1, 8, 8) by -1, 0 or 1 pixel each way; background, -1, moves in."""
    shifts = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1), 8)  # (n, 64, 9)
    shift_of_row = torch.randint(9, (len(x),), generator=generator)
    return shifts[torch.arange(len(x)), :, shift_of_row].view_as(x)


def cifar_images(folder: Path, split: str, count: int | None = None) -> tuple[Pixels, Labels]:
    """The first `count` images (None: all) of `train` or `test`, 0 ... 255, and their classes.

    The files are as on the Hugging Face hub (`dumo.data.parquet`). Raises `UserError` where there is none, or a damaged
    one.
    """
    from PIL import Image  # slow to import

    file = folder / FILES[split]
    if not file.is_file():
        raise UserError(f"there is no {file}: set DUMO_DATA to the folder whose cifar10 holds {FILES[split]}")
    table = Parquet([str(file)], label="label")
    assert table.labels
    rows = range(len(table) if count is None else count)
    pixels = [np.asarray(Image.open(BytesIO(table.read(i))).convert("RGB")) for i in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), table.labels.c[:count]


def train_cifar10(x: Pixels, c: Labels, tick: Tick = lambda epoch, loss: None) -> nn.Module:
    """Train on all these images: SGD with one cycle of the rate, images mirrored and shifted (He et al. 2016)."""
    draws = stream(KEYS["cifar10"], "train")
    net = draw_net(classifier.Cifar10Classifier, draws)
    steps = len(x) // CIFAR_BATCH
    optimizer = torch.optim.SGD(net.parameters(), CIFAR_RATE, CIFAR_MOMENTUM, weight_decay=CIFAR_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, CIFAR_RATE, total_steps=CIFAR_EPOCHS * steps, pct_start=0.25, cycle_momentum=False
    )
    for epoch in range(CIFAR_EPOCHS):
        total = torch.zeros(())
        for rows in torch.randperm(len(x), generator=draws)[: steps * CIFAR_BATCH].split(CIFAR_BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(from_uint8(flip_and_shift(x[rows], draws))), c[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        tick(epoch, (total / steps).item())
    return net.eval()


def make_cifar10(path: Path, folder: Path, tick: Tick = lambda epoch, loss: None) -> dict[str, str]:
    """Train, check and write the file; return what it says of itself.

    Weights are stored in half precision, which halves the file; what is checked is what is stored. Raises `UserError`
    where the net is not good enough.
    """
    train_x, train_c = cifar_images(folder, "train")
    net = train_cifar10(train_x, train_c, tick)
    stored = {name: w.detach().half() if w.ndim > 1 else w for name, w in net.state_dict().items()}
    net.load_state_dict({name: w.float() for name, w in stored.items()})
    x, c = cifar_images(folder, "test")
    share_right = accuracy(net, from_uint8(x), c)
    require_accuracy(share_right, CIFAR_MIN_ACCURACY)
    return write(
        path,
        stored,
        {
            "recipe": "python tools/train_classifier.py cifar10",
            "data": "CIFAR-10 (Krizhevsky 2009) re-encoded as JPEG: trained on the 50,000 training images",
            "accuracy": f"{share_right:.4f}",
            "tested": f"on the {len(x):,} test images, which neither training nor choices have seen",
            "features": f"{cifar10.width}",
            "versions": versions("torch", "pillow", "safetensors"),
        },
    )


def flip_and_shift(x: Pixels, generator: Generator) -> Pixels:
    """Mirror half of the images, and move all by up to CIFAR_SHIFT pixels each way; their mirrored edges move in."""
    n = len(x)
    is_flipped = torch.rand(n, 1, generator=generator) < 0.5
    down, right = torch.randint(2 * CIFAR_SHIFT + 1, (2, n, 1), generator=generator)
    places = torch.arange(x.shape[-1])
    rows = places + down
    columns = torch.where(is_flipped, places.flip(0), places) + right
    x = F.pad(x.float(), (CIFAR_SHIFT,) * 4, mode="reflect").to(x.dtype).permute(0, 2, 3, 1)
    return x[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def main() -> None:
    """Make one of the files again, and print what it says of itself."""
    parser = argparse.ArgumentParser(description="Train a classifier of dumo's metrics again.")
    parser.add_argument("name", choices=KEYS)
    name = parser.parse_args().name
    torch.set_num_threads(1)  # so that sums have one order, and weights are the same on the same processor
    if name == "digits":
        origin = make_digits(digits.file)
    else:
        folder = user_path("$DUMO_DATA/cifar10", "the recipe's folder")
        origin = make_cifar10(cifar10.file, folder, lambda n, loss: print(f"epoch {n + 1}: loss {loss:.4f}"))
    for key, value in origin.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
