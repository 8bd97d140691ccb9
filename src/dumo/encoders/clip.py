"""How well an image fits a text: the cosine of what CLIP (Radford et al. 2021) makes of the two.

The model is a folder of the user's own, as transformers saves a CLIPModel. What is done to an image before is fixed
here, as in the published code, and does not depend on what else is installed: the shorter side resized to the model's
by Pillow, bicubic, the middle cut out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dumo.encoders.text import CONFIG, PICKLES, WEIGHTS, load_model
from dumo.encoders.tokens import Cutter, cutter
from dumo.io import digest
from dumo.io.picture import Pixels
from dumo.io.read import foreign, read_settings
from dumo.io.weights import read, read_metadata
from dumo.types import UserError

PIECE = 64  # images
HINT = f"name a folder with {CONFIG}, {WEIGHTS} and the files of a tokenizer, as transformers saves a CLIPModel"
CUT = "preprocessor_config.json"  # of images
BOTH = "processor_config.json"  # of images and texts, as of transformers 5
TOKENIZER = "tokenizer_config.json"
Colour = tuple[float, float, float]  # red, green, blue
# Of colours: OpenAI's CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
SD = (0.26862954, 0.26130258, 0.27577711)
NUMBERS = "image_mean", "image_std"


@dataclass(frozen=True)
class Clip:
    """A CLIP that is read."""

    folder: Path
    model: Any  # of transformers
    cut: Cutter
    side: int
    mean: Float[Tensor, "3 1 1"]
    sd: Float[Tensor, "3 1 1"]

    @cached_property
    def sha256(self) -> str:
        """Of the weights, in hexadecimal."""
        return digest.of_file(self.folder / WEIGHTS)

    @torch.no_grad()
    def cosines(self, pixels: Pixels, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Of each image with its text, in float32 on the CPU; texts of too many tokens are cut, with a warning."""
        found = list[Tensor]()
        for first in range(0, len(texts), PIECE):
            part = slice(first, first + PIECE)
            ids, mask = self.cut(texts[part])
            inputs = {"input_ids": ids, "attention_mask": mask.long(), "pixel_values": self.seen(pixels[part])}
            with foreign(f"the CLIP of {self.folder} fails", HINT):
                output = self.model(**{name: x.to(self.model.device) for name, x in inputs.items()})
                found.append((output.image_embeds * output.text_embeds).sum(1).float().cpu())  # both of length 1
        return torch.cat([torch.zeros(0), *found])

    def seen(self, pixels: Pixels) -> Float[Tensor, "n 3 side side"]:
        """Images as the model sees them."""
        rows = pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()
        whole = np.stack([np.asarray(fitted(Image.fromarray(row), self.side)) for row in rows])
        return (torch.from_numpy(whole).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.sd


def fitted(image: Image.Image, side: int) -> Image.Image:
    """Its shorter side resized to `side`, then the middle `side` by `side`."""
    w, h = (side * length // min(image.size) for length in image.size)
    left = (w - side) // 2
    top = (h - side) // 2
    return image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def load(folder: Path, field: str, device: torch.device | str = "cpu") -> Clip:
    """The CLIP of a folder.

    Raises UserError, which names the field, where there is none, it is damaged, or its weights are a pickle.
    """
    config = config_of(folder, (CONFIG, WEIGHTS, TOKENIZER), field, HINT)
    if config.get("model_type") != "clip" or "vision_config" not in config:
        raise UserError(f"{field}: {folder} holds no CLIPModel, of images and texts: {HINT}")
    model = load_model(folder, "CLIPModel", field, HINT).to(device)
    length = model.config.text_config.max_position_embeddings
    side = model.config.vision_config.image_size
    cut = cutter(folder, length)
    return Clip(folder, model, cut, side, *colours(folder, (MEAN, SD), HINT))


def config_of(folder: Path, files: Sequence[str], field: str, hint: str) -> dict[str, Any]:
    """The settings of a folder that has these files, config.json first.

    Raises UserError, which names the field, where one is missing, the weights are damaged, or they are a pickle.
    """
    missing = next((name for name in files if not (folder / name).is_file()), None)
    if missing == WEIGHTS and (folder / PICKLES[0]).is_file():
        read(folder / PICKLES[0], convert=False)  # refuses, and says the way out
    if missing:
        raise UserError(f"{field}: {folder} has no {missing}: {hint}")
    config = read_settings(folder / CONFIG, hint)
    read_metadata(folder / WEIGHTS)  # damaged weights are refused with a line
    return config


def colours(
    folder: Path, usual: tuple[Colour, Colour], hint: str
) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Mean and deviation of the colours, as the folder's image processor has them, else as usual.

    Raises UserError where one of them is not three numbers.
    """
    file = next((folder / name for name in (CUT, BOTH) if (folder / name).is_file()), None)
    known = read_settings(file, hint) if file else {}
    found = list[Tensor]()
    inner = known.get("image_processor")
    known = inner if isinstance(inner, dict) else known
    for name, numbers in zip(NUMBERS, usual, strict=True):
        try:
            found.append(torch.tensor(known.get(name, numbers), dtype=torch.float32).view(3, 1, 1))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{file}: {name} is not three numbers: {hint}") from error
    return found[0], found[1]
