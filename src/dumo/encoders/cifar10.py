"""A small classifier of CIFAR-10, whose inner activations are the features of that data's metrics.

Images are 32x32, RGB, in [-1, 1], ten classes. The 128 features are the means of the last activations over the image,
standardised (about mean 0, variance 1 over the training images), so no feature outweighs another and a Fréchet distance
counts in variances; the last layer reads them as they are. The net is residual (He et al. 2016), 16 M multiply-adds an
image, so that a processor reads thousands of images a second. It is trained without label smoothing, which draws the
features of a class together (Müller et al. 2019): what tells a good image of a class from a poor one would go. Two of
the features do not vary over the training images, and count for nothing.

tools/train_classifier.py makes the shipped file again.
"""

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.io import digest, weights

Images = Float[Tensor, "n 3 32 32"]
Labels = Int64[Tensor, " n"]

WIDTH = 128  # features
PIECE = 500  # images at a time through the net
WEIGHTS = Path(__file__).with_name("cifar10.safetensors")


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
            _conv(3, 32, size=4, stride=2),
            nn.ReLU(),
            Residual(32),
            _conv(32, 64, stride=2),
            nn.ReLU(),
            Residual(64),
            _conv(64, WIDTH, stride=2),
            nn.ReLU(),
            Residual(WIDTH),
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


def _conv(before: int, after: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution, normalised."""
    conv = nn.Conv2d(before, after, size, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after))
