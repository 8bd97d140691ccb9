"""Compute image features with DINOv2 (Oquab et al. 2023, arXiv 2304.07193) and CLIP (Radford et al. 2021).

The user provides the model as a transformers folder. `load` returns an `ImageEncoder`, which computes `ImageFeatures`;
`FEATURE_MODELS` has the model of each kind of features. `load_clip` returns a `Clip`, which computes CLIP scores.

To add a kind of features, add a row to `FEATURE_MODELS`, and its preprocessing to `ImageEncoder`.

Preprocessing is fixed here as in the reference implementations of the metrics, independent of installed versions:

- `dinov2`, as dgm-eval (Stein et al. 2023): the image is resized to 224 x 224 (Pillow, bicubic), whatever its aspect
  ratio; features are the class token after the last norm. Position embeddings are interpolated by (16 + 0.1) / 37 as in
  the published model, whereas transformers uses 16 / 37.
- `cmmd`, as CMMD (Jayasumana et al. 2024): the center square is resized to the model's size (Pillow, bicubic); features
  are the normalized projected embedding.
- `Clip`, as transformers: the shorter side is resized to the model's size (Pillow, bicubic), then a center crop.
"""

from collections.abc import Callable, Sequence
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

from dumo.encoders.part import TRANSFORMERS, TRANSFORMERS_FILE, require_weights
from dumo.encoders.tokens import LoadedTokenizer, load_tokenizer, warn_of_cuts
from dumo.encoders.transformers_library import CONFIG, load_model
from dumo.flow.precision import using
from dumo.io.picture import Pixels
from dumo.io.read import read_json
from dumo.types import UserError

FeatureKind = Literal["cmmd", "dinov2"]
Colour = tuple[float, float, float]  # red, green, blue in [0, 1]
_DINOV2_SIDE = 224  # pixels: dgm-eval
_DINOV2_OFFSET = 0.1  # patches: facebookresearch/dinov2, hub/backbones.py
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # OpenAI's, likewise
IMAGE_CONFIG = "preprocessor_config.json"  # of the image processor
_PROCESSOR_CONFIG = "processor_config.json"  # its successor in transformers 5
_IMAGES_PER_BATCH = 64
CLIP_HINT = (
    f"give a folder with {CONFIG}, {TRANSFORMERS_FILE} and a tokenizer, as saved by transformers for a CLIPModel"
)


class FeatureModel(NamedTuple):
    """The model that computes a kind of features, before it is loaded."""

    class_name: str  # in transformers
    model_types: tuple[str, ...]  # accepted values of `model_type` in config.json
    colours: tuple[Colour, Colour]  # default mean and standard deviation of colours
    resize: str  # a description of the resizing, for reports

    @property
    def hint(self) -> str:
        """What to do if a folder holds another model, for messages."""
        return f"give a folder with {CONFIG} and {TRANSFORMERS_FILE}, as saved by transformers for a {self.class_name}"


FEATURE_MODELS: dict[FeatureKind, FeatureModel] = {
    "dinov2": FeatureModel(
        class_name="Dinov2Model",
        model_types=("dinov2",),
        colours=IMAGENET_COLOURS,
        resize="Pillow, bicubic, the whole image to",
    ),
    "cmmd": FeatureModel(
        class_name="CLIPVisionModelWithProjection",
        model_types=("clip", "clip_vision_model"),
        colours=CLIP_COLOURS,
        resize="Pillow, bicubic, the middle square to",
    ),
}


class ImageFeatures(NamedTuple):
    """Features of n images, in the fields of `InceptionFeatures`, without spatial features and logits."""

    pool: Float[Tensor, "n d"]
    spatial: Float[Tensor, "n 0"]
    logits: Float[Tensor, "n 0"]


