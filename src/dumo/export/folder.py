"""A folder that stock diffusers opens: `DiffusionPipeline.from_pretrained(OUT)`.

transformer/       the model, with one head in the place of its last layer
scheduler/         of a flow map, one that adds fresh noise between two passes; of a velocity, the source's own
vae/ ...           the other parts of the pipeline that the model came from, if it came from one
model_index.json   which parts there are
codes.safetensors  what stands for classes, where the model was tuned on none but them
README.md          the model card
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch

from dumo.data import Latents
from dumo.encoders.autoencoder import numbers, same, words
from dumo.export import card, scheduler
from dumo.export.model import INDEX, Exported
from dumo.io.read import read_json, write_json
from dumo.types import UserError

TRANSFORMER, SECOND, VAE = "transformer", "transformer_2", "vae"
Parts = Literal["copy", "link", "none"]
PARTS: tuple[Parts, ...] = get_args(Parts)
ANOTHER = "take another copy of the pipeline"


def write(exported: Exported, out: Path, out_name: str, *, parts: Parts = "copy", dtype: str = "float32") -> None:
    """Write the folder `out`, which is there and empty, and will be called `out_name`.

    The source's other parts are copied, linked to, or left out. Raises UserError where no stock pipeline runs the
    model, or the source's decoder reads other latents than the run has.
    """
    stock, source = exported.stock, exported.source
    if stock is None:
        raise UserError(
            f"no stock pipeline runs a {exported.kind} as this run's net is called: take --to safetensors, and call "
            "the model yourself"
        )
    index: dict[str, Any] = indexed(source) if source else {"_class_name": stock.pipeline}
    if source and parts != "none":
        fits(exported, source)
    exported.model(dtype).save_pretrained(out / TRANSFORMER)
    index[TRANSFORMER] = ["diffusers", exported.kind]
    if exported.head == "u":
        index["scheduler"] = scheduler.write(out / scheduler.FOLDER, stock, exported.solver)
    elif source:
        bring(source / scheduler.FOLDER, out / scheduler.FOLDER, "copy")
    else:
        index["scheduler"] = scheduler.plain(out / scheduler.FOLDER)
    for name in others(index):
        if source and parts != "none":
            bring(source / name, out / name, parts)
        else:
            del index[name]
    write_json(out / INDEX, index)
    if codes := exported.codes:
        safetensors.torch.save_file(codes, out / card.CODED, {"format": "pt"})
    (out / "README.md").write_text(card.of_pipeline(exported, stock, index, out_name), encoding="utf-8")


def indexed(source: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline. Raises UserError for one that is none, or has two transformers."""
    index = read_json(source / INDEX, ANOTHER)
    if not isinstance(index, dict):
        raise UserError(f"{source / INDEX} is no pipeline: {ANOTHER}")
    if (index.get(SECOND) or [None])[0] is not None:
        raise UserError(
            f"{source} has a {SECOND}, which was not tuned, and would make some of the passes: take --to safetensors"
        )
    return index


def others(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline beside model and scheduler."""
    there = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    return [name for name in there if name not in (TRANSFORMER, scheduler.FOLDER)]


def bring(part: Path, to: Path, how: Parts) -> None:
    """Copy a part, or link to it where it lies now. Raises UserError where it is missing."""
    if not part.is_dir():
        raise UserError(f"net.source: {part} is missing, and {INDEX} has it: {ANOTHER}")
    if how == "link":
        to.symlink_to(part.resolve(), target_is_directory=True)
    else:
        shutil.copytree(part, to)


def fits(exported: Exported, source: Path) -> None:
    """Raise UserError where the pipeline's decoder takes latents of another shift or scale than the run's."""
    data, file = exported.opened.run.data, source / VAE / "config.json"
    if not isinstance(data, Latents) or not file.is_file():
        return
    theirs = numbers(read_json(file, ANOTHER))
    if not same(theirs, data.codec.published):
        raise UserError(
            f"data.codec is {data.codec.about}, and the decoder in {source} takes latents of {words(theirs)}: its "
            "images would differ. Train with its codec, or export with --parts none"
        )
