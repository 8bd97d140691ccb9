"""Choose the recipe, some of its fields and the duration for a user's images.

`propose` is the entry point for a folder or file of images. `pixel_fields` and `length_fields` are for images in
memory.

- On a GPU the recipe is `my-images`, which trains a DiT in pixel space, with the steps of the recipe.
- On a CPU it is `my-images-64`, which trains a small DiT on latents of the bundled autoencoder taef2.
- On a CPU, if the images have captions, are too small for latents, or the user chooses the network, it is `my-images`
  with a small network, on at most 32 x 32 pixels.
- If there are captions, the network is conditioned on them.
- On a CPU the run has a time limit.

The user's overrides are applied last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dumo.config.load import load_recipe, parse, run_of
from dumo.config.overrides import field_of, override, sets_field
from dumo.config.source import IMAGES_LATENTS_RECIPE, IMAGES_RECIPE, RunText, folder_of_images, settings_of_images
from dumo.config.spec import Run, StandaloneParts
from dumo.data import Images, Latents
from dumo.data.caption import AUTO, CaptionFiles, NoCaptionsError, captions_of
from dumo.data.images import unreadable_text
from dumo.data.pixel import short_side
from dumo.data.rows import Rows
from dumo.encoders.caption_ids import Captions
from dumo.io import digest
from dumo.io.run_places import LATENTS_FOLDER
from dumo.io.yaml import yaml_text
from dumo.runtime.device import choose_device
from dumo.runtime.formatting import minutes_text
from dumo.types import UserError

# The number of images whose size is read.
_MAX_HEADERS = 256

# The side of training images in pixels.
_MIN_SIDE = 16
_MAX_SIDE_OF_CPU = 32
_MAX_SIDE_OF_GPU = 64
# Required by the codec of the latents, and by networks that halve the side three times.
_SIDE_MULTIPLE = 8
# taef2, which was trained at 256 pixels, reaches 22 dB on photos of 32 pixels (docs/log.md).
_MIN_SIDE_IN_LATENTS = 32

# Training on a CPU in pixel space. After two minutes on 150 photos the distance of this U-Net with 0.7M parameters was
# lower than that of a DiT with 1.3M (docs/log.md).
_CPU_FIELDS = {"train.batch": 32, "train.precision": "fp32", "train.compile": "none"}
_CPU_NET = {"kind": "unet", "width": 16, "multipliers": [1, 2, 4], "depth": 1, "time_scale": 10.0}

# The U-Net does not support captions, so captions use a DiT, with the text encoder of cifar10-latents-words.
_CPU_CAPTION_NET = {"kind": "dit", "patch": 4, "width": 128, "depth": 4, "attention": 4, "time_scale": 10.0}
_CAPTION_ENCODER = {"kind": "learned", "width": 32, "depth": 1, "drop": 0.1}
_MAX_CAPTION_BYTES = 128

# Class guidance as in dumo-best-latents, used only if there are classes.
_CLASS_FIELDS = {"objective.drop": 0.1, "objective.guide.zeta": 0.55}

# The default duration on a CPU. With few images it is shorter: in 7 seconds per image, a run on two cores sees each
# image about 1,500 times. Longer training memorizes the images and may diverge (docs/log.md).
_DEFAULT_MINUTES = 6.0
_SECONDS_PER_IMAGE = 7.0
_FEW_IMAGES = 200


@dataclass(frozen=True)
class Proposal:
    """A run for a set of images, and the properties of these images."""

    run: Run
    count: int
    side: int  # median of the shorter side of some images, in pixels
    classes: int
    captions: Captions | None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the lines of the proposal, each a name and a text."""
        run = self.run
        yield "images", f"{self.count:,}, {self._conditions_text()}, shorter side {self.side} pixels"
        if self.count < _FEW_IMAGES:
            yield "few", "expect similar colours and textures; long training memorizes the images"
        size = " x ".join(map(str, run.shown_shape[1:]))
        if isinstance(run.data, Latents):
            text = f"latents of {run.data.codec.kind} at {size}; data.kind=images selects pixels"
        else:
            text = f"pixels at {size}"
        yield "trained as", text
        if run.train.minutes is None:
            yield "length", f"{run.train.steps:,} steps of {run.train.batch} images"
        elif isinstance(run.data, Latents):
            yield "length", f"{minutes_text(run.train.minutes)}, after the images are encoded"
        else:
            yield "length", minutes_text(run.train.minutes)

    def _conditions_text(self) -> str:
        """Describe the classes or captions of the images."""
        if self.captions is not None:
            return f"{len(self.captions):,} different captions (data.captions=null ignores them)"
        return f"{self.classes} classes" if self.classes else "no classes, no captions"


def propose(place: str, changes: Sequence[str] = (), *, device: str = "auto") -> Proposal:
    """Propose a run on the images at `place`, a folder or a file, for this device.

    `changes` are the user's overrides a.b=c. Raises UserError if no image can be read, or if captions are damaged.
    """
    on_a_cpu = choose_device(device).type == "cpu"

    # Inspect the images.
    images = _images_at(place, changes)
    rows = images.open_rows()
    side = _median_side(rows)
    chooses_net = sets_field(changes, "net") or sets_field(changes, "net.kind")
    captions = None if chooses_net else _find_captions(images, rows, changes)
    if captions is None:
        images = images.with_facts()
    length = length_fields(len(rows), changes, on_a_cpu=on_a_cpu)

    # Choose the recipe.
    wants_pixels = chooses_net or "data.kind=images" in changes or images.captions is not None
    if on_a_cpu and side >= _MIN_SIDE_IN_LATENTS and captions is None and not wants_pixels:
        recipe = IMAGES_LATENTS_RECIPE
        fields = _latent_fields(place, images, side, changes)
    else:
        recipe = IMAGES_RECIPE
        max_side = _MAX_SIDE_OF_CPU if on_a_cpu else _MAX_SIDE_OF_GPU
        new_side = images.side if sets_field(changes, "data.side") else max(_MIN_SIDE, _round_side(side, max_side))
        fields = {"data.root": place, "data.side": new_side, **pixel_fields(new_side, on_a_cpu=on_a_cpu)}
        if captions is not None:
            fields |= _caption_fields(captions, on_a_cpu=on_a_cpu)

    # Create the run. The user's overrides are applied last.
    tree = load_recipe(recipe, _as_changes(fields | length)).model_dump(mode="json")
    run = run_of(RunText(tree, ""), settings_of_images(tree, changes))
    return Proposal(run, len(rows), side, images.labels, captions)


