"""What the command line and `import dumo` refuse: the input, the name in the message, the exit code or exception."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import dumo
from dumo.cli.api import LoadedRun
from e2e.shell import call, tree

REFUSALS = [
    # Options that would otherwise be ignored.
    ("sample digits-trained --labels 3 --prompt cat", "--prompt", 2),
    ("sample digits-trained --source a.png", "--source", 2),
    ("sample digits-trained --format geneval", "--prompts", 2),
    ("sample digits-trained --format dpg --prompts prompts.txt --count 3", "--count", 2),
    ("sample digits-trained --checkpoints all --solver heun", "--checkpoints", 2),
    ("evaluate digits-trained --images photos", "--images", 2),
    ("evaluate digits-trained --protocol photos", "--protocol", 2),
    ("report digits-trained --out a.png", "--out", 2),
    # Values that are read as something else.
    ("sample digits-trained --nfe 1,,2", "--nfe", 2),
    ("sample digits-trained --nfe 0", "nfe = 0", 2),
    ("sample digits-trained --labels 10", "'10'", 2),
    ("sample digits-trained --labels ''", "''", 2),
    # What typer, torch and the packages below refuse, in one line.
    ("sample digits-trained --format gif", "'gif'", 2),
    ("sample digits-trained --count 0", "--count", 2),
    ("sample digits-trained --solver huen", "'huen'", 2),
    ("sample digits-trained --device tpu9", "'tpu9'", 2),
    ("sample digits-trained --weights no.safetensors", "no.safetensors", 2),
    ("sample digits-trained --checkpoints 5", "step 5", 2),
    ("sample digits-trained --prompt cat", "captions", 2),
    ("train digits --out afile", "afile", 2),
    ("train digits train.stepz=100", "train.steps", 2),
    ("train digits training.steps=100", "train.steps", 2),
    ("train digits --steps 100", "steps=VALUE", 2),
    ("train digits --train_batch_size=4", "train.batch=VALUE", 2),
    ("train --learning_rate=1e-4 digits", "dumo train --help", 2),
    ("train digits 500", "field=value", 2),
    ("evaluate --images images train.steps=3", "train", 2),
    ("train digits train.steps=many", "train.steps", 2),
    ("train dgits", "'dgits'", 2),
    ("train broken.yaml", "broken.yaml", 2),
    ("sample nothing", "nothing", 2),
    ("evaluate --images nothing", "nothing", 2),
    ("export digits-trained --out out --to onnx", "'onnx'", 2),
    ("compare nothing other", "nothing", 2),
    ("evaluate", "--images", 2),
    ("train", "source", 2),
    ("traim digits", "'traim'", 2),
]


@pytest.mark.parametrize(("typed", "name", "code"), REFUSALS, ids=[typed for typed, _, _ in REFUSALS])
def test_it_is_refused_and_nothing_is_written(
    typed: str, name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("afile").touch()
    Path("broken.yaml").write_text("train: {steps: 3")
    Path("prompts.txt").write_text("a cat\n")
    Path("images").mkdir()
    Image.new("RGB", (16, 16)).save("images/a.png")
    before = tree(tmp_path)
    done = call(*shlex.split(typed))
    assert (done.code, done.out) == (code, "")
    assert name in done.err
    assert tree(tmp_path) == before


NOISE = torch.zeros(2, 1, 8, 8)
# Called with digits-trained.
API_REFUSALS: list[tuple[Callable[[LoadedRun], object], str, type[Exception]]] = [
    # Arguments that would otherwise be ignored.
    (lambda run: run.sample([3], prompts="a cat"), "prompts", dumo.UserError),
    (lambda run: run.sample(source="x.png"), "source", dumo.UserError),
    (lambda run: run.sample(generator=torch.Generator(), seed=1), "seed", dumo.UserError),
    (lambda run: run.sample(count=3, noise=NOISE), "count", dumo.UserError),
    (lambda run: run.sample([1, 2, 3], count=2), "labels", dumo.UserError),
    (lambda run: run.sample([]), "labels", dumo.UserError),
    (lambda run: dumo.train(run.spec), "out=", dumo.UserError),
    (lambda run: dumo.train([1], data=[1]), "data=", dumo.UserError),
    # Values that torch would broadcast or wrap around.
    (lambda run: run.sample(noise=NOISE[:, 0]), "noise", dumo.UserError),
    (lambda run: run.sample([3, 12]), "12", dumo.UserError),
    (lambda run: run.sample(-1), "-1", dumo.UserError),
    (lambda run: run.make_samples(torch.tensor([0, 12]), nfe=1), "12", dumo.UserError),
    (lambda run: run.make_samples(torch.tensor([-1]), nfe=1), "-1", dumo.UserError),
    # What Python and the packages below refuse.
    (lambda run: run.sample("12"), "'12'", dumo.UserError),
    (lambda run: run.sample([1.5]), "", TypeError),  # types are checked in tests before operator.index names the float
    (lambda run: run.sample(nfe=[1, 2]), "list", TypeError),
    (lambda run: run.sample(seed="1"), "str", TypeError),
    (lambda run: run.sample(guidance=-1), "guidance", dumo.UserError),
    (lambda run: run.sample(output="jpg"), "'jpg'", dumo.UserError),
    (lambda run: run.sample(num_inference_steps=1), "num_inference_steps", TypeError),
    (lambda run: dumo.load("nowhere"), "nowhere", dumo.UserError),
    (lambda run: dumo.load(run.folder, device="gpu"), "'gpu'", dumo.UserError),
    (lambda run: dumo.recipe("digits", {"train.stps": 3}), "train.stps", dumo.UserError),
    (lambda run: dumo.recipe("digits", {"train.steps": object()}), "train.steps", dumo.UserError),
    (lambda run: dumo.recipe(run.spec, {"train.steps": "x"}), "train.steps", dumo.UserError),
]


@pytest.fixture(scope="module")
def run() -> LoadedRun:
    """A run that ships with dumo."""
    return dumo.load("digits-trained", device="cpu")


@pytest.mark.parametrize(("ask", "name", "exception"), API_REFUSALS)
def test_an_argument_is_refused(
    ask: Callable[[LoadedRun], object],
    name: str,
    exception: type[Exception],
    run: LoadedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(exception) as raised:
        ask(run)
    assert name in str(raised.value)
    assert not [*tmp_path.iterdir()]
