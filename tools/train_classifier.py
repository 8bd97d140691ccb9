"""Train again the small classifiers whose inner activations are the features of dumo's own metrics.

    python tools/train_classifier.py digits       # seconds; on one machine byte for byte
    python tools/train_classifier.py cifar10      # from the images in $DUMO_DATA/cifar10, twelve minutes of one core

Each is written into src/dumo/encoders, and changes every number that is measured with it. Nothing is written that is
not good enough on images that training has not seen.

`main` calls `make_digits` or `make_cifar10`. Both read the images, train (`train_digits`, `train_cifar10`), measure and
require an `accuracy`, and write the weights with metadata that say where they come from (`save_weights`).
"""

import argparse
import json
import sys
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
from dumo.data.images import labels_of
from dumo.data.rows import open_rows
from dumo.encoders import classifier
from dumo.encoders.classifier import cifar10, digits
from dumo.io import file as files
from dumo.io.picture import from_uint8
from dumo.io.read import user_path
from dumo.runtime.random import stream
from dumo.types import UserError

Images = Float[Tensor, "n c h w"]
Pixels = UInt8[Tensor, "n 3 32 32"]
Labels = Int64[Tensor, " n"]
NetT = TypeVar("NetT", bound=nn.Module)
EpochCallback = Callable[[int, float], None]  # called with the number of an epoch, from 0, and its mean loss

# of `dumo.runtime.random.stream`, by data set: the shipped weights were drawn and trained with these
RANDOM_KEYS = {"digits": "dumo.metrics.classifier", "cifar10": "dumo.metrics.cifar"}
IMAGES_AT_ONCE = 500  # that go through a net together when accuracy is measured: ours
# digits: ours
DIGITS_HELD_OUT = 0.2  # the share of rows that is not trained on
DIGITS_MIN_ACCURACY = 0.98  # on the rows held out, below which no file is written
DIGITS_STEPS = 1000
DIGITS_BATCH = 64
DIGITS_RATE = 4e-3  # the highest learning rate
DIGITS_DECAY = 0.01  # weight decay
# CIFAR-10: ours, but for the shift
CIFAR_MIN_ACCURACY = 0.8  # on the test images, below which no file is written
CIFAR_EPOCHS = 10
CIFAR_BATCH = 128
CIFAR_RATE = 0.1  # the highest learning rate
CIFAR_MOMENTUM = 0.9
CIFAR_DECAY = 5e-4  # weight decay
CIFAR_SHIFT = 4  # pixels each way that a training image is moved by, at most (He et al. 2016)
# the files of the data set on the Hugging Face hub, by split
FILES = {"train": "train-00000-of-00001.parquet", "test": "test-00000-of-00001.parquet"}


def accuracy(net: nn.Module, x: Images, c: Labels) -> float:
    """The share of images whose class a net finds, in [0, 1]."""
    predictions: list[Tensor] = []
    with torch.no_grad():
        for images in x.split(IMAGES_AT_ONCE):
            logits = net(images)
            predictions.append(logits.argmax(1))
    is_right = torch.cat(predictions) == c
    return is_right.double().mean().item()


def require_accuracy(share_right: float, minimum: float) -> None:
    """Raise UserError for too low an accuracy."""
    if share_right < minimum:
        raise UserError(f"accuracy on what was held out is {share_right:.4f}, below {minimum}: nothing written")