@dataclass(frozen=True)
class ImageEncoder:
    """A loaded vision model and its preprocessing."""

    kind: FeatureKind
    folder: Path
    model: Any  # a transformers object
    side: int  # pixels
    mean: Float[Tensor, "3 1 1"]  # of colours in [0, 1]
    deviation: Float[Tensor, "3 1 1"]

    @cached_property
    def facts(self) -> dict[str, str]:
        """The model, the hash of its weights, and the preprocessing, for a report."""
        config = self.model.config
        hint = FEATURE_MODELS[self.kind].hint
        colours = f"{_colour_text(self.mean)}; {_colour_text(self.deviation)}"
        return {
            "features": f"{type(self.model).__name__} {config.hidden_size} wide, patches of {config.patch_size}",
            "features_sha256": require_weights(self.folder, TRANSFORMERS, "features", hint).sha256(),
            "resize": f"{FEATURE_MODELS[self.kind].resize} {self.side}",
            "rounding": "0 to 255",
            "colours": f"mean and deviation {colours}",
        }

    @torch.no_grad()
    def __call__(self, pixels: Pixels) -> ImageFeatures:
        """Return the features of n images of any size, in float32."""
        batch = pixels
        if len(pixels) == 0:
            batch = pixels.new_zeros(1, 3, 1, 1)  # these models reject an empty batch; the row is removed below
        model_input = self.preprocess(batch).to(self.model.device)
        with using("fp32", self.model.device):
            out: Any = self.model(pixel_values=model_input)  # a transformers object
        features = normalize(out.image_embeds) if self.kind == "cmmd" else out.pooler_output
        features = features[: len(pixels)]
        empty = features[:, :0]
        return ImageFeatures(features, empty, empty)

    def preprocess(self, pixels: Pixels) -> Float[Tensor, "n 3 side side"]:
        """Resize and normalize images for the model."""
        return _to_inputs(pixels, self._to_square, self.mean, self.deviation)

    def _to_square(self, image: Image.Image) -> Image.Image:
        """Resize an image to `side` x `side` pixels: the center square for CMMD, otherwise the whole image."""
        if self.kind == "cmmd":
            width, height = image.size
            short = min(width, height)
            left = (width - short) // 2
            top = (height - short) // 2
            image = image.crop((left, top, left + short, top + short))
        return image.resize((self.side, self.side), Image.Resampling.BICUBIC)


def _colour_text(colour: Float[Tensor, "3 1 1"]) -> str:
    """Format red, green and blue for a report."""
    return ", ".join(f"{number:.4g}" for number in colour.flatten().tolist())


def load(folder: Path, kind: FeatureKind, field: str, device: torch.device | str = "cpu") -> ImageEncoder:
    """Load the model of a folder onto a device.

    Raises UserError, which names the field, for another model, damaged weights or a pickle.
    """
    feature_model = FEATURE_MODELS[kind]
    model_type = read_json(folder / CONFIG).get("model_type")
    if model_type not in feature_model.model_types:
        raise UserError(
            f"{field}: {folder} contains a {model_type}, not a {feature_model.class_name}: {feature_model.hint}"
        )
    model = load_model(folder, feature_model.class_name, field, feature_model.hint)
    side = model.config.image_size
    if kind == "dinov2":
        side = _DINOV2_SIDE
        _interpolate_positions(model, side)
    mean, deviation = _read_colours(folder, feature_model.colours)
    return ImageEncoder(kind=kind, folder=folder, model=model.to(device), side=side, mean=mean, deviation=deviation)


