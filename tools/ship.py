"""Make a trained run one that ships with dumo (`dumo.run.read_only`): python tools/ship.py runs/digits digits-trained.

Run `dumo evaluate` on the run first: its scores go on the card. Then complete the card by hand with the licences of the
data and of a decoder.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from dumo.config.place import EVALUATION_FILE
from dumo.encoders.classifier import cifar10
from dumo.evaluation import stored
from dumo.evaluation.measures import features_of
from dumo.evaluation.stored import StoredFeatures
from dumo.export.write import export
from dumo.io import run_places
from dumo.run.judge import reference_data
from dumo.run.weights import load_run

# The images of a reference that does not ship with dumo, by the protocol's kind.
REFERENCE_IMAGES = {"cifar10-features": "CIFAR-10's 10,000 test images"}


def ship(run_folder: str, name: str) -> None:
    """Export the run to the folder NAME among those that ship with dumo, and evaluate it there."""
    # Export the weights in half precision.
    run = load_run(run_folder, device="cpu")
    folder = export(run, run_places.folder(name), dtype="float16", name=name)

    # Store the features of the images that an evaluation compares with, if these do not ship with dumo.
    evaluation = run.spec.evaluate
    images = REFERENCE_IMAGES.get(evaluation.protocol.kind)
    if images is not None:
        reference = reference_data(run.spec.data, evaluation.split)
        assert reference.size is not None
        x, c = reference.reference(reference.size, evaluation.seed)
        features = StoredFeatures.of(features_of(x), c, images=images, features_sha256=cifar10.sha256)
        features.save(folder / stored.FILE)

    # Evaluate the rounded weights as a user's machine does, without the data.
    environment = {key: value for key, value in os.environ.items() if key != "DUMO_DATA"}
    with TemporaryDirectory() as here:
        command = [sys.executable, "-m", "dumo", "evaluate", name, "--nfe", "1,2,4"]
        subprocess.run(command, cwd=here, env=environment, check=True)
        [report] = Path(here, name).glob("evaluation*.json")
        shutil.copy(report, folder / EVALUATION_FILE)


if __name__ == "__main__":
    ship(*sys.argv[1:])
