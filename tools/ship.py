"""Make a trained run one that comes with dumo (`dumo.run.shipped`): python tools/ship.py runs/digits digits-trained.

It takes the weights that the run shows, in float16 (the largest change of a weight is printed), what describes the run,
the autoencoder of latents with its licence, and the last evaluation, of which its README.md has the numbers.
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from dumo.config.load import FILE, dump
from dumo.config.spec import Run
from dumo.data.latents import Latents
from dumo.encoders.codec import FIELD
from dumo.io.file import atomic_write
from dumo.io.read import user_path
from dumo.lab.cell import leading_score
from dumo.run.resolve import as_given
from dumo.run.shipped import HERE
from dumo.run.weights import RunFolder, open_run
from dumo.training import manifest

CARD = """# {name}

{about}. It comes with dumo {version}: `dumo sample {name}`, `dumo demo {name}`, or `dumo.load("{name}")` in Python.

- Trained by `dumo train {recipe}`: {step:,} steps on {data}.
- Weights: {weights}, in float16; they were trained in float32. SHA-256 {sha256}.
- `dumo evaluate`, before the weights were rounded: {results}.
- Licence: Apache-2.0, as dumo.{licence}
"""
DATA_LICENCES = {  # by the kind of data
    "digits": " The digits are UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), CC BY 4.0.",
    "latents": " Images: CIFAR-10 (Krizhevsky 2009). Decoder: [taef2](https://github.com/madebyollin/taesd), MIT, "
    "[its notice](LICENSE.taef2).",
}


def ship(run: Path, name: str) -> None:
    """Write the folder NAME among dumo's own runs, of the run in the folder `run`, which must be evaluated."""
    opened = open_run(str(run), device="cpu")
    weights = load_file(opened.file)
    half_weights = {key: x.half() for key, x in weights.items()}
    with atomic_write(HERE / name) as folder:
        checkpoint = folder / "checkpoints" / opened.checkpoint.name
        checkpoint.mkdir(parents=True)
        shutil.copy(run / "data.json", folder)

        # the run, in its folder and in its checkpoint's
        text = dump(portable_run(opened.run, folder, name))
        (folder / FILE).write_text(text, encoding="utf-8")
        (checkpoint / manifest.RUN).write_text(text, encoding="utf-8")

        # the weights, and the manifest that lists them
        weights_file = checkpoint / opened.file.name
        save_file(half_weights, weights_file)
        files = manifest.listed(checkpoint, [checkpoint / manifest.RUN, weights_file])
        manifest.write(checkpoint, opened.checkpoint.manifest.model_copy(update={"files": files, "log": None}))

        (folder / "README.md").write_text(card_text(opened, name, files[weights_file.name].sha256), encoding="utf-8")
    largest_change = max(float((half_weights[key].float() - x).abs().max()) for key, x in weights.items())
    print(f"{HERE / name}: the largest change of a weight is {largest_change:.2g}")


def portable_run(run: Run, folder: Path, name: str) -> Run:
    """The run without paths of this machine. An autoencoder is copied into the folder, and named where it is found."""
    portable = as_given(run)
    if not isinstance(run.data, Latents):
        return portable
    weights = user_path(run.data.codec.weights, FIELD)
    shutil.copyfile(weights, folder / weights.name)
    shutil.copyfile(weights.parent / "LICENSE", folder / f"LICENSE.{weights.stem}")
    codec = run.data.codec.model_copy(update={"weights": f"runs/{name}/{weights.name}"})
    return portable.model_copy(update={"data": portable.data.model_copy(update={"codec": codec})})


def card_text(opened: RunFolder, name: str, sha256: str) -> str:
    """The run's README.md, with the scores of its last evaluation; `sha256` is that of the weights."""
    evaluation = json.loads((opened.folder / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["step"] == opened.step, "evaluate the run first"
    score = leading_score([*evaluation["results"][0]])
    results = [f"`{score}` {row[score]:.3g} at {row['nfe']} NFE" for row in evaluation["results"]]
    return CARD.format(
        name=name,
        about=opened.run.about,
        version=opened.checkpoint.manifest.versions["dumo"],
        recipe=opened.folder.name,
        step=opened.step,
        data=opened.run.data.kind,
        weights=f"{sum(p.numel() for p in opened.net.parameters()):,}",
        sha256=sha256,
        results=", ".join(results),
        licence=DATA_LICENCES.get(opened.run.data.kind, ""),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a trained run one that comes with dumo.")
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    ship(options.run, options.name)
