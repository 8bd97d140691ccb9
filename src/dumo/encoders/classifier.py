"""Small classifiers of digits and of CIFAR-10, whose activations are the features of the metrics on these data sets.

Features are standardised (about mean 0, variance 1 over the training images), so no feature outweighs another and a
Fréchet distance is in units of variances. The digits net has 32 features, because the bias of a distance of n rows is
proportional to features / n and half the data set is 898 rows; 64 features double the bias and detect blur, noise and
missing classes about as well (measured). The CIFAR-10 net has 128, two of which are constant over the training images.
It is trained without label smoothing, which contracts the features of a class (Müller et al. 2019) and so hides
differences in image quality within a class.

`digits` and `cifar10` are the classifiers with bundled weights; call their `features` and `classify`.
tools/train_classifier.py trains the weights. Layer names are part of the file format.
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

IMAGES_AT_ONCE = 500  # per batch


class DigitsClassifier(nn.Module):
    """A net for grey images (n, 1, 8, 8): convolutions at 8x8, 4x4 and 2x2, then a linear layer of features.

    Features are taken before the nonlinearity.
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
        """Map x (n, width, h, h) to a non-negative tensor of the same shape."""
        return F.relu(x + self.two(F.relu(self.one(x))))


class Cifar10Classifier(nn.Module):
    """A net for RGB images (n, 3, 32, 32): residual blocks at 16x16, 8x8 and 4x4, then the mean over the image.

    It needs 16 M multiply-adds per image, so a CPU processes thousands of images per second.
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
        x = x.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        return self.norm(self.trunk(x).mean((2, 3)))

    def logits(self, f: Features) -> Float[Tensor, "n 10"]:
        """Return a logit per class, given features (n, width)."""
        return self.head(f)

    def forward(self, x: Images) -> Float[Tensor, "n 10"]:
        """Return a logit per class, given images in [-1, 1]."""
        return self.logits(self.features(x))


@dataclass(frozen=True)
class ShippedClassifier:
    """A classifier with bundled weights, on the CPU, in evaluation mode."""

    kind: type[DigitsClassifier | Cifar10Classifier]
    file: Path

    @property
    def width(self) -> int:
        """The number of features."""
        return self.kind.width

    @cached_property
    def net(self) -> DigitsClassifier | Cifar10Classifier:
        """The net with its weights, loaded at first use."""
        with torch.device("meta"):  # no random initialization, so the global generator does not advance
            net = self.kind()
        net.load_state_dict({name: w.float() for name, w in tensor_files.load(self.file).items()}, assign=True)
        return net.eval().requires_grad_(False)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weight file, which is reported with every score."""
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
    """Return a convolution from `inputs` to `outputs` channels, followed by batch normalisation."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))
