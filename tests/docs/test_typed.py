"""What pages type for a GPU or for published weights runs: on tiny pipelines of the same class, trained for two steps.

Every page with a block `sh` is run by a test: here, in test_tutorial.py, test_examples.py, e2e/test_page.py or
e2e/test_readme.py. Here continuous integration types those that are due (turn.py), and each night all.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from docs.page import PAGES, ROOT, blocks, lines, unrolled
from docs.test_tutorial import photos
from docs.turn import tier
from e2e.shell import call
from pipelines import SIDE, save

ELSEWHERE = {"README", "photos", "compare", "paper", "own-objective", "library", "loop"}
TWO = ["train.steps=2", "train.schedule.warmup=0", "evaluate.protocol.samples=20"]
TUNED = [
    f"data.images.side={SIDE}",
    "train.batch=4",
    "train.micro_batch=4",
    "train.share=1",
    "train.precision=fp32",
    "net.lora.frozen=float32",
    *TWO,
]
DIGITS = ["train.steps=2", "train.batch=32"]
MORE = {  # by recipe
    "digits-drift": ["train.batch=256"],
    "digits-cmt": ["teacher.pairs.count=32"],
    "photos": ["--yes", "net.width=16", "net.depth=1", "net.attention=2", "train.batch=4"],
}
COUNTED = {  # what `dumo show --cost` is given: published models take it minutes
    **{f"{one}-lora": [f"pipeline.source=$PWD/{one}", f"data.images.side={SIDE}"] for one in ("sd3", "sdxl", "flux")},
    **{name: ["net.depth=3"] for name in ("imagenet256-xl2", "imagenet256-xl2-dual")},
}


def typed(page: str, small: list[str], python: Callable[[list[str]], None] | None = None, **instead: str) -> None:
    """Type the lines of a page's blocks `sh`, each of which must end well. `small` goes to what trains or encodes.

    `python` runs what is typed behind `python`.
    """
    for line in unrolled(lines(ROOT / f"docs/{page}.md", "sh")):
        program, *words = shlex.split(os.path.expandvars(line), comments=True)
        if program == "export":
            os.environ |= {name: value for name, _, value in (word.partition("=") for word in words)}
        elif program == "dumo":
            more = [*small, *MORE.get(words[1], ())] if words[0] in ("train", "encode") or "--check" in words else []
            more += [*map(os.path.expandvars, COUNTED.get(words[1], ()))] if "--cost" in words else []
            if words[0] == "train" and "--out" not in words and Path("runs", words[1]).exists():
                more += ["--out", f"runs/{len(list(Path('runs').iterdir()))}"]  # an alternative to one before
            done = call(*(instead.get(word, word) for word in words), *more)
            assert done.code == 0, (line, done)
        elif program == "python":
            assert python, line
            python([instead.get(word, word) for word in words])
        else:
            assert program == "pip", line  # of the network


def captioned(folder: Path) -> None:
    """Photos with a caption each."""
    photos(folder)
    for image in folder.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"a photo of {image.parent.name}, number {image.stem}", encoding="utf-8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with captioned photos, to work in."""
    monkeypatch.chdir(tmp_path)
    for name in ("MY_IMAGES", "PWD"):
        monkeypatch.setenv(name, str(tmp_path))
    captioned(tmp_path / "photos")
    return tmp_path


@tier("pretrained")
def test_pretrained(here: Path) -> None:
    typed("pretrained", [*TUNED, f"pipeline={save('SD3', here / 'sd3')}"])
    assert (here / "few-steps/README.md").is_file()


@tier("personal")
def test_personal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few-step run of the tiny pipeline."""
    save("SD3", here / "sd3")
    (here / "prior.txt").write_text("a dog on a beach\na cat\n", encoding="utf-8")
    monkeypatch.setenv("MY_IMAGES", str(here / "photos"))
    for verb in ("encode", "train"):
        assert call(verb, "sd3-lora", "pipeline=sd3", *TUNED).code == 0
    (here / "mine").mkdir()
    (here / "photos").rename(here / "mine/photos")
    typed("personal", TUNED, **{"200": "4"})
    assert (here / "sks.safetensors").is_file()


@tier("sdxl")
def test_sdxl(here: Path) -> None:
    """With captions that are there; the images of the base are drawn by the page's own script."""
    save("SDXL", here / "sdxl", dtype="float16", variant="fp16")
    (here / "mine").mkdir()
    (here / "photos").rename(here / "mine/photos")
    (here / "prompts.txt").write_text("a dog on a beach\na cat\n", encoding="utf-8")
    (script,) = (block for block in blocks(ROOT / "docs/sdxl.md", "py") if "num_inference_steps" in block)
    (here / "base_images.py").write_text(script, encoding="utf-8")

    def python(words: list[str]) -> None:
        if words[0] == "base_images.py":
            subprocess.run([sys.executable, *words, "sdxl", str(SIDE)], check=True)

    typed("sdxl", [*TUNED, "pipeline=sdxl"], python, **{"500": "4", "200": "4"})
    assert (here / "sks.safetensors").is_file()


@tier("families")
def test_families(here: Path) -> None:
    typed("families", [*TUNED, f"pipeline={save('Flux2-klein', here / 'klein')}"])
    assert "guidance_scale=1.0" in (here / "few-steps/README.md").read_text(encoding="utf-8")


@tier("captions")
def test_captions(here: Path) -> None:
    """Without the block for SANA's own autoencoder, which no tiny one replaces."""
    typed("captions", TWO)


@tier("memory")
def test_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("SD3", here / "sd3")
    monkeypatch.setenv("MY_IMAGES", str(here / "photos"))
    flux = [f"pipeline={save('Flux', here / 'flux')}"]
    assert call("encode", "flux-lora", *flux, "train.micro_batch=2", *TUNED).code == 0
    typed("memory", [*TUNED, *flux])


@tier("gpus")
def test_gpus(here: Path) -> None:
    typed("gpus", [])


@tier("evaluation")
def test_evaluation(here: Path) -> None:
    small = ["net.width=8", "train.batch=8", "train.steps=5", "data.side=16", "evaluate.protocol.samples=60"]
    small += ["sample.solver.m=0.3"]  # as of photos that are learned at 64 x 64
    for caption in here.rglob("*.txt"):
        caption.unlink()
    assert call("train", "photos", "--yes", *small).code == 0
    made = call("sample", "runs/photos", "--nfe", "1", "--count", "60", "--format", "npz", "--out", "made").out
    Path(made.strip()).rename("samples.npz")
    typed("evaluation", [], **{"50000": "8"})
    assert len(list(Path("runs/photos").glob("evaluation-*m0*.json"))) == 3  # one for each m of the page


@tier("trained")
def test_trained(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUMO_DATA", raising=False)
    typed("trained", [])


@tier("mathematics")
def test_mathematics(here: Path) -> None:
    typed("mathematics", DIGITS)


@tier("objectives/index")
def test_objectives(here: Path) -> None:
    assert call("train", "digits-flow-matching", *DIGITS).code == 0  # the teacher
    typed("objectives/index", DIGITS)


@tier("objectives/details")
def test_details(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MORE, "sd3-lora", [*TUNED, f"pipeline={save('SD3', here / 'sd3')}"])
    typed("objectives/details", DIGITS)


def test_every_page_that_types_is_typed() -> None:
    here = {name.removeprefix("test_") for name in globals() if name.startswith("test_")} | ELSEWHERE
    pages = {page.stem for page in PAGES if blocks(page, "sh")}
    assert {"objectives" if name == "index" else name for name in pages} <= here
