"""The named protocols of images: FID and its kin, on the features of Inception.

Which number a paper calls FID depends on the network, the resize before it, how colours are rounded, how many images,
of which classes, against which statistics. A name fixes all of it (`LOCKED`); what may be changed shows in the name.
Fixed for all: the TF-2015 Inception, TensorFlow's resize without antialiasing, colours rounded to the nearest of 0 ..
255, classes in turn (i mod classes), Inception Score in splits of 5000 by number and without the last layer's bias,
3 neighbours. So `adm-*` are ADM's own definitions; ADM rounds distances of neighbours to half precision, we do not.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from pydantic import Field
from torch import Tensor

from dumo import dist
from dumo.flow.draw import stream
from dumo.metrics.frechet import frechet_distance
from dumo.metrics.inception import WIDTH, Pixels
from dumo.metrics.kernel import kid
from dumo.metrics.neighbours import precision_recall
from dumo.metrics.reference import read_adm
from dumo.metrics.tally import Batch, Eye, Tally, count, gather
from dumo.types import Sample, Spec, UserError

Images = Iterable[UInt8[Tensor, "_ 3 _ _"]]  # in batches, of any sizes
Made = Iterable[tuple[Int64[Tensor, " _"], Float[Tensor, "..."]]]  # numbers and samples, likewise
Name = Literal["adm-imagenet256-50k", "adm-imagenet512-50k", "cifar10-train50k", "folder"]

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
TRAIN = 1_281_167  # images of ImageNet-1k's training set, of which ADM's moments are
SUBSETS = 100  # of the kernel distance (Binkowski et al. 2018)
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)


class Locked(NamedTuple):
    """What a name fixes; None where the data decides."""

    samples: int
    size: int | None  # pixels a side
    classes: int | None
    real: int | None  # images of the reference
    subset: int  # rows per subset of the kernel distance
    url: str | None = None  # of ADM's file, which then is the reference; None: images are


LOCKED: dict[Name, Locked] = {
    "adm-imagenet256-50k": Locked(50_000, 256, 1000, 10_000, 1000, f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz"),
    "adm-imagenet512-50k": Locked(50_000, 512, 1000, 10_000, 1000, f"{ADM}/512/VIRTUAL_imagenet512.npz"),
    "cifar10-train50k": Locked(50_000, 32, 10, 50_000, 1000),
    "folder": Locked(10_000, None, None, None, 100),
}


class ImageProtocol(Spec):
    """Images in colour, decoded, by the features of Inception."""

    kind: Name
    samples: int | None = Field(default=None, ge=1)  # None: as many as the name says
    frechet: bool = True  # without it, FID and sFID are left out: for sets of 2048 images or fewer

    @property
    def name(self) -> str:
        """`kind`, with whatever is not as the name says."""
        odd = [] if self.total == self.locked.samples else [f"{self.total} samples"]
        odd += [] if self.frechet else ["no Fréchet distances"]
        return f"{self.kind} ({', '.join(odd)})" if odd else self.kind

    @property
    def locked(self) -> Locked:
        """What the name fixes."""
        return LOCKED[self.kind]

    @property
    def total(self) -> int:
        """How many samples are judged."""
        return self.samples or self.locked.samples

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Refuse, with a `UserError` and before any work, images that this protocol does not judge, or too few.

        `shape` is that of a decoded image. Unconditional samples, of 0 classes, may be judged by any protocol.
        """
        size, wanted = self.locked.size, self.locked.classes
        if len(shape) != 3 or shape[0] != 3 or size not in (None, shape[1]) or size not in (None, shape[2]):
            pixels = "any size" if size is None else f"{size}x{size}"
            raise UserError(
                f"protocol {self.kind} judges colour images of {pixels}, not samples of shape {tuple(shape)}:"
                " decode latents first, or choose another protocol"
            )
        if classes and wanted not in (None, classes):
            raise UserError(f"protocol {self.kind} is of {wanted} classes, not {classes}: choose another protocol")
        if self.frechet and self.total <= WIDTH:
            raise UserError(
                f"a Fréchet distance of {WIDTH} features needs more than {WIDTH} samples, here are {self.total}:"
                " give more, or set frechet to false and go by kid"
            )

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """The class of sample i: i mod `classes`, all 0 where there are none."""
        return torch.arange(self.total) % max(classes, 1)

    def judge(self, eye: Eye, batches: Made) -> Tally:
        """What the samples come to: of each batch their numbers in [0, total) and the samples, in [-1, 1].

        With several ranks each gives its own share, and all get the whole. Raises `UserError` where samples are
        missing, come twice, or are no images.
        """
        pixels = ((index, to_pixels(x)) for index, x in batches)
        return gather(count(eye, pixels, self.total), self.total)

    def reference(self, eye: Eye, source: Path | Images) -> Tally:
        """What the data comes to: `source` is ADM's file where the name says so, else all images in batches.

        With several ranks every one gives the same. Raises `UserError` for the other of the two, and for more or fewer
        images than the name says.
        """
        locked = self.locked
        if isinstance(source, Path) != (locked.url is not None):
            wanted = f"the file {locked.url}" if locked.url else "the images themselves"
            raise UserError(f"protocol {self.kind} compares with {wanted}: give that")
        if not isinstance(source, Path):
            return self._counted(eye, source)
        file = read_adm(source, count=TRAIN)
        if file.shape[:3] != (locked.real, locked.size, locked.size):
            raise UserError(
                f"{source} has images of shape {file.shape}, protocol {self.kind} compares with {locked.real} of"
                f" {locked.size}x{locked.size}: give the file {locked.url}"
            )
        return replace(self._counted(eye, file.images()), pool=file.pool, spatial=file.spatial)

    def score(self, fake: Tally, real: Tally, device: torch.device | str = "cpu") -> dict[str, float]:
        """`fid`, `sfid` (squared, as is the custom), `kid`, `is`, both with `_sd`, `precision` and `recall`.

        Raises `UserError` where there are too few images for one of them. Neighbours are looked up on `device`: on a
        GPU 50,000 against 50,000 take minutes, on a CPU hours.
        """
        distances = self._distances(fake, real)  # the first to refuse
        rows, data = fake.rows.to(device), real.rows.to(device)
        draws = stream(self.kind, "kid")
        mean, sd = kid(rows, data, subsets=SUBSETS, subset_size=self.locked.subset, generator=draws)
        score, score_sd = fake.score.value()
        precision, recall = precision_recall(data, rows, NEIGHBOURS)
        return distances | {
            "kid": mean,
            "kid_sd": sd,
            "is": score,
            "is_sd": score_sd,
            "precision": precision,
            "recall": recall,
        }

    def _distances(self, fake: Tally, real: Tally) -> dict[str, float]:
        """FID and sFID, where they are wanted."""
        if not self.frechet:
            return {}
        if min(real.pool.count, fake.pool.count) <= len(real.pool.mean):
            raise UserError(
                f"{fake.pool.count} samples and {real.pool.count} images of the data give no Fréchet distance of"
                f" {len(real.pool.mean)} features: give more of both, or set frechet to false and go by kid"
            )
        return {
            "fid": frechet_distance(fake.pool, real.pool),
            "sfid": frechet_distance(fake.spatial, real.spatial),
        }

    def _counted(self, eye: Eye, images: Images) -> Tally:
        """All images of the data, numbered as they come, the work shared over ranks."""
        tally = gather(count(eye, _mine(images)))
        if self.locked.real not in (None, len(tally.index)):
            raise UserError(
                f"protocol {self.kind} compares with {self.locked.real} images, here are {len(tally.index)}:"
                " give them all, once"
            )
        return tally


def to_pixels(x: Sample) -> Pixels:
    """Samples (n, 1 or 3, h, w) as colours 0 .. 255, grey in all three: -1 is 0, 1 is 255, rounded and clamped.

    Raises `UserError` for other shapes, and where x is not finite.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UserError(f"samples of shape {tuple(x.shape[1:])} are no images of 1 or 3 channels: decode them first")
    if not x.isfinite().all():
        raise UserError("some samples are not finite numbers: train again with a lower rate, or clip the gradient")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def _mine(images: Images) -> Iterator[Batch]:
    """Batches of images with their numbers, from 0: of all ranks' batches in turn, this rank's."""
    first = 0
    for i, batch in enumerate(images):
        if i % dist.world() == dist.rank():
            yield torch.arange(first, first + len(batch)), batch
        first += len(batch)
