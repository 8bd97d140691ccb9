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
OF_DATA = {
    "digits": " The digits are UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), CC BY 4.0.",
    "latents": " Images: CIFAR-10 (Krizhevsky 2009). Decoder: [taef2](https://github.com/madebyollin/taesd), MIT, "
    "[its notice](LICENSE.taef2).",
}


def ship(run: Path, name: str) -> None:
    """Write the folder."""
    opened = open_run(str(run), device="cpu")
    with atomic_write(HERE / name) as half:
        place = half / "checkpoints" / opened.checkpoint.name
        place.mkdir(parents=True)
        shutil.copy(run / "data.json", half)
        said = dump(portable(opened.run, half, name))
        for file in (half / FILE, place / manifest.RUN):
            file.write_text(said, encoding="utf-8")
        weights = load_file(opened.file)
        rounded = {key: x.half() for key, x in weights.items()}
        save_file(rounded, file := place / opened.file.name)
        about = opened.checkpoint.manifest
        kept = manifest.listed(place, [place / manifest.RUN, file])
        manifest.write(place, about.model_copy(update={"files": kept, "log": None}))
        (half / "README.md").write_text(card(opened, name, kept[file.name].sha256), encoding="utf-8")
    far = max(float((rounded[key].float() - x).abs().max()) for key, x in weights.items())
    print(f"{HERE / name}: the largest change of a weight is {far:.2g}")


def portable(run: Run, folder: Path, name: str) -> Run:
    """A run without paths of this machine; an autoencoder is copied into the folder, and found where that is opened."""
    there = as_given(run)
    if not isinstance(run.data, Latents):
        return there
    weights = user_path(run.data.codec.weights, FIELD)
    shutil.copyfile(weights, folder / weights.name)
    shutil.copyfile(weights.parent / "LICENSE", folder / f"LICENSE.{weights.stem}")
    own = run.data.codec.model_copy(update={"weights": f"runs/{name}/{weights.name}"})
    return there.model_copy(update={"data": there.data.model_copy(update={"codec": own})})


def card(opened: RunFolder, name: str, sha256: str) -> str:
    """Its README.md, with the numbers of the run's last evaluation."""
    found = json.loads((opened.folder / "evaluation.json").read_text(encoding="utf-8"))
    assert found["step"] == opened.step, "evaluate the run first"
    score = leading_score([*found["results"][0]])
    rows = [f"`{score}` {row[score]:.3g} at {row['nfe']} NFE" for row in found["results"]]
    return CARD.format(
        name=name,
        about=opened.run.about,
        version=opened.checkpoint.manifest.versions["dumo"],
        recipe=opened.folder.name,
        step=opened.step,
        data=opened.run.data.kind,
        weights=f"{sum(p.numel() for p in opened.net.parameters()):,}",
        sha256=sha256,
        results=", ".join(rows),
        licence=OF_DATA.get(opened.run.data.kind, ""),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a trained run one that comes with dumo.")
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    words = parser.parse_args()
    ship(words.run, words.name)
