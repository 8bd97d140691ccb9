"""The wheel is all of dumo: installed outside the clone it trains, samples and judges, without a network."""

from pathlib import Path
from zipfile import ZipFile

import pytest

import release
from dumo.config import recipes
from fresh import ALONE, finished, made

ROOT = Path(__file__).parents[2]
WAY = """
import sys, dumo
assert "torch" not in sys.modules
run = dumo.load("runs/digits")
assert run.sample(labels=[3, 5]).shape == (2, 1, 8, 8)
print(run.evaluate(nfe=1)["results"][0]["fd"], run.report(), dumo.__file__)
"""

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, which twine finds good."""
    return release.build(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    source = ROOT / "src"
    files = {str(file.relative_to(source)) for file in (source / "dumo").rglob("*") if file.is_file()}
    with ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert found == {name for name in files if "__pycache__" not in name}
    assert {"dumo/recipes/digits.yaml", "dumo/report/report.html.j2", "dumo/encoders/digits.safetensors"} <= found


def test_a_wheel_works_outside_the_clone_without_a_network(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    venv = made(tmp_path / "venv")
    release.install(wheel, venv, tmp_path)
    assert finished(venv / "bin/dumo", "--version", cwd=tmp_path) == f"dumo {wheel.name.split('-')[1]}\n"
    listed = finished(venv / "bin/dumo", "recipes", cwd=tmp_path)
    assert all(name in listed for name in recipes.names())
    distance, page, package = finished(venv / "bin/python", "-c", WAY, cwd=tmp_path).split()
    assert float(distance) > 0
    assert (tmp_path / page).is_file()
    assert Path(package).is_relative_to(venv)
