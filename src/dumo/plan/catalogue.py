"""What recipes and protocols need in addition to the package: what it is, its source, how to fetch it, if it is here.

`CATALOGUE` has the items, `find` gives one by name, and `describe` says what is known of it, here and now: which of its
files exist (`_state_of`), and which recipes need it (`recipes_needing`). Nothing is fetched.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dumo.config import recipes
from dumo.config.source import SHIPPED_PREFIX, read
from dumo.config.suggestion import require_known
from dumo.encoders import inception
from dumo.encoders.autoencoder import DcAe, SdVae
from dumo.encoders.part import DIFFUSERS_FILE
from dumo.encoders.pipeline import Pipeline
from dumo.evaluation.reference import IMAGENET_TRAIN_IMAGES, STANDARDS
from dumo.io.hub import PUBLISHED
from dumo.io.read import user_path
from dumo.io.yaml import dump_yaml
from dumo.runtime import install_command
from dumo.types import UserError

_HUB = "hub:"  # begins a place that is a file in the cache of the Hugging Face hub's client: owner/model/file
CIFAR = "https://huggingface.co/datasets/uoft-cs/cifar10/resolve/main/plain_text/"
PARQUET = "{}-00000-of-00001.parquet"  # the file of a split of CIFAR-10
_SD_VAE = SdVae().weights
_DC_AE = DcAe().weights
_ADM_URLS = [standard.url for standard in STANDARDS.values() if standard.url]
_EXPORT_DATA = "export DUMO_DATA=${DUMO_DATA:-$PWD/data}   # a folder here, if it is not set"


@dataclass(frozen=True)
class Item:
    """Something to be fetched. `dumo data --json` prints its fields."""

    name: str
    what: str  # a description
    source: str  # an official address
    get: tuple[str, ...]  # the commands that fetch it
    # Files or folders that recipes read, which may hold $NAMES of environment variables. "A or B": one of them will do.
    places: tuple[str, ...]
    layout: str  # how its files must lie
    mark: str = ""  # texts, with | between them: a recipe that contains one needs the item


@dataclass(frozen=True)
class PlaceState:
    """A file or folder of an item, or one of several, as it is here and now."""

    place: str
    state: str  # there; or why it is not


@dataclass(frozen=True)
class DescribedItem:
    """An item of the catalogue, and what is known of it here and now."""

    item: Item
    recipes: list[str]  # that need it
    places: list[PlaceState]

    @property
    def is_there(self) -> bool | None:
        """Whether all its places are there; None of an item without places."""
        return all(place.state == "there" for place in self.places) if self.places else None

    def to_json(self) -> dict[str, Any]:
        """The item's fields, with `recipes`, its places with their states as `looked`, and `there`."""
        looked = [asdict(place) for place in self.places]
        return {**asdict(self.item), "recipes": self.recipes, "looked": looked, "there": self.is_there}


