"""A run on two ranks: the same run as on one, killed, resumed, sampled and judged.

What torchrun is for, to start, to start again and to report, is tried with torchrun; the rest with ranks that are told
what torchrun would tell them (`together`).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from autoencoder import taef2
from dumo.data import Latents
from dumo.io.tensor_files import load
from dumo.run import fill_caches
from e2e.shell import TINY, Done, apart, call, together, tree
from forked import ENVIRONMENT
from reliability.process import is_alive, worker_pids

OFTEN = ["train.save_every=10", "train.keep=9", "train.log_every=10", "evaluate.every=10"]
SPLIT = ["train.micro_batch=8"]  # of 16 rows: as two ranks take them
LAST = "checkpoints/step-00000020"
LATE = """# dumo, with steps that take at least a fifth of a second: between two of them there is time for a signal
import time
from dumo.cli import main
from dumo.runtime import signals
poll = signals.poll  # four times a step
def late():
    time.sleep(0.05)
    return poll()
signals.poll = late
main()
"""


def torchrun(
    ranks: int, *words: object, cwd: Path, before: tuple[str, ...] = (), program: tuple[str, ...] = ("-m", "dumo")
) -> "subprocess.Popen[str]":
    """`torchrun --nproc-per-node RANKS -m dumo WORDS`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *before, *program]
    command[3:3] = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a free port
    return subprocess.Popen(
        [*command, *map(str, words)],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: "subprocess.Popen[str]") -> Done:
    """What it said."""
    out, err = process.communicate(timeout=300)
    return Done(process.returncode, out, err)


def begun(words: tuple[str, ...], out: Path, *before: str) -> tuple["subprocess.Popen[str]", list[int]]:
    """A training on two ranks that has put its first checkpoint, and the processes of its ranks."""
    (slow := out.parent / "late.py").write_text(LATE)
    process, late = torchrun(2, *words, cwd=out.parent, before=before, program=(slow.name,)), time.monotonic() + 240
    while not (out / "checkpoints/step-00000010").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < late
        time.sleep(0.002)
    ranks = worker_pids(process.pid, 2)
    assert len(ranks) == 2, "it was too quick"
    return process, ranks


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    parts = filter(Path.is_dir, checkpoint.iterdir())
    return {f"{part.name}.{name}": x for part in parts for name, x in load(part).items()}


