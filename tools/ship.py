"""Make a trained run one that comes with dumo (`dumo.run.shipped`): python tools/ship.py runs/digits digits-trained.

The order of events:

1. Open the run, and its evaluation.json, which must be of the same step: `dumo evaluate` comes before.
2. Write a new folder among dumo's own runs: run.yaml without paths of this machine, for latents the autoencoder and its
   licence, the weights that samples are made with, in float16, their manifest, the log, of `LOG_ROWS` rows at most, and
   a README.md with the scores; where the data do not come with dumo, features of the images that the evaluation
   compares with (`STORED`).
3. Print the largest change of a weight by the rounding.
4. Evaluate what is shipped, without the data, as a user's machine has it, and add that evaluation.json.

The folder of step 2 is written whole or not at all.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file

from dumo.config.load import RUN_FILE, dump
from dumo.config.place import EVALUATION_FILE, LOG_FILE
from dumo.config.spec import Run
from dumo.data.latents import Latents
from dumo.encoders.classifier import cifar10
from dumo.encoders.codec import FIELD
from dumo.evaluation import stored
from dumo.evaluation.measures import features_of
from dumo.evaluation.stored import StoredFeatures
from dumo.io.file import atomic_write
from dumo.io.read import user_path
from dumo.io.trained import SHIPPED_PREFIX
from dumo.io.trained import folder as trained_folder
from dumo.lab.table import main_score_of_names
from dumo.run.judge import reference_data
from dumo.run.resolve import as_given, resolve
from dumo.run.weights import RunFolder, open_run
from dumo.training import log, manifest
from dumo.types import UserError

LOG_ROWS = 200  # of a log that is shipped, at most: 60 kB. Ours
PASSES = "1,2,4"  # that the shipped evaluation has
STORED = {"cifar10-features": "CIFAR-10's 10,000 test images"}  # the images of a reference, by the protocol

CARD = """# {name}

{about}. It comes with dumo: `dumo sample {name}`, `dumo demo {name}`, or `dumo.load("{name}")` in Python.

