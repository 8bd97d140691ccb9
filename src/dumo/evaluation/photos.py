"""A named way to judge samples of one's own images, from 20 on, with nothing to be fetched.

The features are those of the shipped classifier of CIFAR-10 on images reduced to 32x32. They are not Inception's, so no
number is an FID, or to be compared with one. With them come measures that no network sees: pixels as Gaussians
(`dumo.evaluation.distance`), and whether samples are copies of the images that the net was trained on.

`open_photos`, which `dumo.evaluation.shipped` names, is the entrance: it looks at the data, and makes a
`PhotosEvaluator`, which scores samples.

With few images every number is rough, and most depend on how many there are; kernel distances do not. The others
compare samples with a random half of the images, equally many of both, in the same classes. What a perfect sampler, of
new images, would have is found between one half and the other, in the same classes too. All are means over `SPLITS`
splits. Images are judged as a file holds them, clamped to [-1, 1] and rounded to 8 bits. Of large sets every k-th image
is taken, so that at most `MAX_IMAGES` are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.encoders.classifier import cifar10
from dumo.evaluation.baseline import (
    class_facts,
    mmd,
    noise_by_class,
    perfect_by_class,
    random_parts,
    summarize,
)
from dumo.evaluation.distance import SIDE, mmd_deviation, pick, pixel_frechet
from dumo.evaluation.neighbours import nearest_two, precision_recall
from dumo.evaluation.protocol import Context, NumberedSamples, Protocol, Scores
from dumo.evaluation.shipped import MIN_PHOTOS
from dumo.evaluation.wholeset import collect
from dumo.io import digest
from dumo.io.picture import from_uint8, to_uint8
from dumo.io.source import Data, Finite
from dumo.runtime.random import noise, stream
from dumo.types import Sample, UserError

KIND = "photos"
PIECE = 64  # images that are read at a time: ours
MAX_IMAGES = 5000  # of the data that are looked at: ours
MAX_COMPARED = 1000  # images on either side of a comparison: ours
SPLITS = 10  # random halves of the data over which scores are averaged: ours
WIDTH = 16.0  # of the kernel: two images of CIFAR-10 are 15.9 apart, at the median
NEIGHBOURS = 3  # of precision and recall (Kynkäänniemi et al. 2019)
THUMB = 16  # pixels a side of the thumbnails in which neighbours are sought: ours
COPY_RATIO = 1 / 3  # a copy is nearer to one image than this share of its distance to the next one: ours
ROUGH = 500  # images: a report of fewer says that the spread is large. Ours

Rows = Float[Tensor, "_ _"]  # of images, each its features and its thumbnail (`rows_of`)
Cond = Int64[Tensor, " _"]  # classes of images


@dataclass(frozen=True)
class PhotosEvaluator:
    """Scores samples against the images of the data."""

    c: Cond  # of the samples
    real: Rows  # of the data
    real_c: Cond  # of the data
    shape: tuple[int, ...]  # of an image
    facts: dict[str, str]

    @property
    def half(self) -> int:
        """How many images are on either side of a comparison."""
        return min(len(self.real) // 2, len(self.c), MAX_COMPARED)

    def score(self, samples: NumberedSamples) -> Scores:
        """`mmd` and `class_mmd` with their standard errors, `pixel_fd`, `precision`, `recall`, and `copies`.

        `copies` is the share of samples whose distance to the nearest image, mirrored or not, is less than `COPY_RATIO`
        of that to the next one. Raises `UserError` where samples are missing.
        """
        fake = collect(((index, rows_of(x)) for index, x in samples), len(self.c))
        pairs: list[tuple[Rows, Rows]] = []
        for k in range(SPLITS):
            real_indices = self._random_half(k)
            fake_indices = indices_of_classes(self.real_c[real_indices], self.c, stream(KIND, "samples", k))
            pairs.append((fake[fake_indices], self.real[real_indices]))
        return {**self._mmd(fake, self.c), **self._mean_scores(pairs), "copies": self._share_of_copies(fake)}

    def baselines(self) -> dict[str, Scores]:
        """The scores of new real images, `perfect`, and of noise; the first one is called `mean`, its error `sd`."""
        return {"perfect": self._perfect(), "noise": self._noise()}

    def _perfect(self) -> Scores:
        """The scores of new real images: one random half of the images against the other."""
        pairs: list[tuple[Rows, Rows]] = []
        for k in range(SPLITS):
            draws = stream(KIND, "parts", k)
            parts = random_parts(self.real_c, len(self.real) // self.half, draws)  # disjoint
            a = pick(parts[0], self.half, draws)
            b = pick(parts[1], self.half, draws)
            pairs.append((self.real[a], self.real[b]))
        features = _features(self.real)
        copies = self._share_of_copies(self.real, same=True)
        copies_variance = copies * (1 - copies) * (1 / len(self.real) + 1 / len(self.c))
        return {
            "mean": 0.0,
            "sd": mmd_deviation(len(self.c), features, WIDTH, self.real_c),
            **perfect_by_class(self.c, features, WIDTH, self.real_c),
            **self._mean_scores(pairs),
            "copies": copies,
            "copies_sd": copies_variance**0.5,
        }

    def _noise(self) -> Scores:
        """The scores of noise in place of samples."""
        z = torch.cat([rows_of(noise(0, [i], 0, self.shape)) for i in range(self.half)])
        no_class = torch.zeros(len(z), dtype=torch.long)
        distance = self._mmd(z, no_class)
        return {
            "mean": distance["mmd"],
            "sd": distance["mmd_sd"],
            **noise_by_class(_features(z), _features(self.real), WIDTH, self.c, self.real_c),
            **self._mean_scores([(z, self.real[self._random_half(k)]) for k in range(SPLITS)]),
        }

    def _mmd(self, fake: Rows, c: Cond) -> Scores:
        """The kernel distances between all samples, of classes c, and all images."""
        return mmd(_features(fake), _features(self.real), WIDTH, c, self.real_c)

    def _random_half(self, k: int) -> Int64[Tensor, " _"]:
        """The indices of the images that the k-th split compares with samples."""
        return torch.randperm(len(self.real), generator=stream(KIND, "halves", k))[: self.half]

    def _mean_scores(self, pairs: Sequence[tuple[Rows, Rows]]) -> Scores:
        """`pixel_fd`, `precision` and `recall`, in the mean over pairs of equally many samples and images."""
        side = min(SIDE, isqrt((self.half - 1) // self.shape[0]))
        pixel_distances: list[float] = []
        precisions: list[float] = []
        recalls: list[float] = []
        for fake, real in pairs:
            precision, recall = precision_recall(_features(real), _features(fake), NEIGHBOURS)
            pixel_distances.append(pixel_frechet(self._thumbs(fake), self._thumbs(real), side))
            precisions.append(precision)
            recalls.append(recall)
        return {
            "pixel_fd": summarize(pixel_distances)["mean"],
            "precision": summarize(precisions)["mean"],
            "recall": summarize(recalls)["mean"],
        }

    def _share_of_copies(self, fake: Rows, *, same: bool = False) -> float:
        """The share of samples that are copies of images.

        `same`: the samples are the images themselves, and a copy is one that has a double among the others.
        """
        nearest, second = nearest_two(self._thumbs(self.real), self._thumbs(fake), same=same).unbind(1)
        return (nearest < COPY_RATIO * second).double().mean().item()

    def _thumbs(self, rows: Rows) -> Float[Tensor, "n c h w"]:
        """The thumbnails of these rows."""
        return rows[:, cifar10.width :].view(len(rows), self.shape[0], THUMB, THUMB)


def rows_of(x: Sample) -> Rows:
    """What scores need of images x (n, c, h, w), rounded to 8 bits: the features, then a thumbnail, flattened."""
    images = from_uint8(to_uint8(x.cpu()))
    thumbs = adaptive_avg_pool2d(images[:, : x.shape[1]], (THUMB, THUMB))
    features = cifar10.features(adaptive_avg_pool2d(images, (32, 32)))
    return torch.cat([features, thumbs.flatten(1)], 1)


def indices_of_classes(wanted: Cond, c: Cond, generator: Generator) -> Cond:
    """Random indices i (n,) with c[i] equal to the classes `wanted` (n,).

    An index comes twice only where a class is wanted more often than c has it. Raises `UserError` where c has none.
    """
    indices = torch.empty_like(wanted)
    for k in wanted.unique():
        candidates = (c == k).nonzero()[:, 0]
        positions = (wanted == k).nonzero()[:, 0]
        if not len(candidates):
            raise UserError(f"protocol {KIND}: no sample is of class {int(k)}: judge more samples than classes")
        order = torch.randperm(len(candidates), generator=generator)
        indices[positions] = candidates[order[torch.arange(len(positions)) % len(candidates)]]
    return indices


def _features(rows: Rows) -> Rows:
    """The features of these rows."""
    return rows[:, : cifar10.width]


def _read_images(data: Data, seed: int) -> Iterator[tuple[Sample, Cond, int, int]]:
    """Images in batches, of a large set every k-th: images, their classes, and how many rows are done, of how many."""
    if not isinstance(data, Finite):
        x, c = data.reference(MAX_IMAGES, seed)
        yield x[:MAX_IMAGES], c[:MAX_IMAGES], len(x), len(x)
        return
    step = -(-len(data) // MAX_IMAGES)
    for first in range(0, len(data), PIECE * step):
        stop = first + PIECE * step
        x, c = data.rows(slice(first, stop, step))
        if not len(x):
            continue
        if x.dtype == torch.uint8:
            x = from_uint8(x)
        yield x, c, min(stop, len(data)), len(data)


def open_photos(protocol: Protocol, context: Context) -> PhotosEvaluator:
    """Read the data, on the CPU whatever the device is. Raises `UserError` for fewer than `MIN_PHOTOS` images."""
    data = context.data()
    rows: list[Rows] = []
    classes: list[Tensor] = []
    shape: tuple[int, ...] = ()
    for x, c, done, total in _read_images(data, context.seed):
        shape = tuple(x.shape[1:])
        rows.append(rows_of(x))
        classes.append(c)
        if context.tick:
            context.tick(done, total)
    real = torch.cat(rows)
    if len(real) < MIN_PHOTOS:
        raise UserError(f"protocol {KIND} needs {MIN_PHOTOS} images or more, here are {len(real)}: add some")
    facts = {
        "features": f"{cifar10.width} of dumo's classifier of CIFAR-10 at 32x32, not Inception's: no FID",
        "features_sha256": cifar10.sha256,
        "rounding": "0 to 255",
        "reference": f"{len(real):,} of {data.size or 0:,} images of the data",
        "reference_sha256": digest.of_tensor(real),
    }
    if len(real) < ROUGH:
        facts["spread"] = f"rough: with {len(real)} images the baseline itself varies, see its sd"
    c = protocol.classes_of(context)
    real_c = torch.cat(classes)
    facts |= class_facts(c, real_c)
    return PhotosEvaluator(c, real, real_c, shape, facts)
