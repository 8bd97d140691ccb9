import shlex
import subprocess
import sys
from importlib import metadata

import numpy
import pytest

from dumo import runtime
from dumo.types import UserError


@pytest.mark.nightly
@pytest.mark.parametrize("extra", ["text", "pretrained"])
def test_the_line_runs_as_it_is_typed(extra: str) -> None:
    """What is there already needs no network."""
    shown = subprocess.run(f"{runtime.install_command(extra)} --no-index", shell=True, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "transformers" in shown.stdout
    assert "dumo" not in shlex.split(shown.args)


def test_the_line_is_for_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)  # another environment is active
    python = shlex.quote(sys.executable)
    assert runtime.install_command("text").startswith(f"{python} -m pip install ")
    monkeypatch.setattr(runtime, "installed_version", lambda name: None)
    command = runtime.install_command("text")
    assert command.startswith(f"uv pip install --python {python} ")
    assert "'transformers<" in command


def test_a_version_that_an_extra_does_not_allow_is_as_one_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy<99,>=98; extra == 'old'", "numpy; extra == 'new'"])
    with pytest.raises(UserError, match=rf"^net needs numpy<99,>=98 \({numpy.__version__} is installed\): .*install"):
        runtime.import_extra("numpy", "old", "net")
    assert runtime.import_extra("numpy", "new", "net") is numpy


def test_every_extra_of_the_project_has_packages() -> None:
    extras = runtime.packages_by_extra()
    assert {"demo", "diffusers", "pretrained", "text", "tensorboard", "trackio", "wandb"} <= extras.keys()
    assert all(extras.values())
