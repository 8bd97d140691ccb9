"""Benchmarks of prompts, as their users type them: images as the evaluators read them, and their results read back."""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dumo
from e2e.shell import TINY, Done, call, sets

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
        *sets("train.steps=4", "train.log_every=4", f"net.texts.root={folder / 'texts'}"),
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


def as_geneval_reads(folder: Path) -> list[dict[str, Any]]:
    """What evaluate_images.py goes through (main), with its own conditions, and a line of its results for each."""
    found: list[dict[str, Any]] = []
    for name in os.listdir(folder):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        metadata = json.loads((folder / name / "metadata.jsonl").read_text())
        for image in os.listdir(folder / name / "samples"):
            path = folder / name / "samples" / image
            if not path.is_file() or not re.match(r"\d+\.png", image):
                continue
            Image.open(path).load()
            row = {"filename": str(path), "tag": metadata["tag"], "prompt": metadata["prompt"], "correct": False}
            found.append(row | {"reason": "", "metadata": json.dumps(metadata), "details": "{}"})
    return found


def written(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """The lines as pandas writes them: slashes escaped."""
    path.write_text("".join(json.dumps(row).replace("/", "\\/") + "\n" for row in rows))
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.nightly
def test_genevals_evaluator_finds_four_images_of_each_prompt(run: Path, images: Path) -> None:
    found = as_geneval_reads(images)
    assert sorted(row["prompt"] for row in found) == sorted(4 * [one["prompt"] for one in PROMPTS])
    assert [(images / f"{i:05d}" / "metadata.jsonl").read_text() for i in range(3)] == LINES
    assert sorted(path.name for path in (images / "00002" / "samples").iterdir()) == [f"{j:04d}.png" for j in range(4)]
    trained = dumo.load(run)
    prompts = [one["prompt"] for one in PROMPTS for _ in range(4)]
    made = [one.convert("RGB") for one in trained.sample(prompts=prompts, nfe=1, output="pil")]
    assert (pixels(images / "00001" / "samples" / "0002.png") == np.asarray(made[4 + 2])).all()


@pytest.mark.slow
def test_what_stands_is_kept_and_what_is_missing_made_again_equal(run: Path, prompts: Path, images: Path) -> None:
    """Also half a file that a killed one left: the evaluator must not see it."""
    kept, gone = images / "00000" / "samples" / "0000.png", images / "00001" / "samples" / "0003.png"
    before, was = kept.stat().st_mtime_ns, pixels(gone)
    gone.unlink()
    half = gone.with_name(".0003.png.old.tmp")
    half.write_bytes(b"half")
    done = sample(run, prompts, images.parent)
    assert done.code == 0, done
    assert "4 of 4" in done.err
    assert (pixels(gone) == was).all()
    assert kept.stat().st_mtime_ns == before
    assert not half.exists()


@pytest.mark.nightly
def test_images_that_were_made_otherwise_are_not_mixed(run: Path, prompts: Path, images: Path) -> None:
    assert sample(run, prompts, images.parent, "--seed", "1").out.strip() == f"{images}-seed1"
    prompts.write_text("\n".join(LINES[::-1]))
    for said in ("made otherwise (reference_sha256", "says what made its images"):
        done = sample(run, prompts, images.parent)
        assert done.code == 2
        assert said in done.err
        images.with_name(f"{NAME}.json").unlink(missing_ok=True)


def test_the_score_is_the_mean_of_tasks_as_geneval_sums_it_up(run: Path, images: Path) -> None:
    """Six of eight single objects, and one of four counts: not seven of twelve. Other passes stand in one report."""
    rows = as_geneval_reads(images)
    for tag, correct in (("single_object", 6), ("counting", 1)):
        for row in [row for row in rows if row["tag"] == tag][:correct]:
            row["correct"] = True
    done = call("evaluate", run, "--geneval", written(images / "results.jsonl", rows), "--json")
    assert done.code == 0, done
    [row] = done.json["results"]
    assert row == {"nfe": 1, "solver": "restart", "geneval": 0.5, "single_object": 0.75, "counting": 0.25}
    card = json.loads(Path(done.json["file"]).read_text())["card"]
    assert (card["protocol"], card["samples"], card["seed"]) == ("geneval (12 samples)", 12, 0)
    assert call("compare", done.json["file"]).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda rows: rows[1:], "lacks 1 of the 12 images"),
        (lambda rows: [*rows, rows[0]], "is there twice"),
        (lambda rows: [{**row, "correct": "yes"} for row in rows], "line 1 is no result of GenEval (correct: "),
        (lambda rows: [{"tag": "counting"}], "line 1 is no result of GenEval (filename: "),
        (lambda rows: [], "has no results"),
        (lambda rows: [{**row, "filename": f"/else/x/{row['filename'][-21:]}"} for row in rows], "what made them"),
    ],
)
def test_results_that_do_not_fit_are_refused(
    run: Path, images: Path, tmp_path: Path, spoil: Callable[[Any], Any], line: str
) -> None:
    results = written(tmp_path / "results.jsonl", spoil(as_geneval_reads(images)))
    done = call("evaluate", run, "--geneval", results)
    assert done.code == 2
    assert line in done.err.replace("\n", " ")


