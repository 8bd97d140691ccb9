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
from dumo.evaluation.protocol import Context, Made, Protocol, Scores, collect
from dumo.io.picture import to_uint8
from dumo.io.read import user_path
from dumo.types import PLACE, Cond, UserError

REAL = 2000  # images of the data that are looked at, at most: ours
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
        return None if self.model else f"a CLIP, in {FIELD}: {clip.HINT}"

    def unfit(self, shape: tuple[int, ...], classes: int) -> str:
        """Samples must be images."""
        image = len(shape) == 3 and shape[0] in (1, 3)
        return "" if image else f"judges images, not samples of shape {shape}: choose another protocol"

    def evaluator(self, context: Context) -> "ClipEvaluator":
        """Compares sample i with its caption, and as many real images with theirs.

        Raises `UserError` where no model is named, or it cannot be read.
        """
        if self.model is None:
            raise UserError(f"protocol {self.kind} needs {self.missing}")
        assert context.captions, "a run without captions is refused"
        data, c, texts = context.captions()
        model = clip.load(user_path(self.model, FIELD), FIELD, context.device)
        x, own = data.reference(REAL, context.seed)
        facts = {
            "features": f"CLIP {model.model.config.vision_config.hidden_size} wide, patches of "
            f"{model.model.config.vision_config.patch_size}, {model.side} pixels",
            "features_sha256": model.sha256,
            "reference": "captions, as '{}'",
            "resize": f"Pillow, bicubic, to {model.side}, the middle",
            "rounding": "0 to 255",
        }
        return ClipEvaluator(model, c, tuple(texts), (x[:REAL], own[:REAL]), facts)


@dataclass(frozen=True)
class ClipEvaluator:
    """Compares samples with their captions; one whose condition is no caption does not count."""

    clip: Clip
    c: Cond
    texts: tuple[str, ...]
    real: tuple[Tensor, Tensor]  # images of the data, each with a caption of its own
    facts: dict[str, str]

    def score(self, made: Made) -> Scores:
        """`clip_score`, the mean, and with `_sd` its standard error. Raises UserError as `collect`."""
        found = collect(((index, self.fit(x, self.c[index])) for index, x in made), len(self.c))
        mean, error = self.mean(found[self.captioned(self.c)])
        return {"clip_score": mean, "clip_score_sd": error}

    def baselines(self) -> dict[str, Scores]:
        """`captions`: the same of real images with captions of theirs; `others`: with those of other images."""
        x, c = (rows[self.captioned(self.real[1])] for rows in self.real)
        if len(c) < 2:
            return {}
        order, away = c.argsort(), torch.empty_like(c)
        away[order] = c[order].roll(len(c) // 2)  # another one, where no caption is of half of the images
        found = {"captions": self.mean(self.fit(x, c)), "others": self.mean(self.fit(x, away))}
        return {name: {"mean": mean, "sd": error, "splits": float(len(c))} for name, (mean, error) in found.items()}

    def captioned(self, c: Cond) -> Bool[Tensor, " n"]:
        """Which of these are captions."""
        return c < len(self.texts)

    def fit(self, x: Tensor, c: Cond) -> Float[Tensor, " n"]:
        """The score of each image with its caption; 0 where c is none."""
        c, there = c.cpu(), self.captioned(c.cpu())
        pixels = (x if x.dtype == torch.uint8 else to_uint8(x)).cpu().expand(-1, 3, -1, -1)
        found = torch.zeros(len(c))
        found[there] = self.clip.cosines(pixels[there], [self.texts[k] for k in c[there].tolist()])
        return WEIGHT * found.clamp(min=0)

    def mean(self, scores: Float[Tensor, " n"]) -> tuple[float, float]:
        """And its standard error. Raises UserError for fewer than two."""
        if len(scores) < 2:
            raise UserError("fewer than two samples have a caption, so nothing can be judged: see data.captions")
        return scores.double().mean().item(), (scores.double().std() / len(scores) ** 0.5).item()
