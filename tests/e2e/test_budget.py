"""Captions that are encoded while a net trains: the rows, so the weights, are those of a cache, to the bit."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dumo.encoders.encode_prompt import PromptReader
from dumo.io.tensor_files import load, read
from e2e.shell import call, refused, together
from stock.case import LORA, SHORT, Case, must

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of diffusers about its own parts
FIELDS = (
    *LORA,
    "net.lowpass=null",
    "train.steps=4",
    "train.save_every=2",
    "objective.guide.zeta=0.5",
    "objective.drop=0.5",
)
LIVE = "net.texts.budget=0"


@pytest.fixture(scope="module")
def tabled(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run of SD3 on a table: to be read."""
    return Case.of("SD3", tmp_path_factory.mktemp("sd3"), *FIELDS)


def words(case: Case, *more: str) -> list[str]:
    """A run of the same pipeline and images without a table."""
    where = (f"net.texts.root={case.folder / 'none'}", "net.texts.dtype=float32")
    return ["sd3-lora", *case.fields, *SHORT, *FIELDS, *where, LIVE, *more]


def weights(run: Path) -> dict[str, Tensor]:
    """Those after the last step."""
    return read(run / "checkpoints/step-00000004/net/00000.safetensors")[0]


def assert_same(run: Path, case: Case) -> None:
    mine, theirs = weights(run), weights(case.run)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.nightly
def test_weights_are_those_of_a_table_and_of_a_run_that_stopped(tabled: Case, tmp_path: Path) -> None:
    must(call("train", *words(tabled), "--out", tmp_path / "live"))
    assert_same(tmp_path / "live", tabled)
    assert not (tabled.folder / "none").exists()
    must(call("train", tmp_path / "live", "--from", 2))
    assert_same(tmp_path / "live", tabled)


@pytest.mark.nightly
def test_two_ranks_encode_their_own(tabled: Case, tmp_path: Path) -> None:
    there = (f"net.texts.root={tabled.folder / 'texts'}", "train.share=2")
    for out, fields in {"live": ("train.share=2",), "tabled": there}.items():
        together(2, "train", *words(tabled, *fields), "--out", out, cwd=tmp_path)
    mine, theirs = (load(tmp_path / out / "checkpoints/step-00000004/net") for out in ("live", "tabled"))
    assert len(mine) > 10
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)


@pytest.mark.nightly
def test_a_cache_that_is_filled_meanwhile_is_read(
    tabled: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with another encoder nothing goes on."""
    must(call("train", *words(tabled), "--out", tmp_path / "run"))
    model = shutil.copytree(tabled.source, tmp_path / "another")
    (model / "tokenizer_3" / "tokenizer_config.json").write_text("{}")
    named = ("another", "is not StableDiffusion3Pipeline-")
    monkeypatch.chdir(tmp_path)
    refused("train", "run", "--from", 2, f"pipeline.source={model}", named=named)
    monkeypatch.setattr(PromptReader, "read_row", None)
    must(call("train", "run", "--from", 2, f"net.texts.root={tabled.folder / 'texts'}"))
    assert_same(tmp_path / "run", tabled)


@pytest.mark.nightly
def test_samples_of_captions_and_prompts_are_those_of_a_table(tabled: Case, tmp_path: Path) -> None:
    must(call("train", *words(tabled), "--out", tmp_path / "live"))
    for said in (["--count", 3], ["--prompt", "a red fox", "--prompt", "a dog"]):
        for run in (tabled.run, tmp_path / "live"):
            must(call("sample", run, *said, "--nfe", "1", "--format", "npz"))
        (mine, theirs) = (next((run / "samples").glob("*.npz")) for run in (tmp_path / "live", tabled.run))
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.nightly
def test_what_will_be_is_stated(tabled: Case) -> None:
    done = must(call("encode", *words(tabled)))
    assert "3 captions may take" in done.err
    assert "more than net.texts.budget = 0 GB: they are encoded during training" in done.err
    assert not (tabled.folder / "none").exists()
    live, there = (call("show", *words(tabled, *more), "--cost", "--json") for more in ((), ("net.texts.budget=1",)))
    (alone, *_) = must(live).json["cost"]["memory"]
    assert alone["texts"] > must(there).json["cost"]["memory"][0]["texts"] == 0
