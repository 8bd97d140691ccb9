"""CLIP (Radford et al. 2021): how well an image fits a text, as the cosine of their two embeddings.

The model is in a folder of the user's own, as transformers saves a CLIPModel. `load` checks the folder and reads model,
tokenizer and colours into a `Clip`. `Clip.cosines` preprocesses images, tokenizes texts, and compares their embeddings.

Preprocessing is fixed here, as transformers has it, whatever else is installed: Pillow brings the shorter side to the
model's, bicubic, the middle is cut out, and colours are centred and scaled.

`read_config`, `read_colours`, `to_inputs` and the colours of OpenAI's CLIP are also for `dumo.encoders.vision`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dumo.encoders.part import TRANSFORMERS, TRANSFORMERS_FILE, require_weights
from dumo.encoders.tokens import LoadedTokenizer, load_tokenizer, warn_of_cuts
from dumo.encoders.transformers_library import CONFIG, load_model
from dumo.io.picture import Pixels
from dumo.io.read import explain_foreign_errors, read_settings
from dumo.types import UserError

_IMAGES_PER_BATCH = 64  # ours
HINT = (
    f"name a folder with {CONFIG}, {TRANSFORMERS_FILE} and the files of a tokenizer, as transformers saves a CLIPModel"
)
_TOKENIZER_CONFIG = "tokenizer_config.json"
IMAGE_CONFIG = "preprocessor_config.json"  # of the image processor
_PROCESSOR_CONFIG = "processor_config.json"  # of image processor and tokenizer, as of transformers 5
_COLOUR_KEYS = ("image_mean", "image_std")  # in either file
Colour = tuple[float, float, float]  # red, green, blue
COLOUR_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP
COLOUR_DEVIATION = (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP, and how images and texts are preprocessed for it."""

    folder: Path
    model: Any  # of transformers
    tokenizer: LoadedTokenizer
    side: int  # pixels
    mean: Float[Tensor, "3 1 1"]  # of colours in [0, 1]
    deviation: Float[Tensor, "3 1 1"]

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights, in hexadecimal."""
        return require_weights(self.folder, TRANSFORMERS, "the CLIP", HINT).sha256()

    @torch.no_grad()
    def cosines(self, pixels: Pixels, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return the cosine of each image and its text, in float32 on the CPU. Warns of texts that are cut."""
        if texts:
            warn_of_cuts(self.tokenizer.cut_texts(texts), f"at {self.tokenizer.length} tokens")
        batches = list[Tensor]()
        for first in range(0, len(texts), _IMAGES_PER_BATCH):
            batch = slice(first, first + _IMAGES_PER_BATCH)
            ids, mask = self.tokenizer(texts[batch])
            inputs = {
                "input_ids": ids,
                "attention_mask": mask.long(),
                "pixel_values": to_inputs(pixels[batch], self._resize_and_crop, self.mean, self.deviation),
            }
            with explain_foreign_errors(f"the CLIP of {self.folder} fails", HINT):
                output = self.model(**{name: x.to(self.model.device) for name, x in inputs.items()})
                cosines = (output.image_embeds * output.text_embeds).sum(1)  # both have length 1
                batches.append(cosines.float().cpu())
        return torch.cat([torch.zeros(0), *batches])

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side of an image to `side` pixels, then cut out the middle, rounding as transformers."""
        side = self.side
        width, height = (side * length // min(image.size) for length in image.size)
        left = (width - side) // 2
        top = (height - side) // 2
        return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def load(folder: Path, field: str, device: torch.device | str = "cpu") -> Clip:
    """Load the CLIP of a folder onto a device.

    Raises UserError, which names the field, where there is none, it is damaged, or its weights are a pickle.
    """
    config = read_config(folder, (CONFIG, _TOKENIZER_CONFIG), field, HINT)
    if config.get("model_type") != "clip" or "vision_config" not in config:
        raise UserError(f"{field}: {folder} holds no CLIPModel, of images and texts: {HINT}")
    model = load_model(folder, "CLIPModel", field, HINT).to(device)
    tokenizer = load_tokenizer(folder, model.config.text_config.max_position_embeddings, field=field)
    side = model.config.vision_config.image_size
    mean, deviation = read_colours(folder, (COLOUR_MEAN, COLOUR_DEVIATION), HINT)
    return Clip(folder=folder, model=model, tokenizer=tokenizer, side=side, mean=mean, deviation=deviation)


def read_config(folder: Path, files: Sequence[str], field: str, hint: str) -> dict[str, Any]:
    """Check that a folder has these `files` and undamaged weights, and read its config.json.

    Raises UserError, which names the field, where a file is missing, the weights are damaged, or they are a pickle.
    """
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{field}: {folder} has no {name}: {hint}")
    config = read_settings(folder / CONFIG, hint)
    require_weights(folder, TRANSFORMERS, field, hint).require_undamaged()
    return config


def to_inputs(
    pixels: Pixels,
    to_square: Callable[[Image.Image], Image.Image],
    mean: Float[Tensor, "3 1 1"],
    deviation: Float[Tensor, "3 1 1"],
) -> Float[Tensor, "n 3 side side"]:
    """The input of a model: each image as `to_square` makes it, its colours in [0, 1] less `mean`, over `deviation`."""
    images = pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()
    squares = np.stack([np.asarray(to_square(Image.fromarray(image))) for image in images])
    colours = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255
    return (colours - mean) / deviation


def read_colours(
    folder: Path, default: tuple[Colour, Colour], hint: str
) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Read the mean and deviation of colours from the settings of a folder's image processor.

    Where there are no such settings, or they lack a value, `default` has it. Raises UserError where a value is not
    three numbers.
    """
    file = _find_image_settings(folder)
    settings = read_settings(file, hint) if file else {}
    image_settings = settings.get("image_processor")
    if isinstance(image_settings, dict):
        settings = image_settings
    colours = list[Tensor]()
    for key, default_value in zip(_COLOUR_KEYS, default, strict=True):
        try:
            colour = torch.tensor(settings.get(key, default_value), dtype=torch.float32).view(3, 1, 1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{file}: {key} is not three numbers: {hint}") from error
        colours.append(colour)
    mean, deviation = colours
    return mean, deviation


def _find_image_settings(folder: Path) -> Path | None:
    """The file with the settings of a folder's image processor; None where there is none."""
    for name in (IMAGE_CONFIG, _PROCESSOR_CONFIG):
        if (folder / name).is_file():
            return folder / name
    return None