def pixel_fields(side: int, *, on_a_cpu: bool) -> dict[str, Any]:
    """Return overrides of `my-images` for images of `side` pixels, except for the data. {} on a GPU."""
    if not on_a_cpu:
        return {}
    return {**_CPU_FIELDS, "net": {**_CPU_NET, "attend": [side // 4]}}


def length_fields(count: int, changes: Sequence[str], *, on_a_cpu: bool) -> dict[str, Any]:
    """Return the override of the duration for `count` images, or {} if `changes` or the recipe set it."""
    is_chosen = sets_field(changes, "train.steps") or sets_field(changes, "train.minutes")
    if is_chosen or not on_a_cpu:
        return {}
    return {"train.minutes": min(_DEFAULT_MINUTES, round(count * _SECONDS_PER_IMAGE / 60, 1))}


def _images_at(place: str, changes: Sequence[str]) -> Images:
    """Return the spec of the images at a place, with the user's overrides. Raises UserError for other data."""
    data = load_recipe(IMAGES_RECIPE).data.model_dump(mode="json")
    tree = {"data": data | {"root": place}}
    # For latents, data.root is the folder of the cache.
    override(tree, [text for text in changes if text.startswith("data.") and field_of(text) != "data.root"])
    images = parse(StandaloneParts, tree).data
    if not isinstance(images, Images):
        raise UserError(
            f"{place} has images, but data.kind={tree['data']['kind']} does not use images: remove data.kind"
        )
    return images


def _median_side(rows: Rows) -> int:
    """Return the median shorter side of some images in pixels. Raises UserError if none of them can be read."""
    indices = sorted({round(i * (len(rows) - 1) / (_MAX_HEADERS - 1)) for i in range(_MAX_HEADERS)})
    sides: list[int] = []
    reason = ""
    for i in indices:
        try:
            sides.append(short_side(rows.read(i)))
        except (OSError, ValueError) as error:
            reason = reason or unreadable_text(rows.path(i), error)
    if not sides:
        raise UserError(f"none of the {len(indices)} sampled images can be read; the first: {reason}")
    return round(median(sides))


def _round_side(side: int, max_side: int) -> int:
    """Round a side down to a multiple of 8, at most `max_side`."""
    return min(max_side, side // _SIDE_MULTIPLE * _SIDE_MULTIPLE)


def _find_captions(images: Images, rows: Rows, changes: Sequence[str]) -> Captions | None:
    """Return the captions of the images, or None if there are none or the user selected others.

    Raises UserError if captions are damaged, or if many images have none.
    """
    is_asked = isinstance(images.captions, CaptionFiles)
    chooses_captions = any(field_of(change).startswith("data.captions") for change in changes)
    if chooses_captions and not is_asked:
        return None
    name = images.captions.name if isinstance(images.captions, CaptionFiles) else AUTO
    try:
        texts = captions_of(rows, name, is_new=True)
    except NoCaptionsError:
        if is_asked:
            raise
        return None
    return Captions.from_images(texts)


def _caption_fields(captions: Captions, *, on_a_cpu: bool) -> dict[str, Any]:
    """Return the overrides for a network that is conditioned on these captions."""
    longest = max(len(text.encode()) for text in captions.texts)
    length = min(_MAX_CAPTION_BYTES, longest + 1)  # including the end token
    texts = {**_CAPTION_ENCODER, "tokenizer": {"kind": "tokens", "length": length}}
    fields: dict[str, Any] = {"data.captions": {"kind": "files"}}
    if on_a_cpu:
        fields["net"] = {**_CPU_CAPTION_NET, "texts": texts}
    else:
        fields["net.texts"] = texts
    return fields


def _latent_fields(place: str, images: Images, side: int, changes: Sequence[str]) -> dict[str, Any]:
    """Return the overrides of `my-images-64` for the images at `place`, whose classes are counted.

    The name of the latent cache contains a hash of everything that the latents depend on.
    """
    latents = load_recipe(IMAGES_LATENTS_RECIPE).data
    assert isinstance(latents, Latents)
    if not sets_field(changes, "data.side"):
        images = images.model_copy(update={"side": _round_side(side, latents.images.side)})
    ledger = images.ledger()
    assert ledger is not None, "the images are on this machine"
    encoded_as = (images.side, images.crop, images.flip, images.labels, images.names, images.split, images.count)
    key = digest.short(ledger.fingerprint(), str(encoded_as), latents.codec.digest() or "")
    fields: dict[str, Any] = {
        "data.root": f"{LATENTS_FOLDER}/{folder_of_images(place).name}-{key}",
        "data.images.root": place,
        "data.images.side": images.side,
    }
    if images.labels > 1:
        fields |= _CLASS_FIELDS
    return fields


def _as_changes(fields: dict[str, Any]) -> list[str]:
    """Convert fields to overrides a.b=c."""
    return [f"{field}={yaml_text(value)}" for field, value in fields.items()]
