"""Small trained runs that many tests only read."""

from pathlib import Path

import pytest

from dumo.run.plan import machine
from e2e.shell import TINY, call, sets

RECIPES = ("digits", "digits-flow-matching", "digits-meanflow", "moons")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's folder for each of `RECIPES`: to be read, not written to."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {name: folder / name for name in RECIPES}
    for name, run in runs.items():
        done = call("train", name, "--out", run, *TINY, *sets("train.log_every=5", "train.save_every=10"))
        assert done.code == 0, done
        assert done.out == ""
    return runs


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dumo doctor` does not try torch.compile, which takes half a minute: one test of it does."""
    monkeypatch.setattr(machine, "compiler", lambda here: machine.Finding("torch.compile", "ok", "works"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
