"""Files that were changed and still look whole are refused by name, or change nothing (docs/guarantees.md)."""

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from e2e import harm
from e2e.harm import Harm
from tiers import tiered

pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # dumo says what it passes over
ALL = [*harm.cases()]
FIRST = [*{case.artifact: case for case in reversed(ALL)}.values()]  # of each artifact


def name(case: Harm) -> str:
    """Of a test."""
    return f"{case.artifact}-{case.damage}-{'-'.join(case.words[:2])}".replace(" ", "_")


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `furnish` makes, and a copy of it."""
    house = tmp_path_factory.mktemp("house") / "given"
    house.mkdir()
    with pytest.MonkeyPatch.context() as here:
        here.chdir(house)
        harm.furnish()
    return house


@pytest.fixture
def given(house: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """The furnished folder, at the place where it was made; put back afterwards."""
    spare = house.with_name("spare")
    if not spare.exists():
        shutil.copytree(house, spare)
    monkeypatch.chdir(house)
    yield house
    harm.restore(house, spare)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("case", tiered(ALL, ci=FIRST, id=name))
def test_every_harm(case: Harm) -> None:
    harm.meet(case)
