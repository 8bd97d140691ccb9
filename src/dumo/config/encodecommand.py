"""The commands that make what a run reads and `dumo encode` makes, for messages that it is missing.

`encode_command` is that of a cache of latents. It names the recipe of dumo's whose cache lies at the place, else the
folder of images. It then sets what these latents have otherwise than that would make: the pipeline, and fields of the
images and the codec.

`encode_texts_command` is that of a table of texts. It sets what the texts have otherwise than the recipe, too.
`naming_encode_command` puts it into the error of a table that is missing.
"""

import os
import shlex
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dumo.config import recipes
from dumo.config.change import yaml_text
from dumo.config.load import load_recipe
from dumo.config.place import RUNS_FOLDER
from dumo.config.source import parse_recipe
from dumo.data import Data, is_latents
from dumo.data.caption import Templates
from dumo.error import UserError
from dumo.io.read import user_path
from dumo.nets.textfamily import has_table
from dumo.runtime.door import settings, shell_settings

if TYPE_CHECKING:
    from dumo.config.spec import Run
    from dumo.data import Latents
    from dumo.nets.table import TableTexts

_PLACES = ("root", "weights", "source")  # fields of images, codecs and texts that say where something lies
# fields of images that have an option, that files tell, or that change no latent
_OTHER_FIELDS = {"kind", "count", "classes", "names", "titles", "memory"}
# fields of texts that change no table
_OTHER_TEXT_FIELDS = {"identity", "memory"}


def encode_command(data: "Latents") -> str:
    """The command that makes the cache of these latents.

    It has no settings where the codec is a pipeline's and no recipe is known.
    """
    recipe = _recipe_of_cache(data.root)
    if recipe is not None:
        words = ["dumo", "encode", recipe]
        settings = _settings_over_recipe(data, recipe)
    elif data.codec.kind == "pipeline":
        words = ["dumo", "encode"]
        settings = []
    else:
        words = _words_with_folder(data)
        settings = _settings_over_folder(data)
    if data.images.count:
        words += ["--count", str(data.images.count)]
    command = shlex.join(words)
    return f"{command} {shell_settings(*settings)}" if settings else command


def encode_texts_command(data: Data, texts: "TableTexts", *, in_other_folder: bool = False) -> str:
    """The command that makes the table of these data's captions, and their latents where those are missing, too.

    It is in words where no recipe of dumo's has its cache at the place of the latents, and texts of this kind.
    `in_other_folder`: the table is made in a folder DIR.
    """
    if in_other_folder:
        texts = texts.model_copy(update={"root": "DIR"})
    if is_latents(data):
        recipe = _recipe_of_cache(data.root)
        recipe_run = _run_of_recipe(recipe) if recipe else None
        recipe_texts = recipe_run.net.texts if recipe_run else None
        if has_table(recipe_texts) and recipe_texts.kind == texts.kind:
            settings = [*_text_settings(texts, recipe_texts)]
            command = encode_command(data)
            return f"{command} {shell_settings(*settings)}" if settings else command
    command = "dumo encode with this recipe and its settings"
    return f"{command}, and --set net.texts.root=DIR" if in_other_folder else command


@contextmanager
def naming_encode_command(data: Data, texts: object) -> Generator[None, None, None]:
    """Put the whole command that makes a table of texts into the error inside that there is none."""
    if not has_table(texts):
        yield
        return
    from dumo.encoders.texttable import NoTableError

    try:
        yield
    except NoTableError as error:
        command = encode_texts_command(data, texts, in_other_folder=error.is_occupied)
        message = f"{error.text}, {command}"
        if not error.is_occupied:
            message += f", or say where they are by {settings('net.texts.root=DIR')}"
        raise UserError(message) from error


def _text_settings(texts: "TableTexts", recipe_texts: "TableTexts") -> Iterator[str]:
    """What texts have otherwise than the recipe's, of what their table depends on."""
    fields = texts.model_dump(mode="json", exclude=_OTHER_TEXT_FIELDS)
    recipe_fields = recipe_texts.model_dump(mode="json", exclude=_OTHER_TEXT_FIELDS)
    encoder = fields.pop("encoder", {})
    recipe_encoder = recipe_fields.pop("encoder", {})
    yield from _changed_fields("net.texts", fields, recipe_fields)
    yield from _changed_fields("net.texts.encoder", encoder, recipe_encoder)


def _settings_over_recipe(data: "Latents", recipe: str) -> list[str]:
    """What these latents have otherwise than the recipe's."""
    settings = [*_pipeline_settings(data, recipe)]
    recipe_run = _run_of_recipe(recipe)
    if recipe_run is not None and is_latents(recipe_run.data):
        settings += _settings_over(data, recipe_run.data)
    return settings


