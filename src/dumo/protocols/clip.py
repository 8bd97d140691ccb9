"""How well images fit their captions, by the CLIP that the user names: no distance to data, and no FID.

Both scores in use are the mean of a cosine, clipped at 0, times a number: `clip_score` is out of 100; `clip_s` is
Hessel et al.'s (2021): 2.5 times, with "A photo depicts" before the caption. A number depends on which CLIP, so its
hash stands on the card, and no two CLIPs share a table. More is better, as far as real images with their captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor

from dumo import bound
from dumo.data.source import Data
from dumo.features import clip
from dumo.features.clip import Clip
from dumo.io.path import user_path
from dumo.io.picture import to_uint8
from dumo.protocols.evaluator import Made, Scores, Tick, collect, in_turn, named
from dumo.types import Cond, Spec, UserError

SAMPLES = 5000  # ours
REAL = 2000  # images of the data that are looked at, at most: ours
FIELD = "evaluate.protocol.model"
VARIANTS: dict[str, tuple[str, float, str]] = {  # the score, its weight, what the text stands in
    "x100": ("clip_score", 100.0, "{}"),
    "w2.5": ("clip_s", 2.5, "A photo depicts {}"),
}


class ClipProtocol(Spec):
    """Images in colour or grey, decoded, by the cosine of CLIP with their captions."""

    kind: Literal["clip-score"]
    model: str | None = Field(default=None)  # the folder of a CLIPModel of transformers, in safetensors
    variant: Literal["x100", "w2.5"] = "x100"  # 100 cos, or Hessel et al.'s
    samples: int = Field(default=SAMPLES, ge=2, le=bound.SAMPLES)

    @property
    def name(self) -> str:
        """`kind`, with the variant and the number of samples if they are not the standard ones."""
        return named(self.kind if self.variant == "x100" else f"{self.kind} {self.variant}", self.samples, SAMPLES)

    @property
    def missing(self) -> str | None:
        """What must be named before anything can be judged; None: nothing."""
        return None if self.model else f"a CLIP, in {FIELD}: {clip.HINT}"

    def check(self, shape: Sequence[int], classes: int = 0) -> None:
        """Refuse data that are no images with a `UserError`, before any work; any number of classes serves."""
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise UserError(
                f"protocol {self.kind} judges images, not samples of shape {tuple(shape)}: choose another protocol"
            )

    def labels(self, classes: int = 0) -> Int64[Tensor, " n"]:
        """The class of sample i: i mod `classes`, all 0 where there are none."""
        return in_turn(self.samples, classes)

    def evaluator(
        self,
        open_data: Callable[[], Data],
        *,
        classes: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        tick: Tick | None = None,
        c: Cond | None = None,
        texts: Sequence[str] = (),
    ) -> "ClipEvaluator":
        """Who compares sample i with caption c[i] of `texts`; the data's conditions are numbers of these, too.

        Classes and tick are not used. Raises `UserError` without captions, where no model is named, or it cannot be
        read.
        """
        if c is None:
            raise UserError(
                f"protocol {self.kind} compares images with captions, and there are none: see data.captions"
            )
        if self.model is None:
            raise UserError(f"protocol {self.kind} needs {self.missing}")
        score, weight, template = VARIANTS[self.variant]
        model = clip.load(user_path(self.model, FIELD), template, FIELD, device)
        x, own = open_data().reference(REAL, seed)
        facts = {
            "features": f"CLIP {model.model.config.vision_config.hidden_size} wide, patches of "
            f"{model.model.config.vision_config.patch_size}, {model.side} pixels",
            "features_sha256": model.sha256,
            "reference": f"captions, as '{template}'",
            "resize": f"Pillow, bicubic, to {model.side}, the middle",
            "rounding": "0 to 255",
        }
        return ClipEvaluator(model, score, weight, c, tuple(texts), (x[:REAL], own[:REAL]), facts)


@dataclass(frozen=True)
class ClipEvaluator:
    """Compares samples with their captions; one whose condition is no caption does not count."""

    clip: Clip
    name: str  # of the score
    weight: float
    c: Cond
    texts: tuple[str, ...]
    real: tuple[Tensor, Tensor]  # images of the data, each with a caption of its own
    facts: dict[str, str]

    def score(self, made: Made) -> Scores:
        """The mean, `clip_score` or `clip_s`, and with `_sd` its standard error. Raises UserError as `collect`."""
        found = collect(((index, self.fit(x, self.c[index])) for index, x in made), len(self.c))
        mean, error = self.mean(found[self.told(self.c)])
        return {self.name: mean, f"{self.name}_sd": error}

    def baselines(self) -> dict[str, Scores]:
        """`captions`: the same of real images with captions of theirs; `others`: with those of other images."""
        x, c = (rows[self.told(self.real[1])] for rows in self.real)
        if len(c) < 2:
            return {}
        order, away = c.argsort(), torch.empty_like(c)
        away[order] = c[order].roll(len(c) // 2)  # another one, where no caption is of half of the images
        found = {"captions": self.mean(self.fit(x, c)), "others": self.mean(self.fit(x, away))}
        return {name: {"mean": mean, "sd": error, "splits": float(len(c))} for name, (mean, error) in found.items()}

    def told(self, c: Cond) -> Bool[Tensor, " n"]:
        """Which of these are captions."""
        return c < len(self.texts)

    def fit(self, x: Tensor, c: Cond) -> Float[Tensor, " n"]:
        """The score of each image with its caption; 0 where c is none."""
        c, there = c.cpu(), self.told(c.cpu())
        pixels = (x if x.dtype == torch.uint8 else to_uint8(x)).cpu().expand(-1, 3, -1, -1)
        found = torch.zeros(len(c))
        found[there] = self.clip.cosines(pixels[there], [self.texts[k] for k in c[there].tolist()])
        return self.weight * found.clamp(min=0)

    def mean(self, scores: Float[Tensor, " n"]) -> tuple[float, float]:
        """And its standard error. Raises UserError for fewer than two."""
        if len(scores) < 2:
            raise UserError("fewer than two samples have a caption, so nothing can be judged: see data.captions")
        return scores.double().mean().item(), (scores.double().std() / len(scores) ** 0.5).item()
