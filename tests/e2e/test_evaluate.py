"""Runs evaluated as a user types it: reports with cards, comparisons, several ranks, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dumo.encoders import inception as network
from dumo.runtime.random import stream
from e2e.shell import call, refused
from unit.evaluation.extractor import Peephole

COUNT = 120  # images


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images in two classes."""
    root = tmp_path_factory.mktemp("album")
    pixels = torch.randint(256, (COUNT, 8, 8, 3), generator=stream("album"), dtype=torch.uint8).numpy()
    for i, image in enumerate(pixels):
        (root / f"class {i % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / f"class {i % 2}/{i:03d}.png")
    return root


def of(album: Path, protocol: str = "folder", *more: str) -> list[str]:
    """Settings that make the digits' recipe one of these images."""
    tiny = ("net.width=16", "net.depth=1", "net.attention=1", "train.batch=8", "train.steps=2", "train.save_every=2")
    data = ("data.kind=images", f"data.root={album}", "data.side=8")
    judged = (f"evaluate.protocol.kind={protocol}", f"evaluate.protocol.samples={COUNT}")
    return [*tiny, *data, *judged, "evaluate.protocol.frechet=false", "evaluate.nfe=[1]", *more]


@pytest.fixture(scope="module")
def trained(album: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on them, and a second one of another seed beside it."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b", 1)):
        done = call("train", "digits", "--out", folder / name, *of(album, "folder", f"train.seed={seed}"))
        assert done.code == 0, done
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with copies of both runs, an empty cache and no weights."""
    for name in ("a", "b"):
        shutil.copytree(trained / name, tmp_path / "work" / name)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("DUMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(network.VARIABLE, raising=False)
    return tmp_path / "work"


@pytest.fixture
def peephole(monkeypatch: pytest.MonkeyPatch) -> Peephole:
    """A small network in Inception's place."""
    net = Peephole()
    monkeypatch.setattr(network, "load", lambda path, device: net)
    return net


def test_from_images_to_a_table(here: Path, peephole: Peephole) -> None:
    for name in ("a", "b"):
        done = call("evaluate", name)
        assert done.code == 0, done
        assert done.out.splitlines()[-1] == f"{name}/evaluation.json"
        assert "a perfect sampler: unknown, because there are too few images" in done.out  # 120, and subsets have 100
    assert peephole.seen == 5 * COUNT  # the data once, of each run 1 pass by both solvers
    a, b = (json.loads(Path(name, "evaluation.json").read_text()) for name in ("a", "b"))
    assert set(a["results"][0]) == {"nfe", "solver", "kid", "kid_sd", "is", "precision", "recall"}
    assert a["card"]["protocol"] == f"folder ({COUNT} samples, no Fréchet distances)"
    assert a["card"]["reference"] == f"{COUNT} images of the data"
    assert a["card"]["reference_sha256"] == b["card"]["reference_sha256"]
    assert a["card"]["weights_sha256"] != b["card"]["weights_sha256"]

    table = call("compare", "a", "b")
    assert table.code == 0, table
    assert table.out.count("restart") == table.out.count("euler") == 2
    found = call("compare", "a", "b", "--json").json
    assert [row["run"] for row in found["rows"]] == ["a", "a", "b", "b"]
    assert found["rows"][0]["kid"] == a["results"][0]["kid"]

    call("evaluate", "b", "--seed", "7")
    refused("compare", "a", "b/evaluation-seed7.json", named=("not comparable", "seed: 0 in a; 7 in b"), lines=3)
    anyway = call("compare", "a", "b/evaluation-seed7.json", "--anyway")
    assert anyway.code == 0
    assert "measured differently, seed: 0 in a; 7 in b/evaluation-seed7.json" in anyway.out


@pytest.mark.slow
def test_samples_in_a_file_are_judged_as_their_run_and_stand_in_its_table(here: Path, album: Path) -> None:
    """Photos round samples to 8 bits, as a file does: so all numbers are equal."""
    photos = [f"evaluate.protocol={{kind: photos, samples: {COUNT}}}", "evaluate.contrast=[]"]
    run = call("evaluate", "a", *photos, "--json").json
    call("sample", "a", "--format", "npz", "--count", COUNT, "--nfe", "1", "--out", "samples")
    [file] = Path("samples").glob("*.npz")
    done = call("evaluate", "--images", file, "--against", album)
    assert done.code == 0, done
    assert done.out.split()[:4] == [f"{file},", "protocol", "photos", f"({COUNT}"]
    assert done.out.splitlines()[-1] == f"{file.name}.evaluation.json"
    report = json.loads(Path(f"{file.name}.evaluation.json").read_text())
    assert report["results"] == [{key: x for key, x in run["results"][0].items() if key not in ("nfe", "solver")}]
    assert report["baselines"] == run["baselines"]
    found = call("compare", run["file"], f"{file.name}.evaluation.json", "--json").json["rows"]
    assert [(row["run"], row["nfe"], row["mmd"]) for row in found] == [
        (run["file"], 1, run["results"][0]["mmd"]),
        (str(file), None, run["results"][0]["mmd"]),
    ]


@pytest.mark.slow
def test_weights_that_are_not_inceptions(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing to compare without them."""
    way = ("docs/data.md", network.VARIABLE)
    refused("evaluate", "a", named=("needs Inception weights", f"{network.VARIABLE} is not set", *way), lines=None)
    torch.save({"fc.bias": torch.zeros(1008)}, "i.pth")
    monkeypatch.setenv(network.VARIABLE, "i.pth")
    refused("evaluate", "a", named=("i.pth", "pickle files are not supported", *way), lines=None)
    refused("compare", "a", "b", named=("a/evaluation.json",))