- Trained by `dumo train {recipe}`: {step:,} steps on {data}.
- Weights: {weights}, in float16; they were trained in float32. SHA-256 {sha256}.
- `dumo evaluate`, before the weights were rounded: {results}. `evaluation.json` is of the rounded weights.
- Licence: Apache-2.0, as dumo.{licence}
"""
DATA_LICENCES = {  # by the kind of data
    "digits": " The digits are UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), CC BY 4.0.",
    "latents": " Images: CIFAR-10 (Krizhevsky 2009). Decoder: [taef2](https://github.com/madebyollin/taesd), MIT, "
    "[its notice](LICENSE.taef2).",
}


def ship(run_folder: Path, name: str) -> None:
    """Write the folder NAME among dumo's own runs. Raises UserError where the run's last step is not evaluated."""
    opened = open_run(str(run_folder), device="cpu")
    results = read_results(opened)
    weights = load_file(opened.file)
    half_weights = {key: x.half() for key, x in weights.items()}
    with atomic_write(trained_folder(name)) as folder:
        checkpoint = folder / "checkpoints" / opened.checkpoint.path.name
        checkpoint.mkdir(parents=True)
        shutil.copy(run_folder / "data.json", folder)

        # the run, in its folder and in its checkpoint's
        codec_weights = ""
        if isinstance(opened.run.data, Latents):
            codec_weights = f"{SHIPPED_PREFIX}{name}/{copy_autoencoder(opened.run.data.codec.weights, folder)}"
        text = dump(portable_run(opened.run, codec_weights))
        (folder / RUN_FILE).write_text(text, encoding="utf-8")
        (checkpoint / manifest.RUN).write_text(text, encoding="utf-8")

        # the weights, and the manifest that lists them
        weights_file = checkpoint / opened.file.name
        save_file(half_weights, weights_file)
        files = manifest.file_entries(checkpoint, [checkpoint / manifest.RUN, weights_file])
        manifest.write(checkpoint, opened.checkpoint.manifest.model_copy(update={"files": files, "log": None}))

        # what its evaluation and its log need
        write_log(run_folder, folder)
        write_reference(opened, folder)

        # the card
        text = card_text(opened, name, results, sha256=files[weights_file.name].sha256)
        (folder / "README.md").write_text(text, encoding="utf-8")
    largest_change = max(float((half_weights[key].float() - x).abs().max()) for key, x in weights.items())
    print(f"{trained_folder(name)}: the largest change of a weight is {largest_change:.2g}")
    write_evaluation(name)


def write_log(run_folder: Path, folder: Path) -> None:
    """Write rows of the run's log, evenly spaced, the last among them, into the folder that is shipped."""
    rows = log.read_log(run_folder / LOG_FILE)
    step = -(-len(rows) // LOG_ROWS)
    for row in rows[::-1][::step][::-1]:
        log.append(folder / LOG_FILE, row)


def write_reference(opened: RunFolder, folder: Path) -> None:
    """Write the features of the images that the run's evaluation compares with, where dumo does not bring these."""
    evaluation = opened.run.evaluate
    images = STORED.get(evaluation.protocol.kind)
    if images is None:
        return
    reference = reference_data(opened.run.data, evaluation.split)
    assert reference.size is not None, "images are finite"
    x, c = reference.reference(reference.size, evaluation.seed)
    features = StoredFeatures.of(features_of(x), c, images=images, features_sha256=cifar10.sha256)
    features.save(folder / stored.FILE)


def write_evaluation(name: str) -> None:
    """Evaluate what is shipped in an empty folder, without the data, and put the report into the shipped folder."""
    environment = {key: value for key, value in os.environ.items() if key != "DUMO_DATA"}
    with TemporaryDirectory() as here:
        words = [sys.executable, "-m", "dumo", "evaluate", name, "--nfe", PASSES]
        subprocess.run(words, cwd=here, env=environment, check=True)
        shutil.copy(Path(here, name, EVALUATION_FILE), trained_folder(name))


def read_results(opened: RunFolder) -> list[dict[str, float]]:
    """The scores of a run's evaluation.json, a row for each number of passes.

    Raises UserError where there is none, or it is of another step than the weights.
    """
    file = opened.folder / "evaluation.json"
    evaluate_first = f"run dumo evaluate {opened.folder} first"
    if not file.exists():
        raise UserError(f"{file} is not there: {evaluate_first}")
    evaluation = json.loads(file.read_text(encoding="utf-8"))
    if evaluation["step"] != opened.step:
        raise UserError(f"{file} is of step {evaluation['step']}, and the weights of {opened.step}: {evaluate_first}")
    return evaluation["results"]


def copy_autoencoder(weights: str, folder: Path) -> str:
    """Copy an autoencoder's file of weights and its licence into a folder. Returns the name of the file there.

    The autoencoder may be that of the model that is shipped now, next to which its licence has this name, too.
    """
    file = user_path(weights, FIELD)
    licence_name = f"LICENSE.{file.stem}"
    licence = file.with_name(licence_name)
    if not licence.is_file():
        licence = file.with_name("LICENSE")
    shutil.copyfile(file, folder / file.name)
    shutil.copyfile(licence, folder / licence_name)
    return file.name


def portable_run(run: Run, codec_weights: str) -> Run:
    """The run without paths of this machine; of latents with `codec_weights` as the place of its autoencoder."""
    portable = as_given(resolve(run))  # with what the data call their classes
    if not isinstance(run.data, Latents):
        return portable
    codec = run.data.codec.model_copy(update={"weights": codec_weights})
    return portable.model_copy(update={"data": portable.data.model_copy(update={"codec": codec})})


def card_text(opened: RunFolder, name: str, results: list[dict[str, float]], *, sha256: str) -> str:
    """The README.md of the run called `name`. Its folder must be called as the recipe that it was trained by.

    `sha256` is that of the weights in float16.
    """
    score = main_score_of_names([*results[0]])
    scores = [f"`{score}` {row[score]:.3g} at {row['nfe']} NFE" for row in results]
    return CARD.format(
        name=name,
        about=opened.run.about,
        recipe=opened.folder.name,  # which `dumo train RECIPE` gives it
        step=opened.step,
        data=opened.run.data.kind,
        weights=f"{sum(p.numel() for p in opened.net.parameters()):,}",
        sha256=sha256,
        results=", ".join(scores),
        licence=DATA_LICENCES.get(opened.run.data.kind, ""),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a trained run one that comes with dumo.")
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    try:
        ship(options.run, options.name)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
