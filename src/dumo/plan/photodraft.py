"""A recipe for some images, and the fields in it that fit the images and the machine.

`draft_of_files` is the entrance for images in files. It

1. looks at them (`dumo.plan.photolook`), and at their captions (`dumo.plan.photocaptions`),
2. decides whether they are learned in latents or pixels (`dumo.plan.photolatents`), at what size, and by what net.

`draft_of_memory` is the entrance for images in memory. Before they are encoded it writes them to a file, so that other
processes have them. `Draft.run` is the run that is meant, to which `dumo.plan.proposal` adds how long it trains.

The recipe `my-images` is for a GPU, and trains on one as it is. A CPU learns photos in latents by `my-images-64`; where
the autoencoder does not suit them, a small U-Net learns small images in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dumo.config.change import override, sets_field, yaml_text
from dumo.config.load import RUN_FILE, load_recipe, parse
from dumo.config.source import IMAGES_LATENTS_RECIPE, IMAGES_RECIPE, settings_of_images
from dumo.config.spec import Run
from dumo.data import Images, Memory, cache, is_latents
from dumo.data.archive import PngImages, write_archive
from dumo.data.memory import RereadData
from dumo.data.pixel import ToSquare
from dumo.plan import photolatents
from dumo.plan.photocaptions import choose_captions
from dumo.plan.photolook import ImagesFound, look_at
from dumo.runtime import threads
from dumo.runtime.door import settings
from dumo.runtime.limits import GIGABYTE
from dumo.runtime.progress import Bar, ignore_line
from dumo.types import UserError

_MIN_SIDE_IN_PIXELS = 16  # of images that are learned in pixels: ours
_SIDE_STEP = 8  # pixels of which their side is a multiple, since nets halve it several times
_MAX_SIDES = {"cpu": 32, "cuda": 64}  # pixels, by device: ours
_CPU_FIELDS = {"train.batch": 32, "train.precision": "fp32", "train.compile": "none"}
# Ours, for pixels: 0.7 M parameters, a quarter of a second for a step of 32 rows on two cores. In the same time on 150
# photos a DiT of 1.3 M made mosaics, further from the photos (kernel distance 1.9, this one 1.2; docs/log.md).
_CPU_NET = {"kind": "unet", "width": 16, "multipliers": [1, 2, 4], "depth": 1, "time_scale": 10.0}
# Of latents whose images have classes: ours, as dumo-best-latents; without classes there is nothing to guide towards.
_CLASS_FIELDS = {"objective.drop": 0.1, "objective.guide.zeta": 0.55}


@dataclass(frozen=True)
class Draft:
    """A recipe, and the fields in it that fit some images and the machine."""

    images: ImagesFound
    recipe: str = IMAGES_RECIPE
    fields: dict[str, Any] = field(default_factory=dict)
    prepare_seconds: float = 0.0  # until all images are decoded, if they fit in memory, and encoded where they are
    load_seconds: float = 0.0  # to decode an image, where that is done at each visit
    captions: str = ""  # a line on captions that exist and are not read, and why; "" where there are none
    space: str = ""  # a line on whether they are learned in latents or pixels, and why; "" where it is not chosen

    def run(self, fields: dict[str, Any], sets: Sequence[str]) -> Run:
        """The recipe with its fields, these, and the user's own changes `sets`, which count most."""
        texts = [f"{name}={yaml_text(value)}" for name, value in (self.fields | fields).items()]
        tree = load_recipe(self.recipe, texts).model_dump(mode="json")
        override(tree, settings_of_images(tree, sets))
        return parse(Run, tree)


def draft_of_memory(
    data: Memory, device: torch.device, sets: Sequence[str], training_seconds: float | None, bar: Bar
) -> Draft:
    """Look at images in memory, and choose a recipe and fields for them. The arguments are those of `draft_of_files`.

    Writes them to a file in the folder of latents where they are learned in latents.
    """
    images_found = ImagesFound(data.open().size, headers=0, bad=0, side=min(data.shape[1:]))
    fields = {"data": data.model_dump(mode="json"), **_machine_fields(device, data.shape[-1])}
    pixels_draft = Draft(images_found, fields=fields)
    if device.type != "cpu":
        return pixels_draft
    latents_draft = _latents_draft_of_memory(data, sets, training_seconds, bar)
    if isinstance(latents_draft, Draft):
        return latents_draft
    return replace(pixels_draft, space=f"pixels: {latents_draft}")


