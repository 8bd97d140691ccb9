"""Benchmarks of prompts, as their users type them: images as the evaluators read them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dumo
from e2e.shell import TINY, Done, call

PROMPTS: list[dict[str, Any]] = [  # as GenEval's file has them
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
]
LINES = [json.dumps(one) for one in PROMPTS]
NAME = "geneval-restart-nfe1-prompts"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of digits by words."""
    folder = tmp_path_factory.mktemp("benchmark")
    done = call(
        *("train", "digits-words", "--out", folder / "run", *TINY),
        "train.steps=4",
        "train.log_every=4",
    )
    assert done.code == 0, done
    return folder / "run"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(LINES))
    return path


@pytest.fixture
def images(run: Path, prompts: Path, tmp_path: Path) -> Path:
    """GenEval's folder."""
    done = sample(run, prompts, tmp_path)
    assert done.code == 0, done
    assert done.out.strip() == str(tmp_path / NAME)
    return tmp_path / NAME


def sample(run: Path, prompts: Path, out: Path, *words: object, form: str = "geneval") -> Done:
    return call("sample", run, "--format", form, "--prompts", prompts, "--out", out, "--nfe", "1", *words)


def as_geneval_reads(folder: Path) -> list[str]:
    """The prompt of each image that evaluate_images.py goes through (main), with its own conditions."""
    found: list[str] = []
    for name in os.listdir(folder):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        metadata = json.loads((folder / name / "metadata.jsonl").read_text())
        for image in os.listdir(folder / name / "samples"):
            path = folder / name / "samples" / image
            if not path.is_file() or not re.match(r"\d+\.png", image):
                continue
            Image.open(path).load()
            assert metadata["tag"]
            found.append(metadata["prompt"])
    return found


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_genevals_evaluator_finds_four_images_of_each_prompt(run: Path, images: Path) -> None:
    assert sorted(as_geneval_reads(images)) == sorted(4 * [one["prompt"] for one in PROMPTS])
    assert [(images / f"{i:05d}" / "metadata.jsonl").read_text() for i in range(3)] == LINES
    assert sorted(path.name for path in (images / "00002" / "samples").iterdir()) == [f"{j:04d}.png" for j in range(4)]
    trained = dumo.load(run)
    prompts = [one["prompt"] for one in PROMPTS for _ in range(4)]
    made = [one.convert("RGB") for one in trained.sample(prompts=prompts, nfe=1, output="pil")]
    assert (pixels(images / "00001" / "samples" / "0002.png") == np.asarray(made[4 + 2])).all()


def test_images_are_not_mixed_with_others(run: Path, prompts: Path, images: Path) -> None:
    assert sample(run, prompts, images.parent, "--seed", "1").out.strip() == f"{images}-seed1"
    prompts.write_text(LINES[0])
    done = sample(run, prompts, images.parent)
    assert (done.code, NAME in done.err.replace("\n", "")) == (2, True), done
    assert len(as_geneval_reads(images)) == 4 * len(PROMPTS)


@pytest.mark.nightly
def test_the_report_shows_prompts_under_their_pictures(run: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text('a "seven" <b>\n\nthe digit four\n')
    done = call("report", run, "--prompts", tmp_path / "asked.txt")
    assert done.code == 0, done
    page = (run / "report.html").read_text()
    asked = page[page.index('<section id="prompts">') : page.index('<section id="trajectories">')]
    assert re.findall("<figcaption>(.*)</figcaption>", asked) == ["a &#34;seven&#34; &lt;b&gt;", "the digit four"]
    assert "of 1, 2, 4 NFE" in asked


@pytest.mark.slow
def test_dpgs_evaluator_cuts_the_images_out_of_one_picture(run: Path, tmp_path: Path) -> None:
    texts = {"0": "a seven", "partiprompts12": "a small grey 4\n"}
    (tmp_path / "dpg").mkdir()
    for name, text in texts.items():
        (tmp_path / "dpg" / f"{name}.txt").write_text(text)
    done = sample(run, tmp_path / "dpg", tmp_path, form="dpg")
    folder = tmp_path / "dpg-restart-nfe1-dpg"
    assert done.out.strip() == str(folder), done
    assert sorted(os.listdir(folder)) == ["0.png", "partiprompts12.png"]
    trained, side = dumo.load(run), 8
    prompts = [text for text in texts.values() for _ in range(4)]
    made = [one.convert("RGB") for one in trained.sample(prompts=prompts, nfe=1, output="pil")]
    for i, name in enumerate(texts):
        whole = Image.open(folder / f"{name}.png")
        for j, (left, top) in enumerate([(0, 0), (side, 0), (0, side), (side, side)]):
            cut = whole.crop((left, top, left + side, top + side))
            assert (np.asarray(cut) == np.asarray(made[4 * i + j])).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "form", "line"),
    [
        ("empty.txt", "\n \n", "grid", "has no prompts"),
        ("none.txt", None, "grid", "No such file"),
        ("bad.jsonl", "{", "grid", "line 1 is not JSON"),
        ("bare.jsonl", '{"tag": "counting"}', "geneval", "line 1 has no prompt"),
    ],
)
def test_broken_prompts_are_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, name: str, text: str | None, form: str, line: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    done = sample(run, tmp_path / name, tmp_path / "out", form=form)
    assert (done.code, done.out) == (2, "")
    assert line in done.err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
