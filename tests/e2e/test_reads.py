"""What a command opens of a run's folder: run.yaml twice at most, each checkpoint's list and run once."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

import dumo
from dumo.io import run_places as shipped
from dumo.types import UserError
from e2e.shell import call

WATCHED = ("run.yaml", "state.json")
WEIGHTS = {"run.yaml", "state.json"}  # of a command that opens a checkpoint
SETTINGS = {"run.yaml"}  # of one that reads the run's settings alone
COMMANDS = {  # typed in a folder that holds `run`, and which of WATCHED are read there
    "sample run --nfe 1 --count 2": WEIGHTS,
    "sample run --checkpoints all --nfe 1 --count 1 --labels 3": WEIGHTS,
    "evaluate run --nfe 1": WEIGHTS,
    "report run": WEIGHTS,
    "export run --out out --parts none": WEIGHTS,
    "train run": WEIGHTS,
    "train run train.steps=21": WEIGHTS,
    "train run --out other train.steps=1": SETTINGS,
    "show run": SETTINGS,
    "show run --cost": SETTINGS,
}
reads: Counter[Path] = Counter()  # of the files WATCHED
places: list[Path] = []  # folders in which reads count


def note_read(event: str, words: tuple[object, ...]) -> None:
    """An audit hook of Python's, which nothing removes."""
    if not places or event != "open":
        return
    name, _, flags = words
    if not isinstance(name, str):  # a descriptor
        return
    assert isinstance(flags, int)
    path = Path(name).absolute()
    is_read = flags & (os.O_WRONLY | os.O_RDWR) == 0
    if is_read and path.name in WATCHED and any(path.is_relative_to(place) for place in places):
        reads[path] += 1


sys.addaudithook(note_read)


@contextmanager
def counted(*folders: Path) -> Generator[None]:
    """Count what is read of runs in these folders while inside."""
    reads.clear()
    places[:] = folders
    try:
        yield
    finally:
        places.clear()


def require_few_reads(names: set[str]) -> None:
    """These files were read: run.yaml twice at most, any other once."""
    assert {path.name for path in reads} == names
    assert {str(path): count for path, count in reads.items() if count > (2 if path.name == "run.yaml" else 1)} == {}


@pytest.mark.parametrize(("typed", "names"), COMMANDS.items(), ids=[*COMMANDS])
def test_a_command_reads_few_files(typed: str, names: set[str], trained: dict[str, Path], here: Path) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    held = [*(run / "checkpoints").iterdir(), run / "run.yaml"]  # not what training writes, and flushes
    with counted(*held):
        done = call(*typed.split())
    assert done.code == 0, done.err
    require_few_reads(names)


@pytest.mark.usefixtures("here")
def test_a_run_that_comes_with_dumo_is_read_but_once() -> None:
    with counted(shipped.FOLDER):
        done = call("sample", "digits-trained", "--nfe", 1, "--count", 2)
    assert done.code == 0, done.err
    require_few_reads(SETTINGS)


def test_python_reads_few_files(trained: dict[str, Path]) -> None:
    with counted(trained["digits"]):
        dumo.load(trained["digits"]).sample(count=2, nfe=1)
    require_few_reads(WEIGHTS)


def test_python_goes_on_with_images_by_one_reading_of_their_run(here: Path) -> None:
    pixels = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8)
    (here / "photos").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(here / f"photos/{i}.png")
    small = {"net.width": 8, "train.batch": 8, "train.compile": "none", "train.precision": "fp32"}
    folder = Path(dumo.train("photos", small | {"train.steps": 2}).folder).absolute()
    held = [*(folder / "checkpoints").iterdir(), folder / "run.yaml"]
    with counted(*held), pytest.raises(UserError, match="2 steps"):
        dumo.train("photos", {"train.steps": 1})
    assert reads[folder / "run.yaml"] <= 2
