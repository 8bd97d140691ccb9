"""Judge samples of a small set of one's own images, from `MIN_PHOTOS` on, with nothing to be fetched.

`open_photos` is the entrance, for `dumo.evaluation.bundled`. It reads the images of the data and makes a
`PhotosEvaluator`, which

1. measures the samples as the images were measured (`MeasuredImages`), once all have come;
2. compares all samples with all images by kernel distances, which do not depend on how many there are;
3. compares equal numbers of both, in the same classes, by the other measures, which do. These scores are means over
   `SPLITS` random choices of images;
4. counts samples that are copies of images that the net was trained on.

The features are those of the shipped classifier of CIFAR-10, on images reduced to 32x32. They are not Inception's, so
no number is an FID, or to be compared with one. Pixels and copies are judged without a network. With few images every
number is rough: `baselines` says what a perfect sampler would have, by comparing images with others of the data.

Images are judged as a file holds them, clamped to [-1, 1] and rounded to 8 bits. Of more than `MAX_IMAGES` a random
choice is looked at, always the same: copies of the others are not seen, which the facts say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Float, Int64
from torch import Generator, Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dumo.encoders.classifier import cifar10
from dumo.evaluation.copy import THUMB_SIDE, Thumbs, nearest_images
from dumo.evaluation.estimate import mean_sd
from dumo.evaluation.frechet import PIXEL_SIDE, pixel_frechet
from dumo.evaluation.metric import CLASSES_SHA256
from dumo.evaluation.mmd import class_facts, lost_classes, mmd_scores, noise_class_mmd, perfect_mmd_scores
from dumo.evaluation.neighbours import precision_recall
from dumo.evaluation.protocol import Context, ImageTick, NumberedSamples, Protocol, Scores, name_of_data
from dumo.evaluation.wholeset import choose_rows, collect
from dumo.io import digest
from dumo.io.data_source import Data, Finite
from dumo.io.picture import from_uint8, to_uint8
from dumo.runtime.random import noise, stream
from dumo.types import Sample, UserError

KIND = "photos"
PIECE = 64  # images that are read at a time: ours
MIN_PHOTOS = 20  # images of the data, and samples, that photos judges at least: ours
SAMPLES_PER_CLASS = 2  # that photos is given where classes are many: `class_mmd` is over pairs
MAX_IMAGES = 5000  # of the data that are judged by: ours
MIN_COMPARED = MIN_PHOTOS // 2  # images on either side of a comparison, which there always are without classes
MAX_COMPARED = 1000  # images on either side of a comparison: ours
SPLITS = 10  # random choices of images over which scores are averaged: ours
WIDTH = 16.0  # of the kernel: two images of CIFAR-10 are 15.9 apart, at the median
CLASSIFIER_SIDE = 32  # pixels a side of CIFAR-10's images
FEW_IMAGES = 500  # a report of fewer says that the spread is large: ours

Classes = Int64[Tensor, " _"]
Indices = Int64[Tensor, " _"]


def open_photos(protocol: Protocol, context: Context) -> "PhotosEvaluator":
    """Read the data, on the CPU whatever the device is.

    Raises `UserError` for fewer than `MIN_PHOTOS` images, and where no sample is of one of their classes.
    """
    data = context.data()
    trained = context.trained() if context.trained else None  # None: the data themselves were trained on
    tick = context.tick or _no_tick
    num_data = data.size or 0
    num_trained = 0 if trained is None else trained.size or 0
    reads_before = min(num_data, MAX_IMAGES)
    reads_after = min(num_trained, MAX_IMAGES)
    real, real_c, shape, pixels_sha256 = _measure_images(data, context.seed, _part_of(tick, after=reads_after))
    num_images = len(real)
    sample_c = protocol.classes_of(context)
    _require_all_classes(sample_c, real_c, context)
    facts = {
        "features": f"{cifar10.width} of dumo's classifier of CIFAR-10 at 32x32, not Inception's: no FID",
        "features_sha256": cifar10.sha256,
        "rounding": "0 to 255",
        "reference": f"{num_images:,} of {num_data:,} images of {name_of_data(context.split)}",
        "reference_sha256": pixels_sha256,
    }
    if len(sample_c.unique()) > 1:
        facts[CLASSES_SHA256] = digest.of_tensor(real_c)
    if num_images < FEW_IMAGES:
        facts["spread"] = f"rough: with {num_images} images the baseline itself varies, see its sd"
    facts |= class_facts(sample_c, real_c)
    trained_thumbs = None
    if trained is not None:
        thumbs = [_thumbs_of(x) for x, _ in _read_images(trained, context.seed, _part_of(tick, before=reads_before))]
        trained_thumbs = torch.cat(thumbs)
        facts["copies"] = f"looked for among {len(trained_thumbs):,} of {num_trained:,} images that were trained on"
    elif num_images < num_data:
        facts["copies"] = f"looked for among {num_images:,} of {num_data:,} images of {name_of_data(context.split)}"
    return PhotosEvaluator(
        sample_c=sample_c,
        real=real,
        real_c=real_c,
        matched=MatchedClasses.of(sample_c, real_c),
        trained_thumbs=trained_thumbs,
        shape=shape,
        facts=facts,
    )


def _measure_images(data: Data, seed: int, tick: ImageTick) -> tuple["MeasuredImages", Classes, tuple[int, ...], str]:
    """The images to judge by, measured, with their classes, the shape of one, and the SHA-256 of their pixels.

    Pixels are hashed as a file holds them, in 8 bits: features differ in their last bits between machines. Raises
    UserError for fewer than `MIN_PHOTOS` images.
    """
    batches: list[MeasuredImages] = []
    classes: list[Tensor] = []
    image_hashes: list[str] = []
    shape: tuple[int, ...] = ()
    for x, c in _read_images(data, seed, tick):
        shape = tuple(x.shape[1:])
        batches.append(MeasuredImages.of(x))
        classes.append(c)
        pixels = to_uint8(x.cpu())[:, : x.shape[1]]
        image_hashes += [digest.of_tensor(image) for image in pixels]
    num_images = sum(len(c) for c in classes)
    if num_images < MIN_PHOTOS:
        raise UserError(f"protocol {KIND} needs {MIN_PHOTOS} images or more, here are {num_images}: add some")
    rows = torch.cat([batch.rows for batch in batches])
    pixels_sha256 = digest.of_bytes("".join(image_hashes).encode())
    return MeasuredImages(rows, batches[0].channels), torch.cat(classes), shape, pixels_sha256


def _require_all_classes(sample_c: Classes, real_c: Classes, context: Context) -> None:
    """Raise UserError where no sample is of one of the classes of the data."""
    lost = lost_classes(sample_c, real_c)
    if not lost:
        return
    problem = f"protocol {KIND}: no sample is of class {lost[0]}"
    if context.c is not None:
        raise UserError(f"{problem}: add some, or leave the class out of the images to compare with")
    more_samples = f"evaluate.protocol.samples={SAMPLES_PER_CLASS * context.classes}"
    raise UserError(
        f"{problem}: judge more than {len(sample_c)}, as by {more_samples}, in training by as much of evaluate.few"
    )


def _no_tick(done: int, total: int) -> None:
    """Show no progress."""


def _part_of(tick: ImageTick, *, before: int = 0, after: int = 0) -> ImageTick:
    """The tick of one reading of several: `before` images were read ahead of it, and `after` are read later."""
    return lambda done, total: tick(before + done, before + total + after)


def _read_images(data: Data, seed: int, tick: ImageTick) -> Iterator[tuple[Sample, Classes]]:
    """The images to judge by, at most `MAX_IMAGES`, in batches with their classes.

    `tick` is called after each piece of the data, also where none of its images could be read.
    """
    if not isinstance(data, Finite):
        x, c = data.reference(MAX_IMAGES, seed)
        rows = choose_rows(len(x), MAX_IMAGES, KIND, "rows")
        yield x[rows], c[rows]
        tick(len(rows), len(rows))
        return
    rows = choose_rows(len(data), MAX_IMAGES, KIND, "rows")
    num_read = 0
    for piece in rows.split(PIECE):
        x, c = data.rows(piece)
        if x.dtype == torch.uint8:
            x = from_uint8(x)
        if len(x):
            yield x, c
        num_read += len(piece)
        tick(num_read, len(rows))


@dataclass(frozen=True)
class MeasuredImages:
    """What the scores need of n images: their features, and a thumbnail of each.

    Both lie in one row per image, so that ranks can gather them.
    """

    rows: Float[Tensor, "n _"]  # the features, then the flattened thumbnail
    channels: int  # of a thumbnail, 1 or 3

    @classmethod
    def of(cls, x: Sample) -> "MeasuredImages":
        """Measure images x (n, 1 or 3, h, w), rounded to 8 bits. Raises UserError for samples of other shapes."""
        colours = from_uint8(to_uint8(x.cpu()))  # 3 channels, equal ones of a grey image
        features = cifar10.features(adaptive_avg_pool2d(colours, (CLASSIFIER_SIDE, CLASSIFIER_SIDE)))
        return cls(torch.cat([features, _thumbs_of(x).flatten(1)], 1), x.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Indices) -> "MeasuredImages":
        """The images of these indices."""
        return MeasuredImages(self.rows[indices], self.channels)

    @property
    def features(self) -> Float[Tensor, "n f"]:
        """The features of each image."""
        return self.rows[:, : cifar10.width]

    @property
    def thumbs(self) -> Float[Tensor, "n c h w"]:
        """The thumbnail of each image."""
        return self.rows[:, cifar10.width :].view(len(self), self.channels, THUMB_SIDE, THUMB_SIDE)


def _thumbs_of(x: Sample) -> Thumbs:
    """Thumbnails (n, c, THUMB_SIDE, THUMB_SIDE) of images x (n, c, h, w) of 1 or 3 channels, rounded to 8 bits."""
    colours = from_uint8(to_uint8(x.cpu()))[:, : x.shape[1]]
    return adaptive_avg_pool2d(colours, (THUMB_SIDE, THUMB_SIDE))


@dataclass(frozen=True)
class MatchedClasses:
    """The classes by which equal numbers of samples and images are compared.

    Each class is compared as often as it has samples, but with at most half of its images: the perfect sampler is
    measured by comparing images with others. No image is drawn twice, since samples on top of each other cover no space
    and lower recall.
    """

    sample_c: Classes
    real_c: Classes
    compared_c: Classes  # of the images on either side of a comparison, in random order

    @classmethod
    def of(cls, sample_c: Classes, real_c: Classes) -> "MatchedClasses":
        """Match these classes; all are of one class where else fewer than `MIN_COMPARED` images were left."""
        num_classes = int(torch.cat([sample_c, real_c]).max()) + 1
        sample_counts = sample_c.bincount(minlength=num_classes)
        real_counts = real_c.bincount(minlength=num_classes)
        counts = torch.minimum(sample_counts, real_counts // 2)
        if num_classes > 1 and counts.sum() < MIN_COMPARED:
            return cls.of(torch.zeros_like(sample_c), torch.zeros_like(real_c))
        compared_c = torch.arange(num_classes).repeat_interleave(counts)
        order = torch.randperm(len(compared_c), generator=stream(KIND, "compared"))
        return cls(sample_c, real_c, compared_c[order[:MAX_COMPARED]])


Pair = tuple[MeasuredImages, MeasuredImages]  # equally many samples and images that are compared


@dataclass(frozen=True)
class PhotosEvaluator:
    """Scores samples against the images of the data, and finds copies of those that were trained on."""

    sample_c: Classes
    real: MeasuredImages  # the images of the data
    real_c: Classes
    matched: MatchedClasses
    trained_thumbs: Thumbs | None  # of the images that were trained on; None: these are `real`
    shape: tuple[int, ...]  # of an image, (channels, height, width)
    facts: dict[str, str]

    @property
    def num_compared(self) -> int:
        """How many images are on either side of a comparison."""
        return len(self.matched.compared_c)

    def score(self, samples: NumberedSamples) -> Scores:
        """`mmd` and `class_mmd` with their standard errors, `pixel_fd`, `precision`, `recall`, and `copies`.

        `copies` is the share of samples that are copies of an image that was trained on, mirrored or not
        (`NearestImages.is_copy`).
        Every rank must call it. Raises `UserError` where samples are missing.
        """
        batches = ((index, MeasuredImages.of(x).rows) for index, x in samples)
        fake = MeasuredImages(collect(batches, len(self.sample_c)), self.real.channels)
        pairs: list[Pair] = []
        for k in range(SPLITS):
            draws = stream(KIND, "samples", k)
            fake_indices = indices_of_classes(self.matched.compared_c, self.matched.sample_c, draws)
            pairs.append((fake.select(fake_indices), self.real.select(self._random_indices(k))))
        scores = self._kernel_distances(fake, self.sample_c)
        scores |= self._mean_scores(pairs)
        scores["copies"] = self._share_of_copies(fake)
        return scores

    def baselines(self) -> dict[str, Scores]:
        """The scores of new real images, `perfect`, and of noise; the first one is called `mean`, its error `sd`."""
        return {"perfect": self._perfect_scores(), "noise": self._noise_scores()}

    def _perfect_scores(self) -> Scores:
        """The scores of new real images.

        What depends on numbers is measured: images of the data are compared with as many others, in the same classes.
        """
        pairs: list[Pair] = []
        for k in range(SPLITS):
            draws = stream(KIND, "parts", k)
            both_sides = indices_of_classes(self.matched.compared_c.repeat(2), self.matched.real_c, draws)
            a, b = both_sides.chunk(2)
            pairs.append((self.real.select(a), self.real.select(b)))
        copies = self._share_of_copies(self.real, are_real=True)
        # of the difference of two binomial shares, of the images and of the samples (ours)
        num_real = len(self.real)
        p = (copies * num_real + 1) / (num_real + 2)  # Laplace's estimate, which is never 0
        copies_variance = p * (1 - p) * (1 / num_real + 1 / len(self.sample_c))
        return {
            **perfect_mmd_scores(self.real.features, width=WIDTH, sample_c=self.sample_c, real_c=self.real_c),
            **self._mean_scores(pairs),
            "copies": copies,
            "copies_sd": copies_variance**0.5,
        }

    def _noise_scores(self) -> Scores:
        """The scores of noise in place of samples."""
        z = torch.cat([MeasuredImages.of(noise(0, [i], 0, self.shape)).rows for i in range(self.num_compared)])
        fake = MeasuredImages(z, self.real.channels)
        one_class = torch.zeros(len(fake), dtype=torch.long)  # `mmd` then ignores classes, and gives no `class_mmd`
        distances = self._kernel_distances(fake, one_class)
        pairs = [(fake, self.real.select(self._random_indices(k))) for k in range(SPLITS)]
        return {
            "mean": distances["mmd"],
            "sd": distances["mmd_sd"],
            **noise_class_mmd(
                fake.features, self.real.features, width=WIDTH, sample_c=self.sample_c, real_c=self.real_c
            ),
            **self._mean_scores(pairs),
        }

    def _kernel_distances(self, fake: MeasuredImages, fake_c: Classes) -> Scores:
        """`mmd` and `class_mmd`, with their errors, of samples in these classes to all images."""
        return mmd_scores(fake.features, self.real.features, width=WIDTH, sample_c=fake_c, real_c=self.real_c)

    def _random_indices(self, k: int) -> Indices:
        """The indices (num_compared,) of the images that the k-th split compares with samples."""
        return indices_of_classes(self.matched.compared_c, self.matched.real_c, stream(KIND, "halves", k))

    def _mean_scores(self, pairs: Sequence[Pair]) -> Scores:
        """`pixel_fd`, `precision` and `recall`, in the mean over pairs of samples and images."""
        # `pixel_frechet` compares channels * side^2 numbers, and needs more images than that on each side
        side = min(PIXEL_SIDE, isqrt((self.num_compared - 1) // self.real.channels))
        pixel_distances: list[float] = []
        precisions: list[float] = []
        recalls: list[float] = []
        for fake, real in pairs:
            precision, recall = precision_recall(real.features, fake.features)
            pixel_distances.append(pixel_frechet(fake.thumbs, real.thumbs, side))
            precisions.append(precision)
            recalls.append(recall)
        scores: Scores = {}
        values_by_name = {"pixel_fd": pixel_distances, "precision": precisions, "recall": recalls}
        for name, values in values_by_name.items():
            scores[name], _ = mean_sd(values)
        return scores

    def _share_of_copies(self, fake: MeasuredImages, *, are_real: bool = False) -> float:
        """The share of samples that are copies of images that were trained on.

        `are_real`: `fake` are the images `real`. Where these were trained on, a copy is one that has a double among the
        others.
        """
        trained_thumbs = self.trained_thumbs
        left_out = None
        if trained_thumbs is None:
            trained_thumbs = self.real.thumbs
            left_out = torch.arange(len(fake)) if are_real else None
        nearest = nearest_images(trained_thumbs, fake.thumbs, left_out=left_out)
        return nearest.is_copy.double().mean().item()


def indices_of_classes(wanted_c: Classes, c: Classes, generator: Generator) -> Indices:
    """Random indices i (n,), none twice, with c[i] equal to the classes `wanted_c` (n,), which c has as often."""
    indices = torch.empty_like(wanted_c)
    for k in wanted_c.unique():
        candidates = (c == k).nonzero()[:, 0]
        positions = (wanted_c == k).nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=generator)
        indices[positions] = candidates[order[: len(positions)]]
    return indices
