"""A folder that stock diffusers opens: `DiffusionPipeline.from_pretrained(OUT)`.

transformer/       the model, with one head instead of its last layer
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

from dumo.data import Data, Latents
from dumo.encoders.autoencoder import numbers, same, words
from dumo.export import card
from dumo.export.model import INDEX, SCHEDULER, Exported, require, write_euler, write_scheduler
from dumo.io.read import read_json, write_json
from dumo.types import UserError

TRANSFORMER, SECOND, VAE = "transformer", "transformer_2", "vae"
Parts = Literal["copy", "link", "none"]
PARTS: tuple[Parts, ...] = get_args(Parts)
ANOTHER = "take another copy of the pipeline"


def write(
    exported: Exported,
    made: card.Provenance,
    out: Path,
    out_name: str,
    *,
    parts: Parts = "copy",
    dtype: str = "float32",
) -> None:
    """Write the folder `out`, which is there and empty, and will be called `out_name`.

    The source's other parts are copied, linked to, or left out. Raises UserError where no stock pipeline runs the
    model, or the source's decoder reads other latents than the run has.
    """
    stock, source = require(exported), exported.source
    index: dict[str, Any] = read_index(source) if source else {"_class_name": stock.pipeline}
    if source and parts != "none":
        fits(exported.sampler.data, source)
    exported.model(dtype).save_pretrained(out / TRANSFORMER)
    index[TRANSFORMER] = ["diffusers", exported.kind]
    if exported.head == "u":
        index[SCHEDULER] = write_scheduler(out / SCHEDULER, stock, exported.solver)
    elif source:
        bring(source / SCHEDULER, out / SCHEDULER, "copy")
    else:
        index[SCHEDULER] = write_euler(out / SCHEDULER)
    for name in others(index):
        if source and parts != "none":
            bring(source / name, out / name, parts)
        else:
            del index[name]
    write_json(out / INDEX, index)
    if codes := exported.codes:
        safetensors.torch.save_file(codes, out / card.CODED, {"format": "pt"})
    (out / "README.md").write_text(card.of_pipeline(exported, made, stock, index, out_name), encoding="utf-8")


def read_index(source: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline. Raises UserError for one that is none, or has two transformers."""
    index = read_json(source / INDEX, ANOTHER)
    if not isinstance(index, dict) or (index.get(SECOND) or [None])[0] is not None:
        raise UserError(
            f"{source} is no pipeline of one transformer: {ANOTHER}; or, of two, {SECOND} was not tuned and would make "
            "some of the passes: take --to safetensors"
        )
    return index


def others(index: Mapping[str, Any]) -> list[str]:
    """The parts of a pipeline other than model and scheduler."""
    there = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    return [name for name in there if name not in (TRANSFORMER, SCHEDULER)]


def bring(part: Path, to: Path, how: Parts) -> None:
    """Copy a part, or link to it where it lies now. Raises UserError where it is missing."""
    if not part.is_dir():
        raise UserError(f"net.source: {part} is missing, and {INDEX} has it: {ANOTHER}")
    if how == "link":
        to.symlink_to(part.resolve(), target_is_directory=True)
    else:
        shutil.copytree(part, to)


def fits(data: Data, source: Path) -> None:
    """Raise UserError where the pipeline's decoder takes latents of another shift or scale than the data's."""
    file = source / VAE / "config.json"
    if not isinstance(data, Latents) or not file.is_file():
        return
    theirs = numbers(read_json(file, ANOTHER))
    if not same(theirs, data.codec.published):
        raise UserError(
            f"data.codec is {data.codec.about}, and the decoder in {source} takes latents of {words(theirs)}: its "
            "images would differ. Train with its codec, or export with --parts none"
        )
