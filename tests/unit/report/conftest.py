"""Small trained runs that are sampled as the page samples them."""

from pathlib import Path

import pytest

from dumo.report.answer import Live
from dumo.run.config.load import load
from dumo.run.folder import open_run
from dumo.run.train import train

TINY = ["net.width=16", "net.depth=1", "train.batch=16", "train.steps=5", "train.optimizer.lr=0.02"]


def trained(folder: Path, recipe: str, *more: str) -> Live:
    """A run of a recipe, made small."""
    train(load(recipe, [*TINY, *more]), folder)
    return Live(open_run(str(folder), device="cpu").sampler)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """DuMo, which jumps and has a velocity."""
    return trained(tmp_path_factory.mktemp("demo") / "digits", "digits")


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """Flow matching by Heun's steps, two passes each: no jumps, and no single pass."""
    folder = tmp_path_factory.mktemp("demo") / "flow"
    return trained(folder, "digits-flow-matching", "sample.solver.kind=heun", "sample.nfe=[2]", "evaluate.nfe=[2]")


@pytest.fixture(scope="session")
def moons(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """Points."""
    return trained(tmp_path_factory.mktemp("demo") / "moons", "moons")


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """Digits by captions, with a small encoder."""
    folder = tmp_path_factory.mktemp("demo")
    return trained(folder / "words", "digits-words", f"net.texts.root={folder}/ids")
