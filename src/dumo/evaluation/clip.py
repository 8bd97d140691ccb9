"""CLIP score: the similarity of images to their captions under a CLIP model chosen by the user.

`ClipProtocol` is the spec. Its `evaluator` opens the data with all captions, loads the CLIP model, and returns a
`ClipEvaluator`, which scores all samples together.

The score is the mean of 100 * max(cosine of image and caption, 0). Higher is better, up to the score of real images
with their captions. Scores of different CLIP models are not comparable, so the report's card has the model's hash.

In this protocol, `_sd` and `sd` are standard errors of a mean, and `splits` is the number of images.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dumo.encoders.vision import CLIP_HINT, Clip, load_clip
from dumo.evaluation.protocol import MODEL_FIELD, Context, ModelProtocol, NumberedSamples, Scores
from dumo.evaluation.wholeset import choose_rows, collect
from dumo.io.picture import to_uint8
from dumo.types import Cond, UserError

# The number of real images compared with captions (our choice).
MAX_REAL = 2000
# The factor in torchmetrics. CLIPScore uses 2.5 (Hessel et al. 2021, Sec. 3).
COSINE_SCALE = 100.0


class ClipProtocol(ModelProtocol):
    """Evaluate images by the cosine similarity of their CLIP embeddings to the embeddings of their captions."""

    kind: Literal["clip-score"]

    @property
    def model_class(self) -> str:
        """CLIPModel."""
        return "CLIPModel"

    @property
    def model_hint(self) -> str:
        """How to get a CLIP model."""
        return CLIP_HINT

    @property
    def standard_samples(self) -> int:
        """5,000 (our choice)."""
        return 5000

    def evaluator(self, context: Context) -> "ClipEvaluator":
        """Return an evaluator that compares samples, and MAX_REAL real images, with their captions.

        Raises UserError if no model is set, if it cannot be read, or if the data have no captions.
        """
        folder = self.model_folder()
        if context.captions is None:
            raise UserError(
                f"protocol {self.kind} compares images with captions, but the data have none: choose another protocol"
            )
        data, sample_c, texts = context.captions()
        model = load_clip(folder, MODEL_FIELD, context.device)
        x, c_of_x = data.reference(MAX_REAL, context.seed)
        # A finite data set returns all of its rows.
        rows = choose_rows(len(x), MAX_REAL, self.kind, "rows")
        config = model.model.config.vision_config
        facts = {
            "features": f"CLIP {config.hidden_size} wide, patches of {config.patch_size}, {model.side} pixels",
            "features_sha256": model.sha256,
            # The prompt template is the caption alone.
            "reference": "captions, as '{}'",
            "resize": f"Pillow, bicubic, to {model.side}, the middle",
            "rounding": "0 to 255",
        }
        return ClipEvaluator(
            encoder=model,
            c=sample_c,
            texts=tuple(texts),
            real_x=x[rows],
            real_c=c_of_x[rows],
            facts=facts,
        )


@dataclass(frozen=True)
class ClipEvaluator:
    """Compares samples with their captions. Samples without a caption are ignored.

    c, real_c: the caption of each sample and each real image, as an index into `texts`. An index beyond `texts` means
    no caption.
    facts: entries of the report's card.
    """

    encoder: Clip
    c: Cond
    texts: tuple[str, ...]
    real_x: Tensor
    real_c: Tensor
    facts: dict[str, str]

    def score(self, samples: NumberedSamples) -> Scores:
        """Return `clip_score`, the mean over samples with captions, and its standard error `clip_score_sd`.

        Raises UserError unless each sample occurs once and two or more have captions.
        """
        batches_of_scores = ((index, self.score_pairs(x, self.c[index])) for index, x in samples)
        scores = collect(batches_of_scores, len(self.c))
        mean, error = mean_and_error(scores[self._is_caption(self.c)])
        return {"clip_score": mean, "clip_score_sd": error}

    def baselines(self) -> dict[str, Scores]:
        """Return the scores of real images with their captions, `captions`, and with other captions, `others`."""
        is_captioned = self._is_caption(self.real_c)
        x = self.real_x[is_captioned]
        c = self.real_c[is_captioned]
        if len(c) < 2:
            return {}
        # Sort by caption and shift by half, so that each image gets a different caption unless one has most images.
        order = c.argsort()
        other_c = torch.empty_like(c)
        other_c[order] = c[order].roll(len(c) // 2)
        return {"captions": self._baseline(x, c), "others": self._baseline(x, other_c)}

    def _baseline(self, x: Tensor, c: Cond) -> Scores:
        """Return the mean score of real images x (n, channels, h, w) with captions c (n,), its error, and n."""
        mean, error = mean_and_error(self.score_pairs(x, c))
        return {"mean": mean, "sd": error, "splits": float(len(c))}

    def _is_caption(self, c: Cond) -> Bool[Tensor, " n"]:
        """Whether each condition of c (n,) is a caption."""
        return c < len(self.texts)

    def score_pairs(self, x: Tensor, c: Cond) -> Float[Tensor, " n"]:
        """Score each image of x (n, channels, h, w) with its caption c (n,); 0 if it has none.

        Images are uint8, or floats in [-1, 1].
        """
        c = c.cpu()
        is_captioned = self._is_caption(c)
        if x.dtype != torch.uint8:
            x = to_uint8(x)
        pixels = x.cpu().expand(-1, 3, -1, -1)
        cosines = torch.zeros(len(c))
        texts = [self.texts[k] for k in c[is_captioned].tolist()]
        cosines[is_captioned] = self.encoder.cosines(pixels[is_captioned], texts)
        return COSINE_SCALE * cosines.clamp(min=0)


def mean_and_error(scores: Float[Tensor, " n"]) -> tuple[float, float]:
    """Return the mean of n scores and its standard error. Raises UserError if n < 2."""
    if len(scores) < 2:
        raise UserError("fewer than two samples have captions, so there is no score: see data.captions")
    scores = scores.double()
    error = scores.std() / len(scores) ** 0.5
    return scores.mean().item(), error.item()
