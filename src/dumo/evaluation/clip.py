"""How well images fit their captions, by the CLIP that the user names: no distance to data, and no FID.

The score is the mean of 100 cosines, clipped at 0. It depends on which CLIP, so its hash stands on the card, and no two
CLIPs share a table. More is better, as far as real images with their captions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from dumo.encoders import clip
from dumo.encoders.clip import Clip
from dumo.evaluation.metric import Scores
from dumo.evaluation.protocol import Context, NumberedSamples, Protocol, collect
from dumo.io.picture import to_uint8
from dumo.io.read import user_path
from dumo.types import PLACE, Cond, UserError

MAX_REAL = 2000  # images of the data that are looked at, at most: ours
FIELD = "evaluate.protocol.model"
WEIGHT = 100.0  # of a cosine


class ClipProtocol(Protocol):
    """Images in colour or grey, decoded, by the cosine of CLIP with their captions."""

    kind: Literal["clip-score"]
    # The folder of a CLIPModel of transformers, in safetensors.
    model: str | None = Field(default=None, json_schema_extra=PLACE)

    @property
    def standard_samples(self) -> int:
        """Ours."""
        return 5000

    @property
    def missing(self) -> str | None:
        """What must be named before anything can be judged; None: nothing."""
        if self.model:
            return None
        return f"a CLIP, in {FIELD}: {clip.HINT}"

    def unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Samples must be images."""
        if len(shape) == 3 and shape[0] in (1, 3):
            return ""
        return f"judges images, not samples of shape {shape}: choose another protocol"

    def evaluator(self, context: Context) -> "ClipEvaluator":
        """Compares sample i with its caption, and as many real images with theirs.

        Raises `UserError` where no model is named, or it cannot be read.
        """
        if self.model is None:
            raise UserError(f"protocol {self.kind} needs {self.missing}")
        assert context.captions, "a run without captions is refused"
        data, c, texts = context.captions()
        model = clip.load(user_path(self.model, FIELD), FIELD, context.device)
        real_x, real_c = data.reference(MAX_REAL, context.seed)
        config = model.model.config.vision_config
        facts = {
            "features": f"CLIP {config.hidden_size} wide, patches of {config.patch_size}, {model.side} pixels",
            "features_sha256": model.sha256,
            "reference": "captions, as '{}'",
            "resize": f"Pillow, bicubic, to {model.side}, the middle",
            "rounding": "0 to 255",
        }
        return ClipEvaluator(model, c, tuple(texts), real_x[:MAX_REAL], real_c[:MAX_REAL], facts)


@dataclass(frozen=True)
class ClipEvaluator:
    """Compares samples with their captions; one whose condition is no caption does not count."""

    clip: Clip
    c: Cond
    texts: tuple[str, ...]
    real_x: Tensor  # images of the data
    real_c: Tensor  # each with a caption of its own
    facts: dict[str, str]

    def score(self, samples: NumberedSamples) -> Scores:
        """`clip_score`, the mean, and with `_sd` its standard error. Raises UserError as `collect`."""
        fits = collect(((index, self.fit(x, self.c[index])) for index, x in samples), len(self.c))
        mean, error = self.mean(fits[self.captioned(self.c)])
        return {"clip_score": mean, "clip_score_sd": error}

    def baselines(self) -> dict[str, Scores]:
        """`captions`: the same of real images with captions of theirs; `others`: with those of other images."""
        is_captioned = self.captioned(self.real_c)
        x = self.real_x[is_captioned]
        c = self.real_c[is_captioned]
        if len(c) < 2:
            return {}
        order = c.argsort()
        other_c = torch.empty_like(c)
        other_c[order] = c[order].roll(len(c) // 2)  # another one, where no caption is of half of the images
        return {"captions": self._baseline(x, c), "others": self._baseline(x, other_c)}

    def _baseline(self, x: Tensor, c: Cond) -> Scores:
        """The score of real images with these captions."""
        mean, error = self.mean(self.fit(x, c))
        return {"mean": mean, "sd": error, "splits": float(len(c))}

    def captioned(self, c: Cond) -> Bool[Tensor, " n"]:
        """Which of these are captions."""
        return c < len(self.texts)

    def fit(self, x: Tensor, c: Cond) -> Float[Tensor, " n"]:
        """The score of each image with its caption; 0 where c is none."""
        c = c.cpu()
        is_captioned = self.captioned(c)
        if x.dtype != torch.uint8:
            x = to_uint8(x)
        pixels = x.cpu().expand(-1, 3, -1, -1)
        cosines = torch.zeros(len(c))
        texts = [self.texts[k] for k in c[is_captioned].tolist()]
        cosines[is_captioned] = self.clip.cosines(pixels[is_captioned], texts)
        return WEIGHT * cosines.clamp(min=0)

    def mean(self, scores: Float[Tensor, " n"]) -> tuple[float, float]:
        """The mean, and its standard error. Raises UserError for fewer than two."""
        if len(scores) < 2:
            raise UserError("fewer than two samples have a caption, so nothing can be judged: see data.captions")
        scores = scores.double()
        error = scores.std() / len(scores) ** 0.5
        return scores.mean().item(), error.item()