def init_net(net_class: type[NetT], generator: Generator) -> NetT:
    """An untrained net. Its weights are drawn as by He et al. 2015, and its biases are 0.

    Normalisations begin as the identity, but the last one of each residual block has scale 0, so that the block begins
    as the identity (Goyal et al. 2017).
    """
    with torch.device("meta"):
        net = net_class()
    net.to_empty(device="cpu")
    for name, p in net.named_parameters():
        if p.ndim > 1:
            nn.init.kaiming_normal_(p, generator=generator)
            continue
        is_scale = name.endswith("weight")  # of a normalisation; else it is a bias
        ends_block = ".two." in name  # the second and last convolution of a `ClassifierBlock`, with its normalisation
        nn.init.constant_(p, 1.0 if is_scale and not ends_block else 0.0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    return net


def package_versions(*names: str) -> str:
    """The versions of these packages as text: `torch 2.6.0, pillow 11.1.0`."""
    return ", ".join(f"{name} {version(name)}" for name in names)


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write weights with metadata on where they come from. What is at `path` stays until the new file is complete."""
    header = {"origin": json.dumps(metadata)}  # one key, for safetensors writes several in any order
    with files.atomic_write(path) as temp_path:
        save_file(weights, temp_path, header)


def split_digits(n: int) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " h"]]:
    """Split n rows into those to train on, and those held out: the first DIGITS_HELD_OUT of a keyed permutation."""
    order = torch.randperm(n, generator=stream(RANDOM_KEYS["digits"], "hold-out"))
    num_held_out = int(DIGITS_HELD_OUT * n)
    return order[num_held_out:], order[:num_held_out]


def train_digits(x: Images, c: Labels) -> nn.Module:
    """Train on all these images: AdamW with one cycle of the rate, images shifted by up to a pixel each way."""
    draws = stream(RANDOM_KEYS["digits"], "train")
    net = init_net(classifier.DigitsClassifier, draws)
    optimizer = torch.optim.AdamW(net.parameters(), DIGITS_RATE, weight_decay=DIGITS_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, DIGITS_RATE, total_steps=DIGITS_STEPS)
    for _ in range(DIGITS_STEPS):
        rows = torch.randint(len(x), (DIGITS_BATCH,), generator=draws)
        images = shift_digits(x[rows], draws)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), c[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def make_digits(path: Path) -> dict[str, str]:
    """Train the classifier of digits and write it to `path`. Returns the metadata of the file.

    Raises UserError, and writes nothing, where the net is not good enough.
    """
    table = Digits().originals()
    train_rows, held_out_rows = split_digits(table.size)
    net = train_digits(table.x[train_rows], table.c[train_rows])
    share_right = accuracy(net, table.x[held_out_rows], table.c[held_out_rows])
    require_accuracy(share_right, DIGITS_MIN_ACCURACY)
    num_held_out = len(held_out_rows)
    metadata = {
        "recipe": "python tools/train_classifier.py digits",
        "data": (
            f"scikit-learn load_digits, {table.size:,} images, of the UCI set Optical Recognition of Handwritten Digits"
        ),
        "held_out": f"{num_held_out} rows: the first {DIGITS_HELD_OUT:.0%} of a keyed permutation (split_digits)",
        "accuracy": f"{share_right:.4f}",
        "features": f"{digits.width}",
        "versions": package_versions("torch", "scikit-learn", "safetensors"),
    }
    save_weights(path, net.state_dict(), metadata)
    return metadata


def shift_digits(x: Images, generator: Generator) -> Images:
    """Move every image (n, 1, 8, 8) by -1, 0 or 1 pixel each way; background, -1, moves in."""
    padded = F.pad(x, (1, 1, 1, 1), value=-1)
    windows = F.unfold(padded, 8)  # (n, 64, 9): the image as seen from each of 9 places
    window_of_row = torch.randint(9, (len(x),), generator=generator)
    row_numbers = torch.arange(len(x))
    return windows[row_numbers, :, window_of_row].view_as(x)


def cifar_images(folder: Path, split: str, count: int | None = None) -> tuple[Pixels, Labels]:
    """The first `count` images (None: all) of `train` or `test`, 0 ... 255, and their classes.

    The files are as on the Hugging Face hub (`dumo.data.rows`). Raises UserError where a file is missing, no table,
    or has no classes or fewer images than `count`; OSError where an image is damaged.
    """
    from PIL import Image  # slow to import

    file = folder / FILES[split]
    if not file.is_file():
        raise UserError(f"there is no {file}: set DUMO_DATA to the folder whose cifar10 holds {FILES[split]}")
    table = open_rows(file)
    labels = labels_of(table)
    if labels is None:
        raise UserError(f"{file} has no column label: take the file of the Hugging Face hub's uoft-cs/cifar10")
    if count is None:
        count = len(table)
    if count > len(table):
        raise UserError(f"{file} has {len(table):,} images, and count={count:,} are asked for: ask for fewer")
    images: list[np.ndarray] = []
    for row in range(count):
        image = Image.open(BytesIO(table.read(row)))
        images.append(np.asarray(image.convert("RGB")))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels, labels.c[:count]


def _ignore_epoch(epoch: int, loss: float) -> None:
    """Tell nobody of an epoch."""


def train_cifar10(x: Pixels, c: Labels, on_epoch: EpochCallback = _ignore_epoch) -> nn.Module:
    """Train on all these images: SGD with one cycle of the rate, images mirrored and shifted (He et al. 2016).

    Raises UserError for fewer images than a batch has.
    """
    if len(x) < CIFAR_BATCH:
        raise UserError(f"there are {len(x)} images to train on, and a batch has {CIFAR_BATCH}: give more images")
    draws = stream(RANDOM_KEYS["cifar10"], "train")
    net = init_net(classifier.Cifar10Classifier, draws)
    steps_per_epoch = len(x) // CIFAR_BATCH
    optimizer = torch.optim.SGD(net.parameters(), CIFAR_RATE, CIFAR_MOMENTUM, weight_decay=CIFAR_DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, CIFAR_RATE, total_steps=CIFAR_EPOCHS * steps_per_epoch, pct_start=0.25, cycle_momentum=False
    )
    for epoch in range(CIFAR_EPOCHS):
        total_loss = torch.zeros(())
        order = torch.randperm(len(x), generator=draws)
        full_batches = order[: steps_per_epoch * CIFAR_BATCH]
        for rows in full_batches.split(CIFAR_BATCH):
            images = from_uint8(flip_and_shift(x[rows], draws))
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), c[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
        on_epoch(epoch, (total_loss / steps_per_epoch).item())
    return net.eval()


def make_cifar10(path: Path, folder: Path, on_epoch: EpochCallback = _ignore_epoch) -> dict[str, str]:
    """Train the classifier of CIFAR-10 and write it to `path`. Returns the metadata of the file.

    `folder` holds the images. Matrices and kernels are stored in half precision, which halves the file, and the
    accuracy is that of the stored weights. Raises UserError, and writes nothing, where the net is not good enough.
    """
    train_x, train_c = cifar_images(folder, "train")
    net = train_cifar10(train_x, train_c, on_epoch)

    # round the weights as they are stored
    stored: dict[str, Tensor] = {}
    for name, weight in net.state_dict().items():
        stored[name] = weight.detach().half() if weight.ndim > 1 else weight
    net.load_state_dict({name: weight.float() for name, weight in stored.items()})

    test_x, test_c = cifar_images(folder, "test")
    share_right = accuracy(net, from_uint8(test_x), test_c)
    require_accuracy(share_right, CIFAR_MIN_ACCURACY)
    metadata = {
        "recipe": "python tools/train_classifier.py cifar10",
        "data": f"CIFAR-10 (Krizhevsky 2009) re-encoded as JPEG: trained on the {len(train_x):,} training images",
        "accuracy": f"{share_right:.4f}",
        "tested": f"on the {len(test_x):,} test images, which neither training nor choices have seen",
        "features": f"{cifar10.width}",
        "versions": package_versions("torch", "pillow", "safetensors"),
    }
    save_weights(path, stored, metadata)
    return metadata


def flip_and_shift(x: Pixels, generator: Generator) -> Pixels:
    """Mirror half of the images, and move all by up to CIFAR_SHIFT pixels each way; their mirrored edges move in."""
    n = len(x)
    is_flipped = torch.rand(n, 1, generator=generator) < 0.5
    down, right = torch.randint(2 * CIFAR_SHIFT + 1, (2, n, 1), generator=generator)
    side = torch.arange(x.shape[-1])
    rows = side + down  # (n, 32), of the padded image
    columns = torch.where(is_flipped, side.flip(0), side) + right
    padded = F.pad(x.float(), (CIFAR_SHIFT,) * 4, mode="reflect").to(x.dtype)  # reflection takes no whole numbers
    channels_last = padded.permute(0, 2, 3, 1)
    image_numbers = torch.arange(n)
    moved = channels_last[image_numbers[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def main() -> None:
    """Make one of the files again, and print its metadata."""
    parser = argparse.ArgumentParser(description="Train a classifier of dumo's metrics again.")
    parser.add_argument("name", choices=RANDOM_KEYS)
    name = parser.parse_args().name
    torch.set_num_threads(1)  # so that sums have one order, and weights are the same on the same processor
    try:
        if name == "digits":
            metadata = make_digits(digits.file)
        else:
            folder = user_path("$DUMO_DATA/cifar10", "the recipe's folder")
            metadata = make_cifar10(cifar10.file, folder, print_epoch)
    except UserError as error:
        sys.exit(f"error: {error}")
    for key, value in metadata.items():
        print(f"{key}: {value}")


def print_epoch(epoch: int, loss: float) -> None:
    """Print the mean loss of an epoch, whose number counts from 0."""
    print(f"epoch {epoch + 1}: loss {loss:.4f}")


if __name__ == "__main__":
    main()
