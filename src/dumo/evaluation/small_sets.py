"""The protocol `photos`: evaluate models of small sets of the user's images, from `MIN_PHOTOS` images.

`open_photos` reads the images of the data and makes a `PhotosEvaluator`, which

1. computes features and thumbnails of all samples, as of the images (`MeasuredImages`);
2. compares all samples with all images by kernel distances, which are unbiased for any number of images;
3. compares equal numbers of both, in the same classes, by the remaining scores, which are biased. These scores are
   means over `SPLITS` random choices of images;
4. counts samples that are copies of training images.

Features are from the bundled CIFAR-10 classifier, on images reduced to 32x32, so distances are not FIDs. Pixels and
copies are compared without a network. With few images all scores are rough: `baselines` estimates the scores of a
perfect sampler by comparing images of the data with each other.

Images are clamped to [-1, 1] and rounded to 8 bits. If there are more than `MAX_IMAGES`, a fixed random choice is used,
and the report's card states that copies of other images are not detected.
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
from dumo.evaluation.mmd import class_facts, missing_classes, mmd_scores, noise_class_mmd, perfect_mmd_scores
from dumo.evaluation.neighbours import precision_recall
from dumo.evaluation.protocol import Context, ImageTick, NumberedSamples, Protocol, Scores, name_of_data
from dumo.evaluation.wholeset import choose_rows, collect
from dumo.io import digest
from dumo.io.data_source import Data, Finite
from dumo.io.picture import from_uint8, to_uint8
from dumo.runtime.random import noise, stream
from dumo.types import Sample, UserError

KIND = "photos"
BATCH_SIZE = 64
# The smallest number of images and of samples (our choice).
MIN_PHOTOS = 20
# The suggested number of samples per class. `class_mmd` averages over pairs.
SAMPLES_PER_CLASS = 2
# The largest number of images of the data (our choice).
MAX_IMAGES = 5000
# The number of images on each side of a comparison (our choice). Without classes, there are always enough.
MIN_COMPARED = MIN_PHOTOS // 2
MAX_COMPARED = 1000
# Scores are averaged over this many random choices of images (our choice).
SPLITS = 10
# The kernel width. The median distance of two images of CIFAR-10 is 15.9.
WIDTH = 16.0
# The side of CIFAR-10's images in pixels.
CLASSIFIER_SIDE = 32
# Below this number of images, a report's card states that the spread is large (our choice).
FEW_IMAGES = 500

Classes = Int64[Tensor, " _"]
Indices = Int64[Tensor, " _"]


def open_photos(protocol: Protocol, context: Context) -> "PhotosEvaluator":
    """Read the data and return an evaluator, which computes on the CPU.

    Raises UserError if there are fewer than `MIN_PHOTOS` images, or if one of their classes has no sample.
    """
    data = context.data()
    # None means that the data are the training data.
    trained = context.trained() if context.trained else None
    tick = context.tick or _no_tick
    num_data = data.size or 0
    num_trained = 0 if trained is None else trained.size or 0
    reads_before = min(num_data, MAX_IMAGES)
    reads_after = min(num_trained, MAX_IMAGES)
    real, real_c, shape, pixels_sha256 = _measure_images(data, context.seed, _shift_tick(tick, after=reads_after))
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
        thumbs = [_thumbs_of(x) for x, _ in _read_images(trained, context.seed, _shift_tick(tick, before=reads_before))]
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
    """Return the measured images of the data, their classes, their shape, and the SHA-256 of their pixels.

    8-bit pixels are hashed, since features have rounding differences between machines. Raises UserError if there are
    fewer than `MIN_PHOTOS` images.
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
        raise UserError(f"protocol {KIND} needs {MIN_PHOTOS} images or more, got {num_images}: add some")
    rows = torch.cat([batch.rows for batch in batches])
    pixels_sha256 = digest.of_bytes("".join(image_hashes).encode())
    return MeasuredImages(rows, batches[0].channels), torch.cat(classes), shape, pixels_sha256


def _require_all_classes(sample_c: Classes, real_c: Classes, context: Context) -> None:
    """Raise UserError if a class of the data has no sample."""
    missing = missing_classes(sample_c, real_c)
    if not missing:
        return
    problem = f"protocol {KIND}: class {missing[0]} has no sample"
    if context.c is not None:
        raise UserError(f"{problem}: add samples, or remove the class from the real images")
    num_samples = SAMPLES_PER_CLASS * context.classes
    raise UserError(
        f"{problem} among {len(sample_c)} samples: set evaluate.protocol.samples={num_samples}, or in training "
        f"evaluate.few={num_samples}"
    )


