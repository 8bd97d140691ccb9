"""Small trained runs that many tests only read."""

from pathlib import Path

import pytest

from e2e.shell import TINY
from tiny import TinyRuns

RECIPES = ("digits", "digits-flow-matching", "digits-meanflow", "moons")


@pytest.fixture(scope="session")
def trained(tiny_runs: TinyRuns, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's folder for each of `RECIPES`: to be read, not written to."""
    folder, fields = tmp_path_factory.mktemp("trained"), (*TINY, "train.log_every=5", "train.save_every=10")
    return {name: tiny_runs.copy(folder / name, name, *fields) for name in RECIPES}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
