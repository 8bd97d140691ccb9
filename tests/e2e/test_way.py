"""The whole way: train, sample, evaluate, report, each with a run's folder and hardly another flag."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dumo.config.load import load
from dumo.io.digest import of_file
from e2e.conftest import RECIPES
from e2e.shell import TINY, call, finish, refused, start, tree
from tiers import tiered

SOLVERS = {"digits": "restart", "digits-flow-matching": "euler", "digits-meanflow": "hop", "moons": "restart"}


@pytest.mark.parametrize("name", RECIPES)
def test_training_leaves_a_whole_run(name: str, trained: dict[str, Path]) -> None:
    run = trained[name]
    whole = [".saved", "checkpoints", "metrics.jsonl", "run.yaml", "speed.jsonl"]
    assert sorted(path.name for path in run.iterdir()) == whole
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000010", "step-00000020"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert [row["images"] for row in rows] == [80, 160, 240, 320]


@pytest.mark.nightly
def test_processes_of_their_own_say_the_same(here: Path, trained: dict[str, Path]) -> None:
    words = [*TINY, "train.log_every=5", "train.save_every=10"]
    done = finish(start("train", "moons", *words, cwd=here))
    assert (done.code, done.out) == (0, "")
    assert "runs/moons" in done.err
    assert "Traceback" not in done.err
    assert tree(here / "runs/moons/checkpoints/step-00000020") == tree(trained["moons"] / "checkpoints/step-00000020")
    judged = finish(start("evaluate", "runs/moons", "--nfe", "1", "--json", cwd=here))
    assert judged.code == 0
    assert judged.json["results"][0]["nfe"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-meanflow", "moons"])
def test_sheets_for_every_number_of_passes(name: str, here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained[name], here / "run")
    done = call("sample", "run", "--count", "23")
    assert done.code == 0
    passes = load(str(run)).sample.nfe
    expected = [Path("run/samples") / f"{SOLVERS[name]}-nfe{n}-count23.png" for n in passes]
    assert done.out.splitlines() == [str(path) for path in expected]
    assert sorted((run / "samples").iterdir()) == sorted(here / path for path in expected)
    for path in expected:
        with Image.open(path) as sheet:
            assert sheet.format == "PNG"
            if name != "moons":  # 23 digits, a class a column, named
                assert sheet.size == (10 * 64 + 9 * 2, 17 + 3 * 64 + 2 * 2)


@pytest.mark.slow
def test_archive_in_adm_layout_and_single_images_agree(here: Path, trained: dict[str, Path]) -> None:
    words = ["sample", trained["digits"], "--count", "7", "--labels", "3,5", "--nfe", "2", "--seed", "4", "--out", "o"]
    made = "o/restart-nfe2-seed4-labels3-5-count7"
    assert call(*words, "--format", "npz").out == f"{made}.npz\n"
    assert call(*words, "--format", "images").out == f"{made}\n"
    with np.load(f"{made}.npz") as archive:
        assert sorted(archive) == ["arr_0", "arr_1"]
        x, c = archive["arr_0"], archive["arr_1"]
    assert (x.shape, x.dtype, c.dtype) == ((7, 8, 8, 3), np.uint8, np.int64)
    assert c.tolist() == [3, 5, 3, 5, 3, 5, 3]
    files = sorted(Path(made).iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(7)]
    for file, pixels in zip(files, x, strict=True):
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels)


@pytest.mark.nightly
def test_no_sheet_writes_over_another(here: Path, trained: dict[str, Path]) -> None:
    last = trained["digits"] / "checkpoints/step-00000020"
    asked: dict[str, list[object]] = {
        "restart-nfe1": [],
        "restart-nfe1-count9": ["--count", 9],
        "restart-nfe1-labels3-5": ["--labels", "3,5"],
        "restart-nfe1-seed1": ["--seed", 1],
        "restart-nfe1-m0.25": ["sample.solver.m=0.25"],
        "euler-nfe1": ["--solver", "euler"],
    }
    asked[f"restart-nfe1-net-{of_file(last / 'net/00000.safetensors')[:6]}"] = ["--weights", last / "net"]
    for name, words in asked.items():
        done = call("sample", trained["digits"], "--nfe", 1, "--out", "o", *words)
        assert (done.code, done.out) == (0, f"o/{name}.png\n")
    assert {path.stem for path in Path("o").iterdir()} == asked.keys()
    one = call("sample", trained["moons"], "--count", "1", "--nfe", "1", "--out", "one")
    assert (one.code, one.out, "Warning" in one.err) == (0, "one/restart-nfe1-count1.png\n", False)
    own = ["--seed", 0, "--count", 100, "--weights", last / "ema-0.999"]  # as the run has it
    assert call("sample", trained["digits"], "--nfe", 1, "--out", "o", *own).out == "o/restart-nfe1.png\n"


@pytest.mark.nightly
def test_what_changes_a_sample_and_what_does_not(here: Path, trained: dict[str, Path]) -> None:
    def made(*words: object) -> np.ndarray:
        done = call("sample", trained["digits"], "--format", "npz", "--nfe", "1", "--out", "o", *words)
        assert done.code == 0, done
        with np.load(done.out.strip()) as archive:
            return archive["arr_0"]

    first, last = made("--count", 9, "--seed", 0), trained["digits"] / "checkpoints/step-00000020"
    assert np.array_equal(made("--count", 4), first[:4])
    for one in ((), ("--weights", last / "ema-0.999")):  # the run's own seed is 0
        assert np.array_equal(made("--count", 9, *one), first)
    for other in (("--seed", 1), ("--solver", "euler"), ("--weights", last / "net")):
        assert not np.array_equal(made("--count", 9, *other), first)
    assert np.array_equal(made("--count", 9, "sample.seed=1"), made("--count", 9, "--seed", 1))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["digits-flow-matching", "moons"])
def test_evaluation_is_one_object_and_lies_in_the_folder(name: str, here: Path, trained: dict[str, Path]) -> None:
    shutil.copytree(trained[name], here / "run")
    done = call("evaluate", "run", "--nfe", "1,2", "--json")
    assert done.code == 0, done
    assert done.out.count("\n") == 1
    report = done.json
    assert report == json.loads(Path(report["file"]).read_text())
    # digits-flow-matching is evaluated at other numbers of passes by its own config.
    assert report["file"] == ("run/evaluation.json" if name == "moons" else "run/evaluation-nfe1-2.json")
    assert report["run"] == "run"
    assert (report["step"], report["samples"], report["seed"]) == (20, 500, 0)
    assert report["weights"] == "checkpoints/step-00000020/ema-0.999"
    assert "500" in report["protocol"]  # a number of samples of one's own is another protocol
    measures = {"mmd2"} if name == "moons" else {"mmd", "mmd_sd", "fd", "precision", "recall", "accuracy"}
    for row in [*report["results"], *report["contrast"]]:
        assert row.keys() >= measures | {"nfe", "solver"}
        assert all(np.isfinite(row[key]) for key in row.keys() - {"solver"})
    assert [(row["nfe"], row["solver"]) for row in report["results"]] == [(1, SOLVERS[name]), (2, SOLVERS[name])]
    euler = [] if name == "digits-flow-matching" else [(1, "euler"), (2, "euler")]  # its own solver is the contrast
    assert [(row["nfe"], row["solver"]) for row in report["contrast"]] == euler
    assert report["baselines"].keys() == ({"null"} if name == "moons" else {"perfect", "noise"})
    assert report["versions"].keys() == {"dumo", "torch", "python"}

    table = call("evaluate", "run", "--nfe", "1,2", "--all")
    assert table.code == 0
    assert "a perfect sampler: " in table.out
    assert all(f" {measure} " in table.out for measure in measures)
    short = call("evaluate", "run", "--nfe", "1,2").out
    lead = "mmd2" if name == "moons" else "class_mmd"
    assert f"a perfect sampler: {lead} 0 ± 0." in short or name == "moons"
    assert ("Close to the data, but " if name == "moons" else "Looks untrained: ") in short
    hidden = measures - {"mmd2", "recall"}
    assert not [measure for measure in hidden if f" {measure} " in short.split("perfect sampler")[0]]
    assert json.loads(Path(report["file"]).read_text()) == report  # the same samples have the same score
    assert table.out.splitlines()[-1] == report["file"]
    assert call("evaluate", "run", "--nfe", "3", "--json").json["file"] == "run/evaluation-nfe3.json"
    assert (name == "moons") != ("a perfect sampler: mmd 0 ± 0." in call("compare", report["file"]).out)
    shown = call("compare", report["file"], "run/evaluation-nfe3.json", "--json").json["rows"]
    assert {row["nfe"] for row in shown if row["solver"] == SOLVERS[name]} == {1, 2, 3}


def test_report_is_one_page_that_needs_no_other(here: Path, trained: dict[str, Path]) -> None:
    run = shutil.copytree(trained["digits"], here / "run")
    call("evaluate", "run", "--nfe", "1", "--json")
    done = call("report", "run")
    assert done.code == 0, done
    assert done.out == "run/report.html\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"<(?:img|script|link|iframe|source)\b[^>]*?(?:src|href)\s*=\s*[\"']?([^\"'\s>]{1,12})", page)
    assert sources
    assert {source.split(":")[0] for source in sources} == {"data"}
    assert "url(http" not in page
    assert "@import" not in page
    assert "{{" not in page
    assert str(json.loads((run / "evaluation-nfe1.json").read_text())["step"]) in page


@pytest.mark.parametrize("name", tiered(["ü ñ/x y", "a[/b]", "[bold]:x:.c"], ci=["ü ñ/x y", "[bold]:x:.c"]))
def test_folders_by_any_name(name: str, here: Path) -> None:
    done = call("train", "moons", "--out", name, *TINY, "train.steps=1", "train.batch=2")
    assert done.code == 0
    assert name in done.err
    again = call("train", name, "train.steps=2")
    assert again.code == 0
    made = call("sample", name, "--count", "2", "--nfe", "1", "--format", "npz")
    assert made.code == 0
    assert Path(made.out.removesuffix("\n")).is_file()  # what is printed can be opened
    assert [path.name for path in here.iterdir()] == [Path(name).parts[0]]


@pytest.mark.nightly
def test_grids_of_milestones(here: Path) -> None:
    words = [*TINY, "train.milestones=[0,10]", "train.save_every=10", "train.keep=1"]
    assert call("train", "digits", "--out", "run", *words).code == 0
    done = call("sample", "run", "--checkpoints", "0,20", "--nfe", "1,2", "--count", "2", "--labels", "3,7")
    names = [f"{letter}-step-{step}.png" for letter in "uv" for step in ("00000000", "00000020")]
    assert (done.code, done.out.split()) == (0, [f"run/samples/{name}" for name in [*names, "trajectories.png"]])
    assert call("sample", "run", "--weights", "run/milestones/step-00000010.safetensors", "--nfe", "1").code == 0


@pytest.mark.nightly
def test_a_run_is_sampled_at_any_scale(here: Path) -> None:
    run = here / "run"
    assert call("train", "digits-flow-matching", "--out", run, *TINY, "objective.drop=0.1").code == 0

    def made(name: str, *words: str) -> np.ndarray:
        done = call("sample", run, "--out", here / name, "--format", "npz", "--count", 4, "--nfe", 4, *words)
        assert done.code == 0, done
        (file,) = (here / name).glob("*.npz")
        with np.load(file) as archive:
            return archive["arr_0"].astype(int)

    plain, strong = made("plain"), made("strong", "sample.guide.scale=4")
    assert np.abs(strong - plain).max() > 0
    assert np.array_equal(made("one", "sample.guide.scale=1"), plain)
    assert np.array_equal(made("never", "sample.guide.scale=4", "sample.guide.interval.high=0.1"), plain)
    assert np.array_equal(made("again", "sample.guide.scale=4"), strong)
    refused("sample", run, "sample.guide.scale=0", named=("sample.guide.scale", "greater than 0"))
    refused("sample", run, "objective.guide.zeta=0.44", named=("objective.guide.zeta", "0.44"), lines=None)


def test_logs_of_several_runs_in_one_figure(here: Path, trained: dict[str, Path]) -> None:
    assert call("report", trained["digits"], trained["moons"]).out == "log.png\n"
    assert call("report", trained["digits"], trained["moons"], "--out", "a/b.png").out == "a/b.png\n"
    assert Image.open("log.png").tobytes() == Image.open("a/b.png").tobytes()
