"""Small data and a cheap codec for the tests of codecs, and an encoder that runs in a process of its own."""

from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from dumo.codecs import Identity, SdVae
from dumo.codecs.scaled import Images, Latent, Moments, Opened
from dumo.data.cache import Plan
from dumo.data.encode import encode
from dumo.random import stream

SIDE, CLASSES = 4, 7
PLAN = Plan(resolution=SIDE, classes=CLASSES, shard_rows=16, dtype="float32")


class Blurred:
    """Each pixel's Gaussian: its mean the pixel, its deviation |pixel| / 4 + 1/8."""

    def encode(self, images: Images) -> Moments:
        """Means and deviations."""
        return torch.cat([images, images.abs() / 4 + 1 / 8], 1)

    def decode(self, raw: Latent) -> Images:
        """As it is."""
        return raw


GAUSSIAN = SdVae(channels=3, factor=1, shift=(0.25, 0.0, -0.5), scale=(2.0, 1.0, 0.5), weights="here")
OPENED = Opened(GAUSSIAN, Blurred(), "0" * 64, torch.device("cpu"))


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


def work(out: Path, count: int, rank: int, world: int, parent: Connection | None) -> None:
    """Encode, in a process of its own; with a parent, every tick waits until it may go on."""
    torch.set_num_threads(1)

    def tick(done: int, note: str) -> None:
        if parent:
            parent.send(done)
            parent.recv()

    encode(Pictures(count), Identity().open(), PLAN, out, batch=4, rank=rank, world=world, tick=tick)