def draft_of_files(
    images: Images,
    place: str | None,
    device: torch.device,
    sets: Sequence[str],
    training_seconds: float | None,
    bar: Bar,
) -> Draft:
    """Look at files of images, and choose a recipe and fields for them.

    `place` is where the user says that they are; None: `sets` alone, the user's own changes, say it.
    `training_seconds` None: it ends by steps. Raises UserError where there are no images, captions are damaged, or the
    package that reads captions is not installed.
    """
    on_a_cpu = device.type == "cpu"
    try:
        store = images.unlabelled_store()
    except UserError as error:
        raise UserError(f"{images.root} is taken for a place of images, for it has no {RUN_FILE}: {error}") from error
    images_found = look_at(store, ToSquare(images.side, images.crop), bar)
    pixels_draft = _pixels_draft(images_found, images, place, device, sets)

    # captions, which a net in pixels reads
    captions = choose_captions(images, store, sets, on_a_cpu=on_a_cpu)
    if captions.fields:
        space = "pixels: captions are read there" if on_a_cpu else ""
        return replace(pixels_draft, fields=pixels_draft.fields | captions.fields, space=space)

    # latents, or pixels
    draft = pixels_draft
    if on_a_cpu and place:
        latents_draft: Draft | str = photolatents.reason_by_choice(sets)
        if not latents_draft:
            encodable = _Encodable(images, images_found, place, pixels_kind=images.kind)
            latents_draft = _latents_draft(encodable, sets, training_seconds, bar)
        if isinstance(latents_draft, Draft):
            draft = latents_draft
        else:
            draft = replace(pixels_draft, space=f"pixels: {latents_draft}")
    return replace(draft, captions=captions.line)


