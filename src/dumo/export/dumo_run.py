"""Export a run with a network from dumo or from the user as a folder that `dumo.load` opens.

run.yaml            the run, without local paths, and metadata of its data
model.safetensors   the weights for sampling
README.md           the model card
pipeline.py         with model_index.json: a custom diffusers pipeline, which calls dumo
"""

import shutil
from pathlib import Path

import torch

from dumo.config.code import names_code
from dumo.config.difference import config_hash
from dumo.config.load import RUN_FILE, dump
from dumo.config.source import HASH_KEY
from dumo.export import model_card
from dumo.io.read import write_json
from dumo.io.tensor_files import unshared, write_weights
from dumo.run.folder import EXPORTED_WEIGHTS
from dumo.run.resolve import without_paths
from dumo.run.trained import TrainedRun
from dumo.training.frozen import trained_state_dict

_PIPELINE = Path(__file__).parent / "shipped" / "pipeline.py"


def write(trained: TrainedRun, provenance: model_card.Provenance, out: Path, name: str, *, dtype: str) -> None:
    """Write the run into the empty folder `out`, which will be called `name`; weights are rounded to `dtype`."""
    # Write the run, and the weights for sampling.
    run = without_paths(trained.spec)
    (out / RUN_FILE).write_text(dump(run, {HASH_KEY: config_hash(run)}), encoding="utf-8")
    weights = unshared(trained_state_dict(trained.net))
    for weight_name, weight in weights.items():
        if weight.is_floating_point():
            weights[weight_name] = weight.to(getattr(torch, dtype))
    write_weights(out / EXPORTED_WEIGHTS, weights, kind="export", step=trained.step, run=config_hash(run))

    # Write the model card, and the diffusers pipeline, which only supports images and no user code.
    has_pipeline = trained.makes_images and not names_code(run)
    if has_pipeline:
        shutil.copy(_PIPELINE, out)
        write_json(out / "model_index.json", {"_class_name": [_PIPELINE.stem, "DumoPipeline"]})
    text = model_card.own_card(trained, provenance, name, dtype=dtype, has_pipeline=has_pipeline)
    (out / "README.md").write_text(text, encoding="utf-8")
