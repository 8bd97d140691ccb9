"""The wheel is all of dumo: installed outside the clone it trains, samples and judges, without a network."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from dumo.run.config import recipes
from e2e.shell import TINY

ROOT = Path(__file__).parents[2]
NO_NETWORK = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"{event} {args}")

sys.addaudithook(refuse)
"""
WAY = """
import sys, dumo
assert "torch" not in sys.modules
run = dumo.load("runs/digits")
assert run.sample(classes=[3, 5]).shape == (2, 1, 8, 8)
print(run.evaluate(nfe=1)["results"][0]["fd"], run.report(), dumo.__file__)
"""

pytestmark = pytest.mark.slow


def finished(*words: object, cwd: Path, **env: str) -> str:
    """What a command prints on stdout; it must succeed."""
    done = subprocess.run([*map(str, words)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree. Building it fetches hatchling, as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    finished(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    source = ROOT / "src"
    files = {str(file.relative_to(source)) for file in (source / "dumo").rglob("*") if file.is_file()}
    with ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert found == {name for name in files if "__pycache__" not in name}
    assert {"dumo/recipes/digits.yaml", "dumo/report/report.html.j2", "dumo/encoders/digits.safetensors"} <= found


def test_a_wheel_works_outside_the_clone_without_a_network(wheel: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    finished(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=here)
    (site / "sitecustomize.py").write_text(NO_NETWORK)

    def dumo(*words: object) -> str:
        return finished(site / "bin/dumo", *words, cwd=here, PYTHONPATH=str(site), OMP_NUM_THREADS="1", COLUMNS="200")

    assert dumo("--version") == f"dumo {wheel.name.split('-')[1]}\n"
    listed = dumo("recipes")
    assert all(name in listed for name in recipes.names())
    dumo("train", "digits", *TINY)
    distance, page, package = finished(sys.executable, "-c", WAY, cwd=here, PYTHONPATH=str(site)).split()
    assert float(distance) > 0
    assert (here / page).is_file()
    assert Path(package).is_relative_to(site)