def _words_with_folder(data: "Latents") -> list[str]:
    """The command that encodes a folder of images: its words, and the options that it has for these latents."""
    return [
        "dumo",
        "encode",
        data.images.root,
        data.root,
        "--codec",
        data.codec.kind,
        "--side",
        str(data.images.side),
    ]


def _settings_over_folder(data: "Latents") -> list[str]:
    """What these latents have otherwise than that command makes without settings."""
    images = type(data.images)(root=data.images.root, side=data.images.side, flip=True)
    made_without_settings = data.model_copy(update={"images": images, "codec": type(data.codec)()})
    return [*_settings_over(data, made_without_settings)]


def _recipe_of_cache(root: str) -> str | None:
    """The first of dumo's recipes whose cache of latents lies at a place, or at its path below the folder of a run."""
    for recipe in recipes.names():
        if Path(root).name not in recipes.text(recipe):  # to parse all takes long
            continue
        data = parse_recipe(recipe).get("data", {})
        recipe_root = data.get("root", "")
        is_in_runs = recipe_root.startswith(f"{RUNS_FOLDER}/")
        is_same_place = (is_in_runs and Path(root).match(recipe_root)) or _is_same_place(recipe_root, root)
        if is_same_place and data.get("kind") != "images":  # where the root is of images
            return recipe
    return None


def _run_of_recipe(recipe: str) -> "Run | None":
    """The run of a recipe; None where a variable names its base, and nothing lies there."""
    try:
        return load_recipe(recipe)
    except UserError:
        return None


def _pipeline_settings(data: "Latents", recipe: str) -> Iterator[str]:
    """The pipeline of the codec as a setting, where the recipe has one of its own."""
    from dumo.io.hub import PUBLISHED

    if data.codec.kind != "pipeline":
        return
    source = data.codec.pipeline.source
    if source in PUBLISHED:  # a name without weights
        yield "pipeline=$PRETRAINED"
    elif _says_pipeline(recipe):
        yield f"pipeline={yaml_text(source)}"


def _says_pipeline(recipe: str) -> bool:
    """Whether a recipe names a pipeline, itself or in the recipes that it is based on."""
    while recipe in recipes.names():
        tree = parse_recipe(recipe)
        if "source" in (tree.get("pipeline") or {}):
            return True
        recipe = str(tree.get("base"))
    return False


def _settings_over(data: "Latents", base: "Latents") -> Iterator[str]:
    """What latents have otherwise than others, the base, as settings of these."""
    if not _is_same_place(data.root, base.root):
        yield f"data.root={yaml_text(data.root)}"
    yield from _changed_fields("data.images", _image_fields(data), _image_fields(base))
    has_no_classes = data.images.names == () and not data.captions
    both_named = data.images.names is not None and base.images.names is not None
    if (has_no_classes or both_named) and data.classes != base.classes:
        yield f"data.images.classes={data.classes}"
    if data.codec.kind == base.codec.kind:
        yield from _changed_fields("data.codec", _codec_fields(data), _codec_fields(base))
    else:
        yield f"data.codec={yaml_text(_codec_fields(data))}"


def _changed_fields(name: str, fields: dict[str, Any], base: dict[str, Any]) -> Iterator[str]:
    """The fields of a part that differ from those of another, as settings."""
    for field in {**fields, **base}:
        value = fields.get(field)
        base_value = base.get(field)
        is_same = value == base_value
        if field in _PLACES:
            is_same = _is_same_place(str(value), str(base_value))
        if not is_same:
            yield f"{name}.{field}={yaml_text(value)}"


def _image_fields(data: "Latents") -> dict[str, Any]:
    """The fields of the images that say how they are encoded, as plain values."""
    fields = data.images.model_dump(mode="json")
    for name in _OTHER_FIELDS:
        fields.pop(name, None)
    if isinstance(data.captions, Templates):
        fields.pop("captions")  # a cache is by class
    elif data.captions:
        fields["captions"].pop("digest", None)  # which files tell, too
    return fields


def _codec_fields(data: "Latents") -> dict[str, Any]:
    """The fields of the codec, without the hash of its weights, as plain values."""
    return data.codec.model_dump(mode="json", exclude={"sha256"})


def _is_same_place(one: str, other: str) -> bool:
    """Whether two texts say the same place, with the values of variables."""
    try:
        return os.path.abspath(user_path(one, "")) == os.path.abspath(user_path(other, ""))
    except UserError:  # a variable is not set
        return one == other
