"""A small classifier of handwritten digits, whose inner activations are the features of the digits' metrics.

Images are 8x8, one channel, in [-1, 1], ten classes. The 32 features are the last layer's input before its
nonlinearity, standardised (about mean 0, variance 1 over the data), so no feature outweighs another and a Fréchet
distance counts in variances. 32 of them because a distance of n rows is biased in proportion to features / n and half
the data set is 898 rows; 64 double that bias and see blur, noise and lost classes about as well (measured).

`python -m dumo.features.digits` makes the shipped file again, in seconds; on one machine byte for byte.
"""

import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from dumo.io import weights
from dumo.random import stream
from dumo.types import UserError

Digits = Float[Tensor, "n 1 8 8"]
Labels = Int64[Tensor, " n"]

WIDTH = 32  # features
SHARE = 0.2  # of the data, never trained on
FLOOR = 0.98  # accuracy on that share, below which no file is written
STEPS, BATCH, RATE, DECAY = 1000, 64, 4e-3, 0.01  # ours
KEY = "dumo.metrics.classifier"  # of the draws: what this module was called when the shipped weights were made
WEIGHTS = Path(__file__).with_name("digits.safetensors")


class Classifier(nn.Module):
    """Three convolutions, 8x8 -> 4x4 -> 2x2, a standardised layer of `WIDTH` features, and one output per class."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(256, WIDTH),
        )
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.head = nn.Linear(WIDTH, 10)

    def features(self, x: Digits) -> Float[Tensor, "n f"]:
        """What the last layer sees, before its nonlinearity."""
        return self.norm(self.trunk(x))

    def forward(self, x: Digits) -> Float[Tensor, "n 10"]:
        """A logit per class."""
        return self.head(F.silu(self.features(x)))


@cache
def shipped() -> Classifier:
    """The classifier with the weights that come with the package, on the CPU, in evaluation mode."""
    with torch.device("meta"):  # no weights are drawn, so nobody's random numbers move
        net = Classifier()
    net.load_state_dict(weights.load(WEIGHTS), assign=True)
    return net.eval().requires_grad_(False)


def origin(path: Path = WEIGHTS) -> dict[str, str]:
    """Where the weights come from: recipe, data, held-out share, accuracy, versions."""
    return json.loads(weights.notes(path)["origin"])


def features(x: Digits) -> Float[Tensor, "n f"]:
    """The `WIDTH` features of images in [-1, 1], in float32 on the CPU."""
    return torch.cat([shipped().features(part) for part in x.to("cpu", torch.float32).split(500)])


def predict(x: Digits) -> Labels:
    """The most probable class of images in [-1, 1]."""
    return torch.cat([shipped()(part) for part in x.to("cpu", torch.float32).split(500)]).argmax(1)


def digits() -> tuple[Digits, Labels]:
    """scikit-learn's 1,797 digits: grey levels 0..16 as -1..1, and their classes."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels, dtype=torch.int64)


def split(n: int) -> tuple[Int64[Tensor, " t"], Int64[Tensor, " h"]]:
    """The rows to train on and those held out: of a permutation keyed by name, the first `SHARE` is held out."""
    order = torch.randperm(n, generator=stream(KEY, "hold-out"))
    return order[int(SHARE * n) :], order[: int(SHARE * n)]


def train(x: Digits, c: Labels) -> Classifier:
    """Train on all these rows: AdamW with one cycle of the rate, images shifted by up to a pixel each way."""
    draws = stream(KEY, "train")
    net = _fresh(draws)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=draws)
        optimizer.zero_grad()
        F.cross_entropy(net(_shift(x[rows], draws)), c[rows]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def accuracy(net: nn.Module, x: Digits, c: Labels) -> float:
    """The share of right answers, in [0, 1]."""
    with torch.no_grad():
        return (net(x).argmax(1) == c).double().mean().item()


def make(path: Path = WEIGHTS) -> dict[str, str]:
    """Train, check and write the file; what it says of itself. Raises `UserError` where it is not good enough."""
    x, c = digits()
    taught, held = split(len(x))
    net = train(x[taught], c[taught])
    right = accuracy(net, x[held], c[held])
    if right < FLOOR:
        raise UserError(
            f"accuracy on held-out digits is {right:.4f}, below {FLOOR}: nothing written, change the recipe"
        )
    told = {
        "recipe": "python -m dumo.features.digits",
        "data": "scikit-learn load_digits, 1,797 images, of the UCI set Optical Recognition of Handwritten Digits",
        "held_out": f"{len(held)} rows: the first {SHARE:.0%} of a keyed permutation (dumo.features.digits.split)",
        "accuracy": f"{right:.4f}",
        "features": f"{WIDTH}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "scikit-learn", "safetensors")),
    }
    save_file(net.state_dict(), path, {"origin": json.dumps(told)})  # several keys would come in any order
    return told


def _fresh(generator: Generator) -> Classifier:
    """An untrained net: weights of He et al. 2015, biases 0."""
    with torch.device("meta"):
        net = Classifier()
    net.to_empty(device="cpu").norm.reset_running_stats()
    for name, p in net.named_parameters():
        nn.init.zeros_(p) if name.endswith("bias") else nn.init.kaiming_normal_(p, generator=generator)
    return net


def _shift(x: Digits, generator: Generator) -> Digits:
    """Every image moved by -1, 0 or 1 pixel each way, background (-1) moving in."""
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1), 8)  # (n, 64, 9)
    which = torch.randint(9, (len(x),), generator=generator)
    return patches[torch.arange(len(x)), :, which].view_as(x)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the order of sums, so the same weights on the same processor
    for key, value in make().items():
        print(f"{key}: {value}")
