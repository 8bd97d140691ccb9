"""Samples by the features of a model that the user names: DINOv2, and CLIP as CMMD takes it. Nothing is fetched.

`FeatureProtocol` is the spec; its `evaluator` loads the model, finds the statistics of the data, in the cache or by
counting them (`dumo.evaluation.reference`), and returns a `FeatureEvaluator`, which compares samples with them.

Kernel distances lead, for they have no bias: the unbiased MMD^2 of a Gaussian kernel (Gretton et al. 2012, Eq. 3),
times 1000, with its standard error. Next comes the Fréchet distance, where there are more images than features.

- `dinov2`, features and Fréchet distance as dgm-eval has them (Stein et al. 2023, arXiv 2306.04675): `fd` is their
  FD_DINOv2 where the folder is DINOv2's ViT-L/14 and there are 50,000 samples. Their kernel distance is `kid`, the
  cubic kernel over 100 subsets of 1,000. The Gaussian's width is the median distance of real images, as elsewhere
  here (docs/log.md), so that it fits any DINOv2.
- `cmmd` (Jayasumana et al. 2024, arXiv 2401.09603): embeddings of length 1, width 10. The authors' code leaves pairs of
  an image with itself in, and so is larger by 1000 (1 - mean k) / n, about 10 (1 - mean cosine) / n, of each side.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dumo.encoders import vision
from dumo.encoders.vision import FEATURE_MODELS, FeatureKind, ImageEncoder
from dumo.evaluation import reference
from dumo.evaluation.fid import SUBSETS, kid_text, split_batches
from dumo.evaluation.frechet import frechet_distance
from dumo.evaluation.mmd import gaussian_mmd, kid, perfect_sampler_scores
from dumo.evaluation.protocol import MODEL_FIELD, Context, ModelProtocol, NumberedSamples, Scores
from dumo.evaluation.reference import Standard, load_or_compute
from dumo.evaluation.statistics import Statistics, float64_device, gather, statistics_of
from dumo.io.data_source import Finite, HeldOutSplit
from dumo.runtime import version
from dumo.runtime.random import stream
from dumo.types import UserError

CMMD_WIDTH = 10.0  # of the kernel on embeddings of length 1: CMMD
MEDIAN_ROWS = 2000  # real images between which the median distance is taken, about: ours
FEATURE_STANDARDS: dict[FeatureKind, Standard] = {
    "dinov2": Standard(samples=50_000, size=None, classes=None, reference_images=None, subset=1000),
    # 30,000 samples, as the authors take of COCO's captions
    "cmmd": Standard(samples=30_000, size=None, classes=None, reference_images=None, subset=1000),
}


class FeatureProtocol(ModelProtocol):
    """Images by the features of the model in a folder."""

    kind: FeatureKind

    @property
    def standard_samples(self) -> int:
        """As many as the name says."""
        return FEATURE_STANDARDS[self.kind].samples

    @property
    def model_class(self) -> str:
        """Dinov2Model or CLIPModel."""
        return FEATURE_MODELS[self.kind].class_name

    @property
    def model_hint(self) -> str:
        """Where to get such a model."""
        return FEATURE_MODELS[self.kind].hint

    def evaluator(self, context: Context) -> "FeatureEvaluator":
        """The evaluator that compares samples with all images of the data. Their features are cached.

        Every rank must call this. Raises `UserError` where no model is named, or it cannot be read, and where the data
        are endless, or fewer than two different images.
        """
        encoder = vision.load(self.model_folder(), self.kind, MODEL_FIELD, context.device)
        data = context.data()
        if isinstance(data, HeldOutSplit):
            data = data.held_out
        if not isinstance(data, Finite):
            raise UserError(
                f"protocol {self.kind} goes through all images of a data set, and this has none: choose another"
            )
        standard = FEATURE_STANDARDS[self.kind]
        facts = encoder.facts | reference.data_facts(data, self.kind, standard, context.split)
        statistics_key = {"protocol": self.kind, "dumo": version(), **facts}
        real = load_or_compute(statistics_key, partial(reference.data_statistics, encoder, data, context.tick))
        has_pairs = len(real.features) >= 2
        width = _kernel_width(self.kind, real.features) if has_pairs else 0.0
        if width == 0:  # as it also is between equal images
            raise UserError(f"protocol {self.kind} needs different real images, two or more: add some")
        facts["kernel"] = f"Gaussian of width {width:g}, unbiased, times 1000"
        subset_size = min(standard.subset, self.total, len(real.features))
        if self.kind == "dinov2":
            facts["kid"] = kid_text(subset_size)
        return FeatureEvaluator(
            kind=self.kind,
            total=self.total,
            encoder=encoder,
            real=real,
            width=width,
            subset_size=subset_size,
            facts=facts,
            device=float64_device(context.device),
        )


@dataclass(frozen=True)
class FeatureEvaluator:
    """Compares samples, batch by batch, with statistics of the data."""

    kind: FeatureKind
    total: int  # samples
    encoder: ImageEncoder  # extracts features
    real: Statistics  # of the data
    width: float  # of the kernel
    subset_size: int  # images in each subset of `kid`
    facts: dict[str, str]  # for the report's card
    device: torch.device | str = "cpu"  # where kernels are summed

    def score(self, samples: NumberedSamples) -> Scores:
        """`mmd` with `mmd_sd`; `fd` where there are more images than features; by DINOv2, `kid` with `kid_sd`.

        Every rank must call it. Raises `UserError` where samples are missing, come twice, or are no images.
        """
        return self.compare(gather(statistics_of(self.encoder, split_batches(samples), self.total), self.total))

    def compare(self, fake: Statistics) -> Scores:
        """The scores of samples with these statistics."""
        fake_rows = fake.features.to(self.device)
        real_rows = self.real.features.to(self.device)
        mmd = gaussian_mmd(fake_rows, real_rows, self.width)
        scores: Scores = {"mmd": mmd.value, "mmd_sd": mmd.error}
        if self._has_frechet:
            scores["fd"] = frechet_distance(fake.pool, self.real.pool)
        if self.kind == "dinov2":
            scores["kid"], scores["kid_sd"] = kid(
                fake_rows,
                real_rows,
                subsets=SUBSETS,
                subset_size=self.subset_size,
                generator=stream(self.kind, "kid"),
            )
        return scores

    @property
    def _has_frechet(self) -> bool:
        """Whether there are more images than features on both sides."""
        num_real, num_features = self.real.features.shape
        return min(self.total, num_real) > num_features

    def baselines(self) -> dict[str, Scores]:
        """`perfect`: the `mmd` of a perfect sampler, of new real images, and its `fd` where samples have one.

        Nor has it one where there are too few real images to compare halves of them. Classes do not count, because they
        weigh little among so different images.
        """
        rows = self.real.features.to(self.device)
        sample_c = torch.zeros(self.total, dtype=torch.long)
        real_c = torch.zeros(len(rows), dtype=torch.long)
        perfect = perfect_sampler_scores(
            self.kind,
            rows,
            width=self.width,
            sample_c=sample_c,
            real_c=real_c,
            with_frechet=self._has_frechet,
        )
        return {"perfect": perfect}


def _kernel_width(kind: FeatureKind, rows: Tensor) -> float:
    """The width of the kernel, given the features of real images, (n, features).

    A median is rounded, so that it is the same on machines that differ in last bits.
    """
    if kind == "cmmd":
        return CMMD_WIDTH
    stride = -(-len(rows) // MEDIAN_ROWS)
    distances = torch.pdist(rows[::stride].double())
    return float(f"{distances.median().item():.3g}")
