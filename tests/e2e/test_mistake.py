"""What a person types who comes from another tool, or mistypes: the line that answers it, before torch is imported.

All rows run in one new process, since torch stays imported once it is. Some run alone, too: the first word of a process
meets modules that the others have imported.
"""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dumo.io import trained
from e2e.shell import tree
from forked import ENVIRONMENT

# Typed, and what must be said. The exit code is 2, nothing is written, and torch is not imported.
MISTAKES = {
    # settings
    "train digits --steps 100": "there is no option --steps: here it is --set train.steps=...",
    "train digits --set steps=100": "steps: unknown key; here it is train.steps",
    "train digits --set train.stepz=100": "train.stepz: unknown key; did you mean 'steps'?",
    "train digits --set train.steps 100": "--set train.steps: write it as a.b=c, --set train.steps=100",
    "train digits train.steps=100": "to set a field write --set train.steps=100",
    "train digits --set train.steps=-5": "train.steps: input should be greater than or equal to 1; got -5",
    "train digits --set objective=meanflow": "write objective.kind=meanflow",
    "train digits --set net.kind=unet2": "net.kind: there is no 'unet2'; did you mean 'unet'?",
    "train digits --set lr=1e-4": "lr: unknown key; here it is train.optimizer.lr (of a step",
    "train digits --set start=runs/digits-trained": "write start.source=runs/digits-trained",
    "train digits --epochs 3": "here it is --set train.steps=... (steps: epochs times images over train.batch)",
    "train digits --lr 1e-4": "here it is --set train.optimizer.lr=... (of a step",
    "train digits --batch-size 64": "here it is --set train.batch=...",
    "train digits --widht 64": "here it is --set net.width=...",
    "sample digits-trained --set tain.steps=7": "tain: unknown key; did you mean 'train'?",
    # options
    "train digits --gpus 2": "here it is torchrun --nproc-per-node N -m dumo train",
    "train digits --device gpu": "there is no device 'gpu': here it is cuda",
    "train digits --fp16": "here it is --set train.precision=bf16",
    "train digits --minutes 5": "--minutes is for a folder of images, or to go on with a run's folder",
    "train digits --out afile": "afile is a file: name a folder",
    "train --config my.yaml": "here it is dumo train FILE",
    "train --data photos": "here it is dumo train FOLDER",
    "train --resume runs/digits": "here it is the same command again",
    "train digits --outt x": "there is no option --outt: did you mean --out?",
    "sample digits-trained --steps 4": "there is no option --steps: here it is --nfe (passes through the net",
    "sample digits-trained --num-images 4": "here it is --count",
    "sample digits-trained --cfg 3": "here it is --set sample.guide.scale=... (1 is none)",
    "sample digits-trained --output out.png": "here it is --out (a folder)",
    "sample digits-trained --checkpoint last": "here it is --weights",
    "sample digits-trained --labels cat": "there is no label 'cat': labels run from 0 to 9",
    "sample digits-trained --prompt cat": "this run was trained without captions, so it reads no prompts",
    "sample digits-trained --count -3": "Invalid value for '--count'",
    "sample digits-trained --nfe 0": "nfe = 0 is no number of passes for a sample: ask for 1 to 100,000",
    "sample digits-trained --nfe four": "'four' is no list of whole numbers such as 1,2,4",
    "sample digits-trained --solver ddim": "there is no --solver 'ddim'; valid: euler, heun",
    "sample digits-trained --format png": "valid: grid, images, npz",
    "export digits-trained out --to onnx": "valid: diffusers, lora, comfyui, safetensors",
    "train digits --track tensorbord": "did you mean 'tensorboard'?",
    # sources
    "train": "Missing argument",
    "train dgits": "there is no recipe, file or run's folder 'dgits'; did you mean 'digits'",
    "train phots": "did you mean 'photos'?",
    "train photos.zip": "photos.zip is an archive: unpack it, and give its folder",
    "train one.png": "one.png is one image: give the folder that it is in",
    "train https://example.org/photos.zip": "is an address, and dumo reads folders and files of this machine",
    "train stabilityai/sdxl": "stabilityai/sdxl is no folder here. If it is a model on the Hugging Face hub, fetch",
    "train missing.yaml": "there is no recipe, file or run's folder 'missing.yaml'",
    "train empty": "empty has neither a run.yaml nor images",
    "train texts": "texts has neither a run.yaml nor images",
    "dry dgits": "did you mean 'digits'",
    "encode nothing": "there is no recipe, file or run's folder 'nothing'",
    # runs
    "sample nothing": "nothing is no run's folder (it is not there): train one first",
    "sample digits-traind": "did you mean 'runs/digits-trained'?",
    "sample digits": "digits is no run's folder (it is a recipe): train it first, dumo train digits",
    "sample afile": "afile is no run's folder (it is a file)",
    "sample empty": "empty is no run's folder (it has no run.yaml)",
    "sample photos": "photos is no run's folder (it holds images, and no run.yaml): train on them first",
    "evaluate": "name a run's folder",
    "evaluate runs/nothing": "runs/nothing is no run's folder (it is not there): train one first",
    "evaluate --images photos --against photos --out empty": "empty is a folder: name a file",
    "evaluate --images photos --against photos --out .": ". is a folder: name a file",
    "average runs/digits-trained --std 0.1 --out empty": "empty is a folder: name a file",
    "evaluate photos": "judge them, dumo evaluate --images photos",
    "compare nothing other": "there is no run's folder or evaluation nothing",
    "compare texts": "texts has no evaluation.json: run dumo evaluate texts first",
    "report nothing": "nothing is no run's folder",
    # commands
    "generate digits-trained": "there is no command 'generate': here it is dumo sample",
    "list": "there is no command 'list': here it is dumo recipes",
    "version": "there is no command 'version': here it is dumo --version",
    "-v": "there is no option -v: here it is dumo --version",
    "help": "there is no command 'help': here it is dumo --help",
    "traim digits": "there is no command 'traim': did you mean 'train'?",
    "digits": "there is no command 'digits': it is a recipe, dumo train digits",
    "data cifar": "there is no data set or model 'cifar'; did you mean 'cifar10'?",
    "average runs/digits-trained": "Missing option '--std'",
    "doctor --gpu": "there is no option --gpu: here it is --device cuda",
    "demo --share": "here it is an ssh tunnel, which dumo demo prints",
    "reproduce fig9": "there is no figure or table 'fig9'",
}
ALONE = ["train digits --set steps=100", "train phots", "sample nothing", "sample digits-trained --labels cat", "-v"]
PROGRAM = """
import contextlib, io, json, sys
from dumo import cli
answers = {}
for typed, words in json.loads(sys.argv[1]).items():
    sys.argv = ["dumo", *words]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    answers[typed] = [code, out.getvalue(), err.getvalue(), "torch" in sys.modules]
print(json.dumps(answers))
"""