def _machine_fields(device: torch.device, side: int) -> dict[str, Any]:
    """Fields for a device, and images of this side: those of a smaller net on a CPU; {} on a GPU."""
    if device.type != "cpu":
        return {}
    return {**_CPU_FIELDS, "net": {**_CPU_NET, "attend": [side // 4]}}


def _pixels_draft(
    images_found: ImagesFound, images: Images, place: str | None, device: torch.device, sets: Sequence[str]
) -> Draft:
    """The recipe and fields for images that are learned in pixels.

    The arguments but `images_found` are those of `draft_of_files`.
    """
    side = _side_in_pixels(images_found.side, _MAX_SIDES.get(device.type, _MAX_SIDES["cuda"]))
    fields: dict[str, Any] = {"data.root": place} if place else {}
    trained_side = images.side if sets_field(sets, "data.side") else side
    fields |= {"data.side": side, **_machine_fields(device, trained_side)}
    if images_found.count * 3 * trained_side**2 <= images.memory * GIGABYTE:  # else decoded at each visit
        return Draft(images_found, IMAGES_RECIPE, fields, prepare_seconds=images_found.decode_seconds)
    return Draft(images_found, IMAGES_RECIPE, fields, load_seconds=images_found.load_seconds)


def _side_in_pixels(shorter_side: float, max_side: int) -> int:
    """The pixels of a side to train at: those of the images' shorter side, within bounds."""
    return max(_MIN_SIDE_IN_PIXELS, min(max_side, int(shorter_side) // _SIDE_STEP * _SIDE_STEP))


@dataclass(frozen=True)
class _Encodable:
    """Images that may be learned in latents."""

    images: Images
    found: ImagesFound
    place: str  # a folder or file
    pixels_kind: str  # `data.kind` of these images in pixels
    write: Callable[[], None] | None = None  # writes them to their place; None: they are there, where the user has them

    @property
    def users_place(self) -> str | None:
        """Where the user has them; None: in memory."""
        return self.place if self.write is None else None


def _latents_draft_of_memory(
    data: Memory, sets: Sequence[str], training_seconds: float | None, bar: Bar
) -> Draft | str:
    """The recipe and fields for images in memory that are learned in latents; or why they are not, in words."""
    reason = photolatents.reason_by_choice(sets)
    if reason:
        return reason
    source = data.open()
    if isinstance(source, RereadData):
        return "rows are others at each read, and latents are made once"
    height, width = data.shape[1:]
    if height != width:
        return f"images of {height} x {width} pixels are not square, and would be cut"
    reason = photolatents.reason_by_side(height)
    if reason:
        return reason

    # as images of a file that is not written yet
    place = photolatents.place_in_memory(data)
    fields: dict[str, Any] = {"data.root": place, "data.classes": data.classes}
    if len(data.names) == data.classes and not sets_field(sets, "data.classes"):
        fields["data.titles"] = list(data.names)
    settings_of_data = [f"{name}={yaml_text(value)}" for name, value in fields.items()]
    settings_of_data += [text for text in sets if text.startswith("data.")]
    images = load_recipe(IMAGES_RECIPE, settings_of_data).data
    assert isinstance(images, Images), "the user's changes set no other kind"
    pngs = PngImages(source.x)
    labels = source.c if data.classes else None

    def write_once() -> None:
        if not Path(place).exists():
            write_archive(Path(place), pngs, labels, bar)

    images_found = look_at(pngs, ToSquare(images.side, images.crop), bar)
    encodable = _Encodable(images, images_found, place, pixels_kind=data.kind, write=write_once)
    return _latents_draft(encodable, sets, training_seconds, bar)


def _latents_draft(encodable: _Encodable, sets: Sequence[str], training_seconds: float | None, bar: Bar) -> Draft | str:
    """The recipe and fields for images that are learned in latents; or why they are learned in pixels, in words."""
    images = encodable.images
    images_found = encodable.found
    reason = photolatents.reason_by_settings(images, sets)
    if reason:
        return reason
    latents = load_recipe(IMAGES_LATENTS_RECIPE).data
    assert is_latents(latents)
    side = images.side
    if not sets_field(sets, "data.side") and images.crop != "none":
        side = photolatents.side_of_latents(images_found.side, latents.images.side)
    reason = photolatents.reason_by_side(images_found.side)
    if reason:
        return reason
    to_pixels = ToSquare(side, images.crop)
    pixels = torch.stack([to_pixels(data) for data in images_found.decodable])
    reason = photolatents.reason_by_colours(pixels, encodable.users_place)
    if reason:
        return reason

    # what the autoencoder makes of them, and how long it takes
    codec = latents.codec.open("cpu")
    with bar("trying the autoencoder", 1) as tick, threads.fewer_when_busy(torch.device("cpu"), ignore_line):
        trial = photolatents.try_autoencoder(codec, pixels)
        tick(1, "")
    reason = photolatents.reason_by_reconstruction(trial, encodable.users_place)
    if reason:
        return reason

    # whether there is time to encode them, unless that is done
    encode_seconds = images_found.readable * trial.encode_seconds * (2 if images.flip else 1)
    prepare_seconds = images_found.decode_seconds + encode_seconds
    reason = photolatents.reason_by_time(prepare_seconds, training_seconds)
    if reason and not photolatents.has_caches(encodable.place):
        return reason
    if encodable.write:
        encodable.write()
    encoded_images = images.model_copy(update={"side": side}).with_facts()
    cache_folder = photolatents.cache_folder(encodable.place, encoded_images, codec)
    if cache.is_finished(Path(cache_folder)):
        prepare_seconds = 0.0
    elif reason:
        return reason

    fields: dict[str, Any] = {
        "data.root": cache_folder,
        "data.images.root": encodable.place,
        "data.images.side": side,
    }
    if encodable.write:  # the file has no names, and may lack images of the last classes
        fields |= {"data.images.classes": images.classes, "data.images.titles": list(images.titles)}
    if encoded_images.labels > 1:
        fields |= _CLASS_FIELDS
    line = f"latents by {latents.codec.kind}, which changes these images by {trial.error_text}; in pixels by "
    line += settings(f"data.kind={encodable.pixels_kind}")
    return Draft(images_found, IMAGES_LATENTS_RECIPE, fields, prepare_seconds=prepare_seconds, space=line)
