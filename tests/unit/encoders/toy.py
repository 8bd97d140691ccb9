"""Small data and a cheap codec for the tests of codecs, and an encoder that runs in a process of its own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dumo.data.cache import CachePlan
from dumo.data.encoding import encode
from dumo.encoders import SdVae, Taef2
from dumo.encoders.codec import Images, Latent, LoadedCodec, Moments
from dumo.runtime.random import stream

SIDE, CLASSES = 8, 7
PLAN = CachePlan(resolution=SIDE, classes=CLASSES, shard_rows=16, dtype="float32")


class Blurred:
    """The Gaussian of each 8 x 8 pixels and their colours: its mean m theirs, its deviation |m| / 4 + 1/8."""

    def encode(self, images: Images) -> Moments:
        """Means and deviations."""
        colours = F.avg_pool2d(images, 8)
        mean = torch.cat([colours, colours.mean(1, keepdim=True)], 1)
        return torch.cat([mean, mean.abs() / 4 + 1 / 8], 1)

    def decode(self, raw: Latent) -> Images:
        """The colours."""
        return F.interpolate(raw[:, :3], scale_factor=8.0)


class Sampled:
    """Every sixth of 8 x 8 pixels' numbers."""

    def encode(self, images: Images) -> Moments:
        """32 numbers."""
        return F.pixel_unshuffle(images, 8)[:, ::6]

    def decode(self, raw: Latent) -> Images:
        """Grey."""
        return F.interpolate(raw.mean(1, keepdim=True), scale_factor=8.0).expand(-1, 3, -1, -1)


GAUSSIAN = LoadedCodec(SdVae(weights="here"), Blurred(), "0" * 64, torch.device("cpu"))
POINT = LoadedCodec(Taef2(weights="here"), Sampled(), "1" * 64, torch.device("cpu"))


@dataclass
class Pictures:
    """Random uint8 images, each a function of its number."""

    count: int
    reads: int = 0

    def __len__(self) -> int:
        return self.count

    def rows(self, i: slice, /) -> tuple[Tensor, Tensor]:
        """Images and labels, the label of row i being i mod 7."""
        self.reads += 1
        places = range(*i.indices(self.count))
        return torch.stack([picture(k) for k in places]), torch.tensor([k % CLASSES for k in places])


def picture(k: int) -> Tensor:
    """The k-th image, uint8."""
    return torch.randint(256, (3, SIDE, SIDE), generator=stream("picture", k), dtype=torch.uint8)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def work(out: Path, count: int, rank: int, world: int) -> None:
    """Encode, in a process of its own."""
    torch.set_num_threads(1)
    encode(Pictures(count), POINT, PLAN, out, batch=4, rank=rank, world=world)