def _no_tick(done: int, total: int) -> None:
    """Ignore progress."""


def _shift_tick(tick: ImageTick, *, before: int = 0, after: int = 0) -> ImageTick:
    """Return a tick for one of several reads, with `before` images read earlier and `after` images read later."""
    return lambda done, total: tick(before + done, before + total + after)


def _read_images(data: Data, seed: int, tick: ImageTick) -> Iterator[tuple[Sample, Classes]]:
    """Yield at most `MAX_IMAGES` images of the data, in batches with their classes.

    `tick` is called after each batch, even if none of its images could be read.
    """
    if not isinstance(data, Finite):
        x, c = data.reference(MAX_IMAGES, seed)
        rows = choose_rows(len(x), MAX_IMAGES, KIND, "rows")
        yield x[rows], c[rows]
        tick(len(rows), len(rows))
        return
    rows = choose_rows(len(data), MAX_IMAGES, KIND, "rows")
    num_read = 0
    for batch in rows.split(BATCH_SIZE):
        x, c = data.rows(batch)
        if x.dtype == torch.uint8:
            x = from_uint8(x)
        if len(x):
            yield x, c
        num_read += len(batch)
        tick(num_read, len(rows))


@dataclass(frozen=True)
class MeasuredImages:
    """The features and thumbnails of n images, in one row per image, so that ranks can gather them.

    rows: the features, then the flattened thumbnail.
    channels: of a thumbnail, 1 or 3.
    """

    rows: Float[Tensor, "n _"]
    channels: int

    @classmethod
    def of(cls, x: Sample) -> "MeasuredImages":
        """Measure images x (n, 1 or 3, h, w), rounded to 8 bits. Raises UserError for samples of other shapes."""
        # Grey images get three equal channels.
        colours = from_uint8(to_uint8(x.cpu()))
        features = cifar10.features(adaptive_avg_pool2d(colours, (CLASSIFIER_SIDE, CLASSIFIER_SIDE)))
        return cls(torch.cat([features, _thumbs_of(x).flatten(1)], 1), x.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Indices) -> "MeasuredImages":
        """Return the images at these indices."""
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
    """Reduce images x (n, 1 or 3, h, w), rounded to 8 bits, to thumbnails (n, 1 or 3, THUMB_SIDE, THUMB_SIDE)."""
    colours = from_uint8(to_uint8(x.cpu()))[:, : x.shape[1]]
    return adaptive_avg_pool2d(colours, (THUMB_SIDE, THUMB_SIDE))


