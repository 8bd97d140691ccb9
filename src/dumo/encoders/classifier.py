"""Small classifiers of digits and of CIFAR-10; their inner activations are the features of these data's metrics.

Features are standardised (about mean 0, variance 1 over the training images), so no feature outweighs another and a
Fréchet distance counts in variances. Of digits there are 32, because a distance of n rows is biased in proportion to
features / n and half the data set is 898 rows; 64 double that bias and see blur, noise and lost classes about as well
(measured). Of CIFAR-10 there are 128, of which two do not vary over the training images and count for nothing. That net
is trained without label smoothing, which draws the features of a class together (Müller et al. 2019) and so hides
whether an image of a class is a good one.

`digits` and `cifar10` are the classifiers with the weights that come with the package: ask them for `features` and
`classify`. tools/train_classifier.py makes the files of weights again; their names of layers are file format.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from dumo.io import digest, tensor_files

Images = Float[Tensor, "n c h w"]
Features = Float[Tensor, "n f"]
Labels = Int64[Tensor, " n"]

IMAGES_AT_ONCE = 500  # that go through a net together: ours


class DigitsClassifier(nn.Module):
    """A net for grey images (n, 1, 8, 8): three convolutions, to 8x8, 4x4 and 2x2, then a linear layer of features.

    Features are taken before the nonlinearity that follows them.
    """

    width: ClassVar[int] = 32  # features

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
            nn.Linear(256, self.width),
        )
        self.norm = nn.BatchNorm1d(self.width, affine=False)
        self.head = nn.Linear(self.width, 10)

    def features(self, x: Images) -> Features:
        """Return the features of images in [-1, 1], before `head`."""
        return self.norm(self.trunk(x))

    def logits(self, f: Features) -> Float[Tensor, "n 10"]:
        """Return a logit per class, given features (n, width)."""
        return self.head(F.silu(f))

    def forward(self, x: Images) -> Float[Tensor, "n 10"]:
        """Return a logit per class, given images in [-1, 1]."""
        return self.logits(self.features(x))


class ClassifierBlock(nn.Module):
    """A residual block (He et al. 2016): relu(x + conv(relu(conv x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = _conv(width, width)
        self.two = _conv(width, width)

    def forward(self, x: Float[Tensor, "n w h h"]) -> Float[Tensor, "n w h h"]:
        """Map x (n, width, h, h) to the same shape; no number is negative."""
        return F.relu(x + self.two(F.relu(self.one(x))))


class Cifar10Classifier(nn.Module):
    """A net for RGB images (n, 3, 32, 32): residual blocks at 16x16, 8x8 and 4x4, then the mean over the image.

    16 M multiply-adds an image, so that a processor reads thousands of images a second.
    """

    width: ClassVar[int] = 128  # features

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(3, 32, size=4, stride=2),
            nn.ReLU(),
            ClassifierBlock(32),
            _conv(32, 64, stride=2),
            nn.ReLU(),
            ClassifierBlock(64),
            _conv(64, self.width, stride=2),
            nn.ReLU(),
            ClassifierBlock(self.width),
        )
        self.norm = nn.BatchNorm1d(self.width, affine=False)
        self.head = nn.Linear(self.width, 10)

    def features(self, x: Images) -> Features:
        """Return the features of images in [-1, 1], before `head`."""
        x = x.contiguous(memory_format=torch.channels_last)  # a third quicker on a processor
        return self.norm(self.trunk(x).mean((2, 3)))

    def logits(self, f: Features) -> Float[Tensor, "n 10"]:
        """Return a logit per class, given features (n, width)."""
        return self.head(f)

    def forward(self, x: Images) -> Float[Tensor, "n 10"]:
        """Return a logit per class, given images in [-1, 1]."""
        return self.logits(self.features(x))


@dataclass(frozen=True)
class ShippedClassifier:
    """A classifier with the weights that come with the package, on the CPU, in evaluation mode."""

    kind: type[DigitsClassifier | Cifar10Classifier]
    file: Path

    @property
    def width(self) -> int:
        """The number of features."""
        return self.kind.width

    @cached_property
    def net(self) -> DigitsClassifier | Cifar10Classifier:
        """The net with its weights, read at first use."""
        with torch.device("meta"):  # no weights are drawn, so nobody's random numbers move
            net = self.kind()
        net.load_state_dict({name: w.float() for name, w in tensor_files.load(self.file).items()}, assign=True)
        return net.eval().requires_grad_(False)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file of weights; it goes with every number that was measured with them."""
        return digest.of_file(self.file)

    def features(self, x: Images) -> Features:
        """Return the features of images in [-1, 1], in float32 on the CPU."""
        return torch.cat([self.net.features(part) for part in x.to("cpu", torch.float32).split(IMAGES_AT_ONCE)])

    def classify(self, f: Features) -> Labels:
        """Return the most probable class of images with these features."""
        return self.net.logits(f).argmax(1)


digits = ShippedClassifier(DigitsClassifier, Path(__file__).with_name("digits.safetensors"))
cifar10 = ShippedClassifier(Cifar10Classifier, Path(__file__).with_name("cifar10.safetensors"))


def _conv(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution from `inputs` to `outputs` channels, then a batch normalisation."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