def answers(mistakes: list[str], folder: Path) -> dict[str, Any]:
    """The exit code, stdout and stderr of each, and whether torch is imported after it, in one process."""
    words = {typed: shlex.split(typed) for typed in mistakes}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(words)],
        env={**ENVIRONMENT, "COLUMNS": "200"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a person has one who begins: photos, other files, a run."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("photos", "empty", "texts", "runs"):
        (folder / name).mkdir()
    Image.new("RGB", (8, 8)).save(folder / "photos/a.png")
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    (folder / "photos.zip").write_bytes(b"PK\3\4")
    (folder / "texts/a.txt").write_text("a cat")
    (folder / "afile").write_text("x")
    shutil.copytree(trained.folder("digits-trained"), folder / "runs/digits-trained")
    return folder


@pytest.fixture(scope="module")
def answered(desk: Path) -> Mapping[str, Any]:
    """The answers to all mistakes. Nothing may be written by any."""
    before = tree(desk)
    found = answers([*MISTAKES], desk)
    assert tree(desk) == before
    return found


@pytest.mark.parametrize(("typed", "said"), MISTAKES.items(), ids=[*MISTAKES])
def test_a_mistake_has_its_line_without_torch(typed: str, said: str, answered: Mapping[str, Any]) -> None:
    code, out, err, has_torch = answered[typed]
    assert (code, out) == (2, "")
    flat = " ".join(err.replace("│", " ").split())
    assert said in flat
    assert flat.startswith(("error: ", "Usage: "))
    assert not has_torch


@pytest.mark.slow
@pytest.mark.parametrize("typed", ALONE)
def test_in_a_process_of_its_own_too(typed: str, desk: Path) -> None:
    ((code, out, err, has_torch),) = answers([typed], desk).values()
    assert (code, out, has_torch) == (2, "", False)
    assert MISTAKES[typed] in err


@pytest.mark.slow
def test_a_command_that_is_right_imports_torch(desk: Path) -> None:
    """Else the rows above would show nothing."""
    ((code, _, err, has_torch),) = answers(["sample digits-trained --count 1 --nfe 1 --out new"], desk).values()
    assert (code, has_torch) == (0, True), err
    shutil.rmtree(desk / "new")