@dataclass(frozen=True)
class MatchedClasses:
    """The classes in which equal numbers of samples and images are compared.

    A class is used as often as it has samples, but with at most half of its images, since the perfect sampler's scores
    compare images with each other. No image is drawn twice, since duplicates would lower recall.

    compared_c: the classes of the images on each side of a comparison, in random order.
    """

    sample_c: Classes
    real_c: Classes
    compared_c: Classes

    @classmethod
    def of(cls, sample_c: Classes, real_c: Classes) -> "MatchedClasses":
        """Match these classes, or ignore classes if fewer than `MIN_COMPARED` images would remain."""
        num_classes = int(torch.cat([sample_c, real_c]).max()) + 1
        sample_counts = sample_c.bincount(minlength=num_classes)
        real_counts = real_c.bincount(minlength=num_classes)
        counts = torch.minimum(sample_counts, real_counts // 2)
        if num_classes > 1 and counts.sum() < MIN_COMPARED:
            return cls.of(torch.zeros_like(sample_c), torch.zeros_like(real_c))
        compared_c = torch.arange(num_classes).repeat_interleave(counts)
        order = torch.randperm(len(compared_c), generator=stream(KIND, "compared"))
        return cls(sample_c, real_c, compared_c[order[:MAX_COMPARED]])


# Equal numbers of samples and images that are compared.
Pair = tuple[MeasuredImages, MeasuredImages]


@dataclass(frozen=True)
class PhotosEvaluator:
    """Scores samples against the images of the data, and finds copies of training images.

    real: the images of the data.
    trained_thumbs: thumbnails of the training images. None means that `real` are the training images.
    shape: (channels, height, width) of an image.
    facts: entries of the report's card.
    """

    sample_c: Classes
    real: MeasuredImages
    real_c: Classes
    matched: MatchedClasses
    trained_thumbs: Thumbs | None
    shape: tuple[int, ...]
    facts: dict[str, str]

    @property
    def num_compared(self) -> int:
        """The number of images on each side of a comparison."""
        return len(self.matched.compared_c)

    def score(self, samples: NumberedSamples) -> Scores:
        """Return `mmd` and `class_mmd` with their standard errors, `pixel_fd`, `precision`, `recall`, and `copies`.

        `copies` is the share of samples that are copies of training images, mirrored or not (`NearestImages.is_copy`).
        Every rank must call this. Raises UserError if samples are missing.
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
        """Return the scores of a perfect sampler, `perfect`, and of `noise`. `mmd` and its sd are `mean` and `sd`."""
        return {"perfect": self._perfect_scores(), "noise": self._noise_scores()}

    def _perfect_scores(self) -> Scores:
        """Return the scores of a perfect sampler.

        Biased scores are measured by comparing images of the data with the same number of others in the same classes.
        """
        pairs: list[Pair] = []
        for k in range(SPLITS):
            draws = stream(KIND, "parts", k)
            both_sides = indices_of_classes(self.matched.compared_c.repeat(2), self.matched.real_c, draws)
            a, b = both_sides.chunk(2)
            pairs.append((self.real.select(a), self.real.select(b)))
        copies = self._share_of_copies(self.real, are_real=True)
        # The variance of the difference of two binomial shares, of images and of samples (our choice), with Laplace's
        # estimate, which is never 0.
        num_real = len(self.real)
        p = (copies * num_real + 1) / (num_real + 2)
        copies_variance = p * (1 - p) * (1 / num_real + 1 / len(self.sample_c))
        return {
            **perfect_mmd_scores(self.real.features, width=WIDTH, sample_c=self.sample_c, real_c=self.real_c),
            **self._mean_scores(pairs),
            "copies": copies,
            "copies_sd": copies_variance**0.5,
        }

    def _noise_scores(self) -> Scores:
        """Return the scores of noise."""
        z = torch.cat([MeasuredImages.of(noise(0, [i], 0, self.shape)).rows for i in range(self.num_compared)])
        fake = MeasuredImages(z, self.real.channels)
        # With one class, `mmd` ignores classes and there is no `class_mmd`.
        one_class = torch.zeros(len(fake), dtype=torch.long)
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
        """Return `mmd` and `class_mmd` of samples in these classes to all images, with standard errors."""
        return mmd_scores(fake.features, self.real.features, width=WIDTH, sample_c=fake_c, real_c=self.real_c)

    def _random_indices(self, k: int) -> Indices:
        """Return the indices (num_compared,) of the images that the k-th split compares with samples."""
        return indices_of_classes(self.matched.compared_c, self.matched.real_c, stream(KIND, "halves", k))

    def _mean_scores(self, pairs: Sequence[Pair]) -> Scores:
        """Return the means of `pixel_fd`, `precision` and `recall` over pairs of samples and images."""
        # `pixel_frechet` compares channels * side^2 numbers, and needs more images on each side.
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
        """Return the share of samples that are copies of training images.

        `are_real` means that `fake` are the images `real`. If these are training images, they are compared with all
        other ones.
        """
        trained_thumbs = self.trained_thumbs
        left_out = None
        if trained_thumbs is None:
            trained_thumbs = self.real.thumbs
            left_out = torch.arange(len(fake)) if are_real else None
        nearest = nearest_images(trained_thumbs, fake.thumbs, left_out=left_out)
        return nearest.is_copy.double().mean().item()


def indices_of_classes(wanted_c: Classes, c: Classes, generator: Generator) -> Indices:
    """Draw distinct random indices i (n,) with c[i] = `wanted_c` (n,). c must have enough of each class."""
    indices = torch.empty_like(wanted_c)
    for k in wanted_c.unique():
        candidates = (c == k).nonzero()[:, 0]
        positions = (wanted_c == k).nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=generator)
        indices[positions] = candidates[order[: len(positions)]]
    return indices
