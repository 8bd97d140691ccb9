"""How well images fit their captions, by the CLIP that the user names: no distance to data, and no FID.

`ClipProtocol` is the spec; its `evaluator` opens the data with all captions, loads the CLIP, and returns a
`ClipEvaluator`, which scores samples when all of them have come.

An image scores 100 * max(cosine with its caption, 0), and the result is the mean over images. More is better, as far as
real images with their captions. The score depends on which CLIP makes it, so the report's card has the CLIP's hash, and
no two CLIPs share a table.

The report fixes two names: `_sd` and `sd` are standard errors of a mean, and `splits` is the number of images.
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

MAX_REAL = 2000  # images of the data that are compared with captions: ours
COSINE_SCALE = 100.0  # of a score, as torchmetrics has it; CLIPScore has 2.5 (Hessel et al. 2021, Sec. 3)


class ClipProtocol(ModelProtocol):
    """Images by the cosine of CLIP with their captions."""

    kind: Literal["clip-score"]

    @property
    def model_class(self) -> str:
        """CLIPModel."""
        return "CLIPModel"

    @property
    def model_hint(self) -> str:
        """Where to get one."""
        return CLIP_HINT

    @property
    def standard_samples(self) -> int:
        """5,000: ours."""
        return 5000

    def evaluator(self, context: Context) -> "ClipEvaluator":
        """The evaluator that compares sample i with its caption, and MAX_REAL real images with theirs.

        Raises `UserError` where no model is named, or it cannot be read.
        """
        folder = self.model_folder()
        if context.captions is None:
            raise UserError(f"protocol {self.kind} compares images with captions, and the data have none")
        data, sample_c, texts = context.captions()
        model = load_clip(folder, MODEL_FIELD, context.device)
        x, c_of_x = data.reference(MAX_REAL, context.seed)
        rows = choose_rows(len(x), MAX_REAL, self.kind, "rows")  # a finite data set may give more than are asked for
        config = model.model.config.vision_config
        facts = {
            "features": f"CLIP {config.hidden_size} wide, patches of {config.patch_size}, {model.side} pixels",
            "features_sha256": model.sha256,
            "reference": "captions, as '{}'",  # the prompt's template: the caption alone
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
    """Compares samples with their captions. A sample whose condition is no caption does not count."""

    encoder: Clip  # of images and captions
    c: Cond  # (n,) of the samples: numbers of captions, or a higher number for none
    texts: tuple[str, ...]  # all captions
    real_x: Tensor  # images of the data
    real_c: Tensor  # the number of each one's caption, or a higher number for none
    facts: dict[str, str]  # for the report's card

    def score(self, samples: NumberedSamples) -> Scores:
        """`clip_score`, the mean score of samples with captions, and `clip_score_sd`, its standard error.

        Raises UserError unless each sample comes once, and two or more have captions.
        """
        batches_of_scores = ((index, self.score_pairs(x, self.c[index])) for index, x in samples)
        scores = collect(batches_of_scores, len(self.c))
        mean, error = mean_and_error(scores[self._is_caption(self.c)])
        return {"clip_score": mean, "clip_score_sd": error}

    def baselines(self) -> dict[str, Scores]:
        """`captions`: the score of real images with their captions; `others`: with captions of other images."""
        is_captioned = self._is_caption(self.real_c)
        x = self.real_x[is_captioned]
        c = self.real_c[is_captioned]
        if len(c) < 2:
            return {}
        # sorted by caption and shifted by half: each image meets another caption, unless one has most of the images
        order = c.argsort()
        other_c = torch.empty_like(c)
        other_c[order] = c[order].roll(len(c) // 2)
        return {"captions": self._baseline(x, c), "others": self._baseline(x, other_c)}

    def _baseline(self, x: Tensor, c: Cond) -> Scores:
        """The mean score of real images x (n, channels, h, w) with the captions c (n,), its error, and n."""
        mean, error = mean_and_error(self.score_pairs(x, c))
        return {"mean": mean, "sd": error, "splits": float(len(c))}

    def _is_caption(self, c: Cond) -> Bool[Tensor, " n"]:
        """Whether each condition of c (n,) is a caption."""
        return c < len(self.texts)

    def score_pairs(self, x: Tensor, c: Cond) -> Float[Tensor, " n"]:
        """The score of each image of x (n, channels, h, w) with its caption of c (n,); 0 where that is none.

        Images are bytes, or numbers in [-1, 1].
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
    """The mean of n scores, and its standard error. Raises UserError for fewer than two."""
    if len(scores) < 2:
        raise UserError("fewer than two samples have a caption, so nothing can be judged: see data.captions")
    scores = scores.double()
    error = scores.std() / len(scores) ** 0.5
    return scores.mean().item(), error.item()