def same(one: Path, two: Path) -> None:
    """The same numbers, to the last bit."""
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert len(a) > 50
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on two ranks: to be read, not written to."""
    here = tmp_path_factory.mktemp("ranks")
    err = "".join(done.err for done in together(2, "train", "digits", "--out", "two", *TINY, *OFTEN, cwd=here))
    assert err.count("training two on 2 ranks of cpu, each with all weights") == 1
    assert err.count("next:  dumo sample two") == 1
    return here / "two"


@pytest.mark.slow
def test_two_ranks_make_the_run_that_one_process_makes_in_two_pieces(run: Path, here: Path) -> None:
    assert call("train", "digits", "--out", "one", *TINY, *OFTEN, *SPLIT).code == 0
    same(here / "one" / LAST, run / LAST)
    one, two = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (Path("one"), run)
    )
    assert [row["step"] for row in one] == [row["step"] for row in two] == [10, 20]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["counts"] == b["counts"]
        assert a["val"] == pytest.approx(b["val"], rel=1e-3)
        assert a["val"]
    assert not any((run / name).exists() for name in (".training.lock", "samples"))


@pytest.mark.nightly
def test_a_killed_rank_and_a_restart_are_the_same_run(run: Path, here: Path) -> None:
    """The first, which writes all that is written; torchrun then ends the other, and begins both again."""
    words = ("train", "digits", "--out", "killed", *TINY, *OFTEN)
    process, ranks = begun(words, here / "killed", "--max-restarts", "1")
    os.kill(ranks[0], signal.SIGKILL)
    done = ended(process)
    assert done.code == 0, done
    assert done.err.count("training killed on 2 ranks") == 2
    same(here / "killed" / LAST, run / LAST)
    assert (here / "killed/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


@pytest.mark.nightly
def test_ranks_that_are_asked_to_stop_save_their_step_and_go_on_from_it(run: Path, here: Path) -> None:
    words = ("train", "digits", "--out", "asked", *TINY, *OFTEN, "train.log_every=1")
    process, ranks = begun(words, here / "asked")
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    done = ended(process)
    assert done.code, done
    assert done.err.count("stopped by SIGTERM; resume with:  dumo train asked") == 1, done.err
    assert not [rank for rank in ranks if is_alive(rank)]
    logged = (here / "asked/metrics.jsonl").read_text().splitlines()
    kept = max(path.name for path in (here / "asked/checkpoints").iterdir())
    assert 10 < len(logged) < 20, "it was too quick"
    assert kept == f"step-{len(logged):08d}"
    together(2, *words, cwd=here)
    same(here / "asked" / LAST, run / LAST)


@pytest.mark.nightly
def test_a_new_run_from_a_checkpoint_is_resumed_when_it_is_typed_again(run: Path, here: Path) -> None:
    words = ("train", str(run), "--from", "10", "--out", "back")
    for _ in range(2):
        together(2, *words, cwd=here)
    same(here / "back" / LAST, run / LAST)


@pytest.mark.nightly
def test_more_steps_on_any_number_of_ranks(run: Path, here: Path) -> None:
    words = [*TINY, *OFTEN, "train.steps=10", "train.sheets=10"]
    together(2, "train", "digits", "--out", "parts", *words, cwd=here)
    together(2, "train", "parts", "train.steps=20", cwd=here)
    same(here / "parts" / LAST, run / LAST)
    more = ["train.steps=24", "train.share=3", "train.sheets=[24]", "evaluate.every=12"]
    all_done = together(3, "train", "parts", *more, cwd=here)
    assert ["the weights in parts over all" in done.err for done in all_done] == [True, False, False]
    judged = json.loads((here / "parts/metrics.jsonl").read_text().splitlines()[-1])
    score = call("evaluate", "parts", "--nfe", "1", "--seed", "1", "--json").json["results"][0]
    assert judged["step"] == 24
    assert judged["val"] == pytest.approx({name: score[name] for name in judged["val"]}, rel=1e-3)
    assert call("sample", "parts", "--nfe", "1", "--count", "64", "--out", "one").code == 0
    sheets = sorted(path.name for path in (here / "parts/sheets").glob("*-nfe1.png"))
    assert sheets == [f"step-{n:08d}-nfe1.png" for n in (10, 20, 24)]
    sheet, samples = Image.open("parts/sheets/step-00000024-nfe1.png"), Image.open("one/restart-nfe1-count64.png")
    assert max(high for _, high in ImageChops.difference(sheet, samples).getextrema()) <= 1
    done = call("train", "parts", "train.steps=26")
    assert done.code == 0, done
    assert [json.loads(line)["step"] for line in (here / "parts/metrics.jsonl").read_text().splitlines()][:2] == [
        10,
        20,
    ]


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [2, 3])
def test_samples_and_scores_are_those_of_one(ranks: int, run: Path, here: Path) -> None:
    words = ("sample", run, "--nfe", "1", "--count", "17")
    assert call(*words, "--out", "one").code == 0
    done, *others = together(ranks, *words, "--out", "many", cwd=here)
    (one,), (many,) = (list((here / name).iterdir()) for name in ("one", "many"))
    assert one.name == many.name
    assert [done.out.split(), *(other.out for other in others)] == [[f"many/{many.name}"], *[""] * (ranks - 1)]
    apart = ImageChops.difference(Image.open(one).convert("RGB"), Image.open(many).convert("RGB"))
    assert max(high for _, high in apart.getextrema()) <= 1  # of 255: 1e-5 may round to another level

    judge = ("evaluate", run, "--nfe", "1", "--json")
    alone = call(*judge).json["results"][0]
    done, *_ = together(ranks, *judge, cwd=here)
    found = done.json["results"][0]
    assert found.pop("solver") == alone.pop("solver")
    assert found == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(("digits", "train.lr=1"), "train.lr: unknown key", marks=pytest.mark.nightly),
        pytest.param(
            ("digits-meanflow", "train.batch=4"),
            "none of them with r < t",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_what_does_not_fit_is_said_once(words: tuple[str, ...], said: str, here: Path) -> None:
    before = tree(here)
    done = ended(torchrun(2, "train", *words, "--out", "run", cwd=here))
    mine = [line for line in done.err.splitlines() if line.startswith(("error", "rank", "training"))]
    assert len(mine) == 1, done.err
    assert said in done.err
    assert "exitcode: 2" in done.err.replace("exitcode  :", "exitcode:")
    assert done.code == 1  # torchrun's own, whatever its workers' is
    assert tree(here) == before


@pytest.mark.slow
def test_ranks_that_are_asked_for_different_runs_are_refused(here: Path) -> None:
    words = ("train", "digits", "--out", "run", *TINY)
    done = apart([words, (*words, "train.optimizer.lr=0.5")], cwd=here)
    assert [one.code for one in done] == [2, 2], done
    assert "train.optimizer.lr is 0.5 on rank 1, but " in done[0].err
    assert " on rank 0: run the same command on every node" in done[0].err
    assert not (here / "run").exists()


@pytest.mark.nightly
def test_the_first_rank_waits_for_the_whole_cache(here: Path) -> None:
    (here / "images").mkdir()
    for i in range(9):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(here / f"images/{i}.png")
    taef2(here / "taef2.safetensors")
    codec = "data.codec.weights=taef2.safetensors"
    # Make the last of five shards, after which the command keeps their size.
    data = fill_caches.encoding_work("images", [codec], out="cache", codec="taef2", side=16).data
    assert isinstance(data, Latents)
    fill_caches.encode(data, shard_rows=2, rank=4, world=5)
    words = ("encode", "images", "--out", "cache", "--codec", "taef2", "--side", "16", codec)
    done, _ = together(2, *words, cwd=here)
    assert done.out.splitlines()[0] == "cache: 9 images as (32, 2, 2) in float16, no classes, 2 shards made now"