@pytest.mark.nightly
def test_the_report_shows_prompts_under_their_pictures_and_what_evaluators_found(
    run: Path, images: Path, tmp_path: Path
) -> None:
    assert call("evaluate", run, "--geneval", written(images / "results.jsonl", as_geneval_reads(images))).code == 0
    (tmp_path / "asked.txt").write_text('a "seven" <b>\n\nthe digit four\n')
    done = call("report", run, "--prompts", tmp_path / "asked.txt")
    assert done.code == 0, done
    page = (run / "report.html").read_text()
    asked = page[page.index('<section id="prompts">') : page.index('<section id="trajectories">')]
    assert re.findall("<figcaption>(.*)</figcaption>", asked) == ["a &#34;seven&#34; &lt;b&gt;", "the digit four"]
    assert "of 1, 2, 4 passes" in asked
    assert "<h3>geneval (12 samples)</h3>" in page
    assert pixels(run / "report" / "prompts.png").shape[1] > 2 * 3 * 64


@pytest.mark.slow
def test_dpgs_evaluator_cuts_the_images_out_of_one_picture(run: Path, tmp_path: Path) -> None:
    """And its results are read back: the lines of pictures, then the scores by category."""
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

    results = tmp_path / "results.txt"
    lines = [f"{folder}/0.png, 1.0, 0.5, 1.0, 0.5, 0.75", f"{folder}/partiprompts12.png, 0.0, 0.0, 0.5, 0.5, 0.25"]
    summed = (
        "Model: dpg\nL1 category scores:\n\tentity: 80.0\n\tglobal: 40.0\nL2 category scores:\n\tentity - whole: 8\n"
    )
    results.write_text("\n".join(lines) + f"\n{summed}Image path: {folder}\nDPG-Bench score: 50.0\n")
    done = call("evaluate", run, "--dpg", results, "--json")
    assert done.code == 0, done
    assert done.json["results"] == [{"nfe": 1, "solver": "restart", "dpg": 50.0, "entity": 80.0, "global": 40.0}]
    results.write_text(f"{folder}/0.png, 1.0, 1.0")
    done = call("evaluate", run, "--dpg", results)
    assert done.code == 2
    assert "judges 1 images of 0.png, not 4" in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "form", "line"),
    [
        ("empty.txt", "\n \n", "grid", "has no prompts"),
        ("none.txt", None, "grid", "there are no prompts"),
        ("bad.jsonl", "{", "grid", "line 1 is not JSON"),
        ("bare.jsonl", '{"tag": "counting"}', "geneval", "line 1 has no prompt"),
        ("tagless.jsonl", '{"prompt": "a cow"}', "geneval", "prompt 1 has no tag"),
        ("plain.txt", "a cow", "geneval", "is no .jsonl"),
        ("plain.txt", "a cow", "dpg", "is no folder"),
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
