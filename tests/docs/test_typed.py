"""What pages type for a GPU or for published weights runs: on tiny pipelines of the same class, trained for two steps.

Every page with a block `sh` is run by a test: here, in test_tutorial.py, e2e/test_page.py or e2e/test_readme.py.
"""

import os
import shlex
from pathlib import Path

import pytest
from PIL import Image

from docs.page import PAGES, ROOT, blocks, lines
from docs.test_tutorial import photos
from dumo.run.plan import machine
from e2e.shell import TINY, call, sets
from pipelines import SIDE, save

ELSEWHERE = {"README", "photos", "compare", "paper", "own-objective", "library"}
TWO = sets("train.steps=2", "train.schedule.warmup=0", "evaluate.protocol.samples=20")
TUNED = [
    *sets(f"data.images.side={SIDE}", "train.batch=4", "train.micro_batch=4", "train.share=1", "train.precision=fp32"),
    *TWO,
]
DIGITS = [*TINY, *sets("train.steps=2", "train.batch=32")]
NETS = {"digits-pi-flow": (), "digits-drift": sets("train.batch=256")}  # what a recipe needs otherwise than DIGITS

pytestmark = pytest.mark.slow


def typed(page: str, small: list[str], **instead: str) -> None:
    """Type the lines of a page's blocks `sh`, each of which must end well. `small` goes to what trains or encodes."""
    for line in lines(ROOT / f"docs/{page}.md", "sh"):
        program, *words = shlex.split(os.path.expandvars(line), comments=True)
        if program == "export":
            os.environ.update(word.split("=", 1) for word in words)
        elif program == "dumo":
            more = small if words[0] in ("train", "encode", "doctor") else []
            done = call(*(instead.get(word, word) for word in words), *more)
            assert done.code == 0, (line, done)
        else:
            assert program in ("pip", "hf"), line  # of the network


def captioned(folder: Path) -> None:
    """Photos with a caption each."""
    photos(folder)
    for image in folder.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"a photo of {image.parent.name}, number {image.stem}", encoding="utf-8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with captioned photos, to work in."""
    monkeypatch.chdir(tmp_path)
    for name in ("PRETRAINED", "MY_IMAGES", "PWD"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(machine, "compiler", lambda here: machine.Finding("torch.compile", "ok", "works"))  # slow
    captioned(tmp_path / "photos")
    return tmp_path


def test_pretrained(here: Path) -> None:
    save("SD3", here / "sd3")
    typed("pretrained", TUNED)
    assert (here / "few-steps/README.md").is_file()


def test_sdxl(here: Path) -> None:
    save("SDXL", here / "sdxl")
    typed("sdxl", TUNED)
    assert (here / "fox.safetensors").is_file()
