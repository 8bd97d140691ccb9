"""Images as DINOv2 (Oquab et al. 2023, arXiv 2304.07193) and CLIP (Radford et al. 2021) see them, as rows of numbers.

The model is a folder of the user's own, as transformers saves it. What is done to an image before is fixed here, as in
the code of those who judge by these features, and does not depend on what else is installed:

- `dinov2`, as dgm-eval (Stein et al. 2023): the whole image brought to 224 x 224 by Pillow, bicubic, whatever its
  shape; the class token behind the last norm. Positions are interpolated as in the published model, to (16 + 0.1) / 37
  of the grid, where transformers takes 16 / 37.
- `cmmd`, as CMMD (Jayasumana et al. 2024): the middle square brought to the model's side by Pillow, bicubic; the
  projected embedding, of length 1.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from dumo.encoders import clip
from dumo.encoders.text import CONFIG, WEIGHTS, load_model
from dumo.flow.precision import using
from dumo.io import digest
from dumo.io.picture import Pixels
from dumo.io.read import foreign
from dumo.types import UserError

Kind = Literal["cmmd", "dinov2"]
SIDE = 224  # pixels that DINOv2 is shown: dgm-eval
OFFSET = 0.1  # of a patch: facebookresearch/dinov2, hub/backbones.py
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of its colours


class VisionModel(NamedTuple):
    """What a kind is: a class of transformers, the model types of the folders that it reads, and its usual colours."""

    model: str
    types: tuple[str, ...]
    colours: tuple[clip.Colour, clip.Colour]
    resize: str  # in words

    @property
    def hint(self) -> str:
        """The way out."""
        return f"name a folder with {CONFIG} and {WEIGHTS}, as transformers saves a {self.model}"


KNOWN: dict[Kind, VisionModel] = {
    "dinov2": VisionModel("Dinov2Model", ("dinov2",), IMAGENET, "Pillow, bicubic, the whole image to"),
    "cmmd": VisionModel(
        "CLIPVisionModelWithProjection",
        ("clip", "clip_vision_model"),
        (clip.MEAN, clip.SD),
        "Pillow, bicubic, the middle square to",
    ),
}


class ImageFeatures(NamedTuple):
    """What statistics read of n images: features alone."""

    pool: Float[Tensor, "n d"]
    spatial: Float[Tensor, "n 0"]
    logits: Float[Tensor, "n 0"]


@dataclass(frozen=True)
class Eye:
    """A model of images that is read."""

    kind: Kind
    folder: Path
    model: Any  # of transformers
    side: int
    mean: Float[Tensor, "3 1 1"]
    sd: Float[Tensor, "3 1 1"]

    @cached_property
    def facts(self) -> dict[str, str]:
        """What a report says of it: the model, the hash of its weights, and what is done to an image before."""
        config, (mean, sd) = self.model.config, (x.flatten().tolist() for x in (self.mean, self.sd))
        colours = "; ".join(", ".join(f"{number:.4g}" for number in numbers) for numbers in (mean, sd))
        return {
            "features": f"{type(self.model).__name__} {config.hidden_size} wide, patches of {config.patch_size}",
            "features_sha256": digest.of_file(self.folder / WEIGHTS),
            "resize": f"{KNOWN[self.kind].resize} {self.side}",
            "rounding": "0 to 255",
            "colours": f"mean and deviation {colours}",
        }

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> ImageFeatures:
        """The features of images of any size, in float32."""
        some = pixels if len(pixels) else pixels.new_zeros(1, 3, 1, 1)  # these models take no batch of none
        seen = self.seen(some).to(self.model.device)
        hint = KNOWN[self.kind].hint
        with using("fp32", self.model.device), foreign(f"the model of {self.folder} fails", hint):
            out = self.model(pixel_values=seen)
        x = (normalize(out.image_embeds) if self.kind == "cmmd" else out.pooler_output)[: len(pixels)]
        return ImageFeatures(x, x[:, :0], x[:, :0])

    def seen(self, pixels: Pixels) -> Float[Tensor, "n 3 side side"]:
        """Images as the model sees them."""
        rows = pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()
        whole = np.stack([np.asarray(fitted(Image.fromarray(row), self.side, self.kind)) for row in rows])
        return (torch.from_numpy(whole).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.sd


def fitted(image: Image.Image, side: int, kind: Kind) -> Image.Image:
    """The image as a square of `side` pixels: of CMMD its middle, else all of it."""
    if kind == "cmmd":
        (w, h), short = image.size, min(image.size)
        left = (w - short) // 2
        top = (h - short) // 2
        image = image.crop((left, top, left + short, top + short))
    return image.resize((side, side), Image.Resampling.BICUBIC)


def load(folder: Path, kind: Kind, field: str, device: torch.device | str = "cpu") -> Eye:
    """The model of a folder.

    Raises UserError, which names the field, where there is none, it is damaged, or its weights are a pickle.
    """
    known = KNOWN[kind]
    config = clip.config_of(folder, (CONFIG, WEIGHTS), field, known.hint)
    if config.get("model_type") not in known.types:
        raise UserError(f"{field}: {folder} holds a {config.get('model_type')}, no {known.model}: {known.hint}")
    model = load_model(folder, known.model, field, known.hint)
    side = SIDE if kind == "dinov2" else model.config.image_size
    if kind == "dinov2":
        place(model, side)
    return Eye(kind, folder, model.to(device), side, *clip.colours(folder, known.colours, known.hint))


def place(model: Any, side: int) -> None:  # noqa: ANN401, of transformers
    """Bring the positions of a DINOv2 to images of this side, as the published code does it at every pass."""
    old: Tensor = model.embeddings.position_embeddings.detach()
    n, m = side // model.config.patch_size, isqrt(old.shape[1] - 1)
    if n == m:
        return
    grid = interpolate(old[:, 1:].mT.unflatten(2, (m, m)), scale_factor=(n + OFFSET) / m, mode="bicubic")
    model.embeddings.position_embeddings = nn.Parameter(torch.cat([old[:, :1], grid.flatten(2).mT], 1), False)
