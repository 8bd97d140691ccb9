"""The wheel is all of dumo: installed outside the clone it trains, samples and judges, without a network."""

import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from dumo.config import recipe_files
from e2e.shell import TINY
from e2e.test_shipped import CASES, CIFAR10, DIGITS, FEW_SAMPLES, LABEL, WORDS, Case
from forked import ENVIRONMENT
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
    folder = tmp_path_factory.mktemp("wheel")
    finished(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=ROOT)
    finished(sys.executable, "-P", "-m", "twine", "check", "--strict", *folder.iterdir(), cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    source = ROOT / "src"
    files = {str(file.relative_to(source)) for file in (source / "dumo").rglob("*") if file.is_file()}
    with ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert found == {name for name in files if "__pycache__" not in name}
    assert {"dumo/recipes/digits.yaml", "dumo/report/report.html.j2", "dumo/encoders/digits.safetensors"} <= found


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without a network, into which pip has installed the wheel, and digits trained beside it."""
    folder = tmp_path_factory.mktemp("installed")
    venv = made(folder / "venv")
    finished(venv / "bin/python", "-P", "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    finished(venv / "bin/dumo", "train", "digits", *TINY, "train.steps=20", cwd=folder)
    finished(venv / "bin/dumo", "sample", "runs/digits", cwd=folder)
    finished(venv / "bin/dumo", "evaluate", "runs/digits", cwd=folder)
    return venv


@pytest.mark.parametrize("name", [DIGITS, CIFAR10])
def test_every_command_takes_the_runs_of_a_wheel(
    venv: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the clone, without data or a network."""
    for variable, value in ALONE.items():
        monkeypatch.setenv(variable, value)
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "DUMO_DATA"} | ALONE
    words = {"name": name, "few": " ".join(FEW_SAMPLES[name]), "label": LABEL[name], **WORDS[name]}
    for case in (*CASES.values(), Case("export {name}")):
        typed = case.command.format(**words).split()
        command = [str(venv / "bin/dumo"), *typed]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        refused = case.refused.format(**words)
        assert done.returncode == (2 if refused else 0), (typed, done.stderr)
        assert re.search(refused or case.out.format(**words), done.stderr if refused else done.stdout), typed
        assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {name, f"{name}-diffusers", "runs"}


def test_a_wheel_works_outside_the_clone_without_a_network(
    wheel: Path, venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    folder = venv.parent  # where digits is trained
    assert finished(venv / "bin/dumo", "--version", cwd=folder) == f"dumo {wheel.name.split('-')[1]}\n"
    listed = finished(venv / "bin/dumo", "recipes", cwd=folder)
    assert all(name in listed for name in recipe_files.names())
    distance, page, package = finished(venv / "bin/python", "-c", WAY, cwd=folder).split()
    assert float(distance) > 0
    assert (folder / page).is_file()
    assert Path(package).is_relative_to(venv)