def _interpolate_positions(model: Any, side: int) -> None:  # noqa: ANN401, of transformers
    """Interpolate the position embeddings of a DINOv2 to images of `side` pixels, as the published code does.

    The grid of m x m patches becomes one of n x n patches.
    """
    positions: Tensor = model.embeddings.position_embeddings.detach()  # (1, 1 + m * m, width), the class token first
    n = side // model.config.patch_size
    m = isqrt(positions.shape[1] - 1)
    if n == m:
        return
    class_token = positions[:, :1]
    grid = positions[:, 1:].mT.unflatten(2, (m, m))
    grid = interpolate(grid, scale_factor=(n + _DINOV2_OFFSET) / m, mode="bicubic")
    model.embeddings.position_embeddings = nn.Parameter(torch.cat([class_token, grid.flatten(2).mT], 1), False)


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP and its preprocessing of images and texts."""

    folder: Path
    model: Any  # a transformers object
    tokenizer: LoadedTokenizer
    side: int  # pixels
    mean: Float[Tensor, "3 1 1"]  # of colours in [0, 1]
    deviation: Float[Tensor, "3 1 1"]

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the weights, in hexadecimal."""
        return require_weights(self.folder, TRANSFORMERS, "the CLIP", CLIP_HINT).sha256()

    @torch.no_grad()
    def cosines(self, pixels: Pixels, texts: Sequence[str]) -> Float[Tensor, " n"]:
        """Return the cosine similarity of each image and its text, in float32 on the CPU. Warns of truncated texts."""
        if texts:
            warn_of_cuts(self.tokenizer.cut_texts(texts), f"at {self.tokenizer.length} tokens")
        batches = list[Tensor]()
        for first in range(0, len(texts), _IMAGES_PER_BATCH):
            batch = slice(first, first + _IMAGES_PER_BATCH)
            ids, mask = self.tokenizer(texts[batch])
            inputs = {
                "input_ids": ids,
                "attention_mask": mask.long(),
                "pixel_values": _to_inputs(pixels[batch], self._resize_and_crop, self.mean, self.deviation),
            }
            output = self.model(**{name: x.to(self.model.device) for name, x in inputs.items()})
            cosines = (output.image_embeds * output.text_embeds).sum(1)  # both are normalized
            batches.append(cosines.float().cpu())
        return torch.cat([torch.zeros(0), *batches])

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side of an image to `side` pixels, then center-crop, with the rounding of transformers."""
        side = self.side
        width, height = (side * length // min(image.size) for length in image.size)
        left = (width - side) // 2
        top = (height - side) // 2
        return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def load_clip(folder: Path, field: str, device: torch.device | str = "cpu") -> Clip:
    """Load the CLIP of a folder onto a device.

    Raises UserError, which names the field, for another model, damaged weights or a pickle.
    """
    model_type = read_json(folder / CONFIG).get("model_type")
    if model_type != "clip":
        raise UserError(f"{field}: {folder} contains a {model_type}, not a CLIPModel: {CLIP_HINT}")
    model = load_model(folder, "CLIPModel", field, CLIP_HINT).to(device)
    tokenizer = load_tokenizer(folder, model.config.text_config.max_position_embeddings, field=field)
    mean, deviation = _read_colours(folder, CLIP_COLOURS)
    side = model.config.vision_config.image_size
    return Clip(folder=folder, model=model, tokenizer=tokenizer, side=side, mean=mean, deviation=deviation)


def _to_inputs(
    pixels: Pixels,
    to_square: Callable[[Image.Image], Image.Image],
    mean: Float[Tensor, "3 1 1"],
    deviation: Float[Tensor, "3 1 1"],
) -> Float[Tensor, "n 3 side side"]:
    """Return the input of a model: images resized by `to_square`, their colours in [0, 1] normalized."""
    images = pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()
    squares = np.stack([np.asarray(to_square(Image.fromarray(image))) for image in images])
    colours = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255
    return (colours - mean) / deviation


def _read_colours(
    folder: Path, default: tuple[Colour, Colour]
) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Read the mean and standard deviation of colours from a folder's image processor config.

    Missing values are taken from `default`.
    """
    settings: dict[str, Any] = {}
    for name in (_PROCESSOR_CONFIG, IMAGE_CONFIG):
        if (folder / name).is_file():
            settings = read_json(folder / name)
    settings = settings.get("image_processor", settings)
    mean = torch.tensor(settings.get("image_mean", default[0]), dtype=torch.float32)
    deviation = torch.tensor(settings.get("image_std", default[1]), dtype=torch.float32)
    return mean.view(3, 1, 1), deviation.view(3, 1, 1)
