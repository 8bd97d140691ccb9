"""Files that were changed and still look whole are refused by name, or change nothing (docs/reliability.md)."""

import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from e2e import harm
from e2e.harm import End, Harm
from e2e.shell import call, files

pytestmark = pytest.mark.filterwarnings("default::UserWarning")  # dumo says what it passes over
ALL = [*harm.cases()]


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
    monkeypatch.undo()
    shutil.rmtree(house)
    shutil.copytree(spare, house)


ENDS: dict[tuple[str, ...], End] = {}  # of undisturbed commands


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=name)
def test_every_harm(case: Harm, given: Path) -> None:
    meet(case)


def meet(case: Harm) -> None:
    """Do the harm in the folder we are in, and see what the command makes of it."""
    if case.harmless and case.words not in ENDS:
        spare = Path.cwd().with_name("untouched")
        shutil.copytree(Path.cwd(), spare)
        assert call(*case.words).code == 0
        ENDS[case.words] = harm.end(case.words)
        for place in Path.cwd().iterdir():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        shutil.copytree(spare, Path.cwd(), dirs_exist_ok=True)
        shutil.rmtree(spare)
    case.do()
    before = standing()
    done = call(*case.words)
    assert "Traceback" not in done.err, done
    assert all(word in done.err for word in case.names), (case.names, done)
    if case.harmless:
        assert done.code == 0, done
        assert harm.end(case.words) == ENDS[case.words], done
    elif case.older:
        assert (done.code, "step-00000002" in done.err) == (0, True), done
    else:
        assert done.code == 2, done
        assert standing() == before, done


def standing() -> dict[str, bytes]:
    """Every file but hidden ones: notes on what was looked at."""
    return {name: data for name, data in files(Path.cwd()).items() if "/." not in name}