CATALOGUE = (
    Item(
        name="my-images",
        what="your own images: class folders, a flat folder, parquet, or webdataset shards",
        source="your camera",
        get=("export MY_IMAGES=/path/to/photos   # or  --set data.root=DIR,  in latents  --set data.images.root=DIR",),
        places=("$MY_IMAGES",),
        layout="photos/cats/*.jpg photos/dogs/*.png: a folder is a class; a flat folder has none",
        mark="$MY_IMAGES",
    ),
    Item(
        name="pretrained",
        what="a published flow transformer of 2 to 20 B parameters, with its autoencoder and text encoders",
        source="https://huggingface.co, for SD3 and FLUX.1 with an account",
        get=(
            f"{install_command('pretrained')} && export PRETRAINED=DIR   # and one of",
            *(Pipeline(source=name).download_command().replace("DIR", "$PRETRAINED") for name in PUBLISHED),
        ),
        places=(
            "$PRETRAINED/model_index.json",
            "$PRETRAINED/transformer/config.json or $PRETRAINED/unet/config.json",
            "$PRETRAINED/vae/config.json",
        ),
        layout="a pipeline as diffusers saves it: a folder for each of its parts; to train: --set pipeline=$PRETRAINED",
        mark="$PRETRAINED|kind: diffusers",
    ),
    Item(
        name="few-steps",
        what="a few-step LoRA run, under the adapters for a subject (recipe personal)",
        source="dumo train sd3-lora",
        get=("export FEW_STEPS=$PWD/runs/sd3-lora",),
        places=("$FEW_STEPS/run.yaml",),
        layout="a run's folder, of sd3-lora, flux-lora, sdxl-lora or another LoRA",
        mark="$FEW_STEPS",
    ),
    Item(
        name="cifar10",
        what="50,000 and 10,000 images of 32x32 in 10 classes (Krizhevsky 2009)",
        source="https://www.cs.toronto.edu/~kriz/cifar.html, on the hub as uoft-cs/cifar10",
        get=(
            _EXPORT_DATA,
            "mkdir -p $DUMO_DATA/cifar10",
            *(f"curl -Lo $DUMO_DATA/cifar10/{PARQUET.format(s)} {CIFAR}{PARQUET.format(s)}" for s in ("train", "test")),
        ),
        places=tuple(f"$DUMO_DATA/cifar10/{PARQUET.format(split)}" for split in ("train", "test")),
        layout="parquet with a column of images {bytes, path} and a column label, 0 to 9",
        mark="$DUMO_DATA/cifar10",
    ),
    Item(
        name="imagenet",
        what=f"ImageNet-1k's training set, {IMAGENET_TRAIN_IMAGES:,} images in 1,000 classes",
        source="https://image-net.org/download.php, with an account: ILSVRC2012_img_train.tar, 138 GB",
        get=(
            "export IMAGENET=${IMAGENET:-$PWD/imagenet}   # a folder here, if it is not set",
            "mkdir -p $IMAGENET/train && tar -xf ILSVRC2012_img_train.tar -C $IMAGENET/train && cd $IMAGENET/train",
            'for f in *.tar; do mkdir "${f%.tar}" && tar -xf "$f" -C "${f%.tar}" && rm "$f"; done',
        ),
        places=("$IMAGENET/train",),
        layout=(
            "$IMAGENET/train/n01440764/*.JPEG ...: 1,000 folders; latents are written to $DUMO_LATENTS by dumo encode"
        ),
        mark="$IMAGENET",
    ),
    Item(
        name="imagenet-sample",
        what="1,000 photographs, one of each class of ImageNet, for a small run",
        source="https://github.com/EliSchwartz/imagenet-sample-images",
        get=(
            _EXPORT_DATA,
            "git clone https://github.com/EliSchwartz/imagenet-sample-images $DUMO_DATA/imagenet-sample",
        ),
        places=("$DUMO_DATA/imagenet-sample",),
        layout="image files in a folder, or parquet",
        mark="$DUMO_DATA/imagenet-sample",
    ),
    Item(
        name="sd-vae",
        what="the autoencoder of Stable Diffusion 1, fine-tuned (ft-ema), for latents of ImageNet",
        source=f"https://huggingface.co/{_SD_VAE}",
        get=(
            install_command("diffusers"),
            f"hf download {_SD_VAE} config.json {DIFFUSERS_FILE}   # else dumo encode fetches it",
        ),
        places=(f"{_HUB}{_SD_VAE}/{DIFFUSERS_FILE}",),
        layout=(
            f"a folder with config.json and {DIFFUSERS_FILE}, or the hub's own cache; set data.codec.weights to the "
            "folder"
        ),
        mark=_SD_VAE,
    ),
    Item(
        name="dc-ae",
        what="the deep-compression autoencoder f32c32 (Chen et al. 2024), for latents of ImageNet at 512",
        source=f"https://huggingface.co/{_DC_AE}",
        get=(
            install_command("diffusers"),
            f"hf download {_DC_AE} config.json {DIFFUSERS_FILE}   # else dumo encode fetches it",
        ),
        places=(f"{_HUB}{_DC_AE}/{DIFFUSERS_FILE}",),
        layout=(
            f"as sd-vae; the variants mix and sana are {DcAe(variant='mix').weights} and {DcAe(variant='sana').weights}"
        ),
        mark=_DC_AE,
    ),
    Item(
        name="inception",
        what="the Inception network of 2015 that a FID is measured by",
        source=inception.URL,
        get=(
            f"curl -LO {inception.URL}",
            inception.CONVERT_COMMAND,
            f"export {inception.VARIABLE}=$PWD/inception.safetensors",
        ),
        places=(f"${inception.VARIABLE}",),
        layout=f"one file, made of the published one, whose sha256 is {inception.SHA256}",
        mark="frechet:",
    ),
    Item(
        name="adm",
        what="ADM's reference statistics of ImageNet, which a FID at 256 or 512 is measured against",
        source="https://github.com/openai/guided-diffusion/tree/main/evaluations",
        get=(*(f"curl -LO {url}" for url in _ADM_URLS), "export DUMO_ADM=$PWD"),
        places=tuple(f"$DUMO_ADM/{Path(url).name}" for url in _ADM_URLS),
        layout="the files as they are published: one of 256 pixels a side, one of 512",
        mark="kind: adm-",
    ),
)


def find(name: str) -> Item:
    """The item of this name. Raises UserError where there is none."""
    known = {item.name: item for item in CATALOGUE}
    require_known("data set or model", name, known)
    return known[name]


def describe(item: Item) -> DescribedItem:
    """Look for an item's places, and for the recipes that need it."""
    places: list[PlaceState] = []
    for place in item.places:
        states = [_state_of(alternative) for alternative in place.split(" or ")]
        places.append(PlaceState(place, "there" if "there" in states else states[0]))
    return DescribedItem(item, list(recipes_needing(item)), places)


def _state_of(place: str) -> str:
    """'there', or why a place is not: its variable is not set, or its path is missing."""
    if place.startswith(_HUB):
        return _state_in_hub_cache(place.removeprefix(_HUB))
    try:
        path = user_path(place, place)
    except UserError:
        return "the variable is not set"
    return "there" if path.exists() else f"not there: {path}"


def recipes_needing(item: Item) -> Iterator[str]:
    """Yield the names of recipes that contain the item's mark, themselves or in their bases."""
    marks = item.mark.split("|") if item.mark else []
    for name in recipes.names():
        text = _text_with_bases(name)
        if any(mark in text for mark in marks):
            yield name


@cache
def _text_with_bases(recipe: str) -> str:
    """A recipe with all fields of its bases, as text."""
    return dump_yaml(read(f"{SHIPPED_PREFIX}{recipe}").tree)


def _state_in_hub_cache(file: str) -> str:
    """'there' if the cache of the hub's client has a file of a model, `owner/model/file`, or why it has not."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return f"not there: {install_command('diffusers')} first"
    owner, model, name = file.split("/")
    path = try_to_load_from_cache(f"{owner}/{model}", name)
    if isinstance(path, str) and Path(path).is_file():
        return "there"
    return "not there: not in the hub's cache"
