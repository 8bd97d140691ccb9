"""A small classifier of handwritten digits, whose inner activations are the features of the digits' metrics.

Images are 8x8, one channel, in [-1, 1], ten classes. The 32 features are the last layer's input before its
nonlinearity, standardised (about mean 0, variance 1 over the data), so no feature outweighs another and a Fréchet
distance counts in variances. 32 of them because a distance of n rows is biased in proportion to features / n and half
the data set is 898 rows; 64 double that bias and see blur, noise and lost classes about as well (measured).

tools/train_classifier.py makes the shipped file again.
"""

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.io import weights

Digits = Float[Tensor, "n 1 8 8"]
Labels = Int64[Tensor, " n"]

WIDTH = 32  # features
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


def features(x: Digits) -> Float[Tensor, "n f"]:
    """The `WIDTH` features of images in [-1, 1], in float32 on the CPU."""
    return torch.cat([shipped().features(part) for part in x.to("cpu", torch.float32).split(500)])


def predict(x: Digits) -> Labels:
    """The most probable class of images in [-1, 1]."""
    return torch.cat([shipped()(part) for part in x.to("cpu", torch.float32).split(500)]).argmax(1)
