"""What the command line refuses: the words typed, the name that the message contains, and the exit code."""

import shlex
from pathlib import Path

import pytest

from e2e.shell import call, tree

REFUSALS = [
    # Options that would otherwise be ignored.
    ("train digits --minutes 5", "--minutes", 2),
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
    ("train digits --set train.stepz=100", "train.stepz", 2),
    ("train digits --set train.steps=many", "train.steps", 2),
    ("train dgits", "'dgits'", 2),
    ("train broken.yaml", "broken.yaml", 2),
    ("sample nothing", "nothing", 2),
    ("evaluate --images nothing", "nothing", 2),
    ("export digits-trained out --to onnx", "'onnx'", 2),
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
    before = tree(tmp_path)
    done = call(*shlex.split(typed))
    assert (done.code, done.out) == (code, "")
    assert name in done.err
    assert tree(tmp_path) == before
