"""Distances in the features of a model chosen by the user: DINOv2, or CLIP for CMMD.

`FeatureProtocol` is the spec. Its `evaluator` loads the model, computes the statistics of the data or loads them from
the cache (`dumo.evaluation.reference`), and returns a `FeatureEvaluator`, which compares samples with them.

The main score is unbiased: MMD^2 with a Gaussian kernel (Gretton et al. 2012, Eq. 3), times 1000, with its standard
error. The Fréchet distance follows, if there are more images than features.

- `dinov2`: features and Fréchet distance as in dgm-eval (Stein et al. 2023, arXiv 2306.04675). `fd` is their FD_DINOv2
  if the model is DINOv2 ViT-L/14 and there are 50,000 samples. `kid` is their kernel distance: the cubic kernel over
  100 subsets of 1,000. The width of the Gaussian is the median distance of real images (docs/log.md), which suits any
  DINOv2 model.
- `cmmd` (Jayasumana et al. 2024, arXiv 2401.09603): embeddings of length 1, width 10. The authors' code includes pairs
  of an image with itself, so its values are larger by 1000 (1 - mean k) / n, about 10 (1 - mean cosine) / n, per side.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dumo.encoders import vision
from dumo.encoders.vision import FEATURE_MODELS, FeatureKind, ImageEncoder
from dumo.evaluation import reference
from dumo.evaluation.fid import KID_SUBSETS, kid_text, split_batches
from dumo.evaluation.frechet import frechet_distance
from dumo.evaluation.mmd import gaussian_mmd, kid, perfect_sampler_scores
from dumo.evaluation.protocol import MODEL_FIELD, Context, ModelProtocol, NumberedSamples, Scores
from dumo.evaluation.reference import Standard, load_or_compute
from dumo.evaluation.statistics import Statistics, float64_device, gather, statistics_of
from dumo.io.data_source import Finite, HeldOutSplit
from dumo.runtime import version
from dumo.runtime.random import stream
from dumo.types import UserError

# The kernel width of CMMD, for embeddings of length 1.
CMMD_WIDTH = 10.0
# The median distance is computed over about this many real images (our choice).
MEDIAN_ROWS = 2000
FEATURE_STANDARDS: dict[FeatureKind, Standard] = {
    "dinov2": Standard(samples=50_000, size=None, classes=None, reference_images=None, kid_subset_size=1000),
    # The authors use 30,000 captions of COCO.
    "cmmd": Standard(samples=30_000, size=None, classes=None, reference_images=None, kid_subset_size=1000),
}


class FeatureProtocol(ModelProtocol):
    """Evaluate images with the features of a DINOv2 or CLIP model."""

    kind: FeatureKind

    @property
    def standard_samples(self) -> int:
        """The number of samples fixed by the kind."""
        return FEATURE_STANDARDS[self.kind].samples

    @property
    def model_class(self) -> str:
        """Dinov2Model or CLIPModel."""
        return FEATURE_MODELS[self.kind].class_name

    @property
    def model_hint(self) -> str:
        """How to get such a model."""
        return FEATURE_MODELS[self.kind].hint

    def evaluator(self, context: Context) -> "FeatureEvaluator":
        """Return an evaluator that compares samples with all images of the data, whose features are cached.

        Every rank must call this. Raises UserError if no model is set, if it cannot be read, or if the data are
        infinite or have fewer than two different images.
        """
        encoder = vision.load(self.model_folder(), self.kind, MODEL_FIELD, context.device)
        data = context.data()
        if isinstance(data, HeldOutSplit):
            data = data.held_out
        if not isinstance(data, Finite):
            raise UserError(
                f"protocol {self.kind} needs a finite image dataset, but this data is infinite: choose another protocol"
            )
        standard = FEATURE_STANDARDS[self.kind]
        facts = encoder.facts | reference.data_facts(data, self.kind, standard, context.split)
        statistics_key = {"protocol": self.kind, "dumo": version(), **facts}
        real = load_or_compute(statistics_key, partial(reference.data_statistics, encoder, data, context.tick))
        has_pairs = len(real.features) >= 2
        width = _kernel_width(self.kind, real.features) if has_pairs else 0.0
        # The width is also 0 if all images are equal.
        if width == 0:
            raise UserError(f"protocol {self.kind} needs two or more different real images: add some")
        facts["kernel"] = f"Gaussian of width {width:g}, unbiased, times 1000"
        subset_size = min(standard.kid_subset_size, self.total, len(real.features))
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
    """Compares samples with the statistics of the data.

    total: the number of samples.
    width: the width of the Gaussian kernel.
    subset_size: the number of images per subset of `kid`.
    facts: entries of the report's card.
    device: computes kernels.
    """

    kind: FeatureKind
    total: int
    encoder: ImageEncoder
    real: Statistics
    width: float
    subset_size: int
    facts: dict[str, str]
    device: torch.device | str = "cpu"

    def score(self, samples: NumberedSamples) -> Scores:
        """Return `mmd` and `mmd_sd`; `fd` if there are more images than features; for DINOv2 `kid` and `kid_sd`.

        Every rank must call this. Raises UserError if samples are missing, duplicated or not images.
        """
        return self.compare(gather(statistics_of(self.encoder, split_batches(samples), self.total), self.total))

    def compare(self, fake: Statistics) -> Scores:
        """Return the scores of samples with these statistics."""
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
                subsets=KID_SUBSETS,
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
        """Return `perfect`: the `mmd` of a perfect sampler, and its `fd` if samples have one.

        There is no `fd` if there are too few real images to compare halves of them. Classes are ignored, since their
        effect is small for diverse images.
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
    """Return the kernel width for the features of real images, (n, features).

    The median is rounded, so that it does not depend on floating-point differences between machines.
    """
    if kind == "cmmd":
        return CMMD_WIDTH
    stride = -(-len(rows) // MEDIAN_ROWS)
    distances = torch.pdist(rows[::stride].double())
    return float(f"{distances.median().item():.3g}")
