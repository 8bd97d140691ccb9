"""What a command does to whoever started it: a person who stops it, a pipe, a scheduler, a second process."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

from dumo.run import weights
from dumo.run.trainer import Trainer
from dumo.runtime import signals
from e2e.shell import TINY, call, finish, refused, start, tree, wait
from forked import ENVIRONMENT

LONG = [*TINY, "train.steps=1000000", "train.save_every=5", "train.log_every=1"]


def test_one_process_trains_in_a_folder(here: Path) -> None:
    """A second is refused, others read, and a killed one holds nothing back."""
    first = start("train", "moons", "--out", "run", *LONG, cwd=here)
    checkpoints = here / "run/checkpoints"
    wait(first, lambda: checkpoints.is_dir() and any(checkpoints.glob("step-*")))
    first.send_signal(signal.SIGSTOP)  # it need not be busy to hold its folder
    for words in (["train", "run"], ["train", "moons", "--out", "run", *LONG]):
        done = call(*words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: run is being trained by another process")
        assert done.err.count("\n") == 1
    assert call("sample", "run", "--nfe", "1", "--count", "2", "--out", "o").code == 0
    first.kill()
    assert finish(first).code == -signal.SIGKILL
    assert (here / "run/.training.lock").exists()
    step = int(sorted(checkpoints.glob("step-*"))[-1].name.removeprefix("step-"))
    done = call("train", "run", f"train.steps={step + 1}")
    assert done.code == 0, done
    there = sorted(path.name for path in (here / "run").iterdir())
    assert there == [".saved", "changes.jsonl", "checkpoints", "metrics.jsonl", "run.yaml", "speed.jsonl"]


@pytest.mark.parametrize(
    "words", [["sample", "R", "--checkpoints", "all"], ["report", "R"], ["reproduce", "fig3"], ["bench"]]
)
def test_work_that_ranks_do_not_share_is_refused(
    words: list[str], here: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = trained["moons"]
    refused(*(run if word == "R" else word for word in words), named=("WORLD_SIZE is 2", "without torchrun"), run=run)


@pytest.mark.parametrize("words", [["--version"], ["train", "--help"], ["train", "--no-such-option"]])
def test_ranks_may_ask_for_help(words: list[str], here: Path) -> None:
    """dumo.runtime.dist, which knows whether ranks have met, is then not even imported."""
    done = finish(start(*words, cwd=here, first="import os; os.environ |= dict(WORLD_SIZE='2', RANK='0')"))
    assert done.code == (2 if "--no-such-option" in words else 0)
    assert "Traceback" not in done.err


def test_ranks_that_are_interrupted_say_so_once(here: Path) -> None:
    """Ctrl-C reaches all of them; the others are silent, as where all is well."""
    stop = "from dumo.config import recipe_files\ndef stop(name): raise KeyboardInterrupt\nrecipe_files.tree = stop"
    told = [f"import os; os.environ |= dict(WORLD_SIZE='2', RANK='{k}')\n{stop}" for k in range(2)]
    main, other = (finish(start("recipes", cwd=here, first=first)) for first in told)
    assert (main.code, other.code, other.err) == (130, 130, "")
    assert main.err == "stopped\n"


@pytest.mark.parametrize(
    ("words", "slow"),
    [
        (["evaluate", "run", "--nfe", "1"], "dumo.report.evaluation.score_passes"),
        (["reproduce", "fig3", "--out", "a b"], "dumo.lab.cell.run_in_processes"),
    ],
)
def test_interrupts(
    words: list[str], slow: str, here: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained["moons"], "run")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(slow, stop)
    done = call(*words)
    assert (done.code, done.out) == (130, "")
    resumes = "; the same command resumes" if words[0] == "reproduce" else ""
    assert done.err == f"stopped{resumes}\n"


def test_a_stopped_training_is_resumed_by_its_folder(
    here: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained["moons"], "run")

    def stop(*_: object, **__: object) -> None:
        raise signals.Stopped(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train", stop)
    done = call("train", "run")
    assert done.code == 128 + signal.SIGTERM
    assert done.err.endswith("stopped by SIGTERM; resume with:  dumo train run\n")


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["sample", "run", "--out", "new"], signal.SIGUSR1),
        (["evaluate", "run", "--nfe", "1"], signal.SIGTERM),
        (["report", "run"], signal.SIGHUP),
        (["sample", "run", "--checkpoints", "all"], signal.SIGINT),
    ],
)
def test_a_signal_ends_work_between_its_pieces(
    words: list[str], number: int, here: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heard while the run is opened, which has no pieces; nothing is half-written."""
    shutil.copytree(trained["moons"], "run")
    opened, before = weights.load_net, tree(here)

    def load(*told: object) -> object:
        os.kill(os.getpid(), number)
        return opened(*told)

    monkeypatch.setattr(weights, "load_net", load)
    done = call(*words)
    assert (done.code, done.out) == (128 + number, "")
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    assert done.err == f"stopped{by}\n"
    assert tree(here) == before


def test_a_name_does_not_steer_the_terminal(here: Path) -> None:
    done = call("sample", "a\x1b[2Jb")
    assert done.err.startswith("error: a\\x1b[2Jb is not a run's folder")


@pytest.mark.slow
def test_what_is_printed_of_a_name_with_a_dash_can_be_typed(here: Path) -> None:
    first = call("train", "moons", "--out", "-x", *TINY)
    assert first.code == 0
    _, _, line = first.err.splitlines()[-1].partition("next:  ")
    words = [shlex.split(one)[1:] for one in line.split("    ")]
    assert [one[:2] for one in words] == [["sample", "./-x"], ["evaluate", "./-x"], ["report", "./-x"]]
    assert call(*words[0], "--count", "1", "--nfe", "1").code == 0
    shutil.rmtree("-x/checkpoints")
    refused("sample", "./-x", named=("-x has no checkpoint",))


@pytest.mark.nightly
def test_the_start_line(here: Path) -> None:
    """Printed without a terminal, too."""
    done = call("train", "digits", "--out", "run", *TINY, "--device", "cpu")
    began, objective, *_ = done.err.splitlines()
    facts = call("show", "run", "--json").json
    assert began == (
        "training run on cpu: data digits (1,797 images in 10 classes), "
        f"net dit ({facts['parameters']:,} parameters), steps 0 to 20 of 16 images"
    )
    assert objective.startswith("objective: DuMo (Duality Models, arXiv 2602.17682, Sec. 3 and Alg. 1): one input")
    done = call("train", "moons", *TINY, "train.steps=1")
    assert "data moons (points drawn anew), net mlp" in done.err.splitlines()[0]


@pytest.mark.slow
def test_warnings_are_plain_lines(here: Path) -> None:
    Path("album/a").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (8, 8), (i, i, i)).save(f"album/a/{i}.png")
    Path("album/a/bad.png").write_text("no image")
    words = ["data.kind=images", "data.root=album", "data.side=8", "data.on_bad=skip", "data.classes=0"]
    words += ["data.labelled=false", "evaluate.protocol.kind=folder", "evaluate.protocol.frechet=false"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as a user's Python has it, not as pytest
        done = call("train", "digits", "--out", "run", *TINY[:-1], *words, "train.steps=1")
    assert done.code == 0, done
    (line,) = [line for line in done.err.splitlines() if "bad.png" in line]
    assert line.startswith("warning: 1 of 9 images cannot be read")
    assert "UserWarning" not in done.err


def command(*words: str, **options: object) -> "subprocess.Popen[str]":
    """`dumo WORDS`, its output where the options say."""
    environment = {**ENVIRONMENT, **{name: str(value) for name, value in options.pop("env", {}).items()}}
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'dumo'; from dumo.cli import main; main()", *words],
        env=environment,
        text=True,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", [["recipes"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(words: list[str]) -> None:
    """`dumo recipes | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = finish(command(*words, stdout=write, stderr=subprocess.PIPE))
    os.close(write)
    assert done.err == ""
    assert done.code == 1


@pytest.mark.parametrize("words", [["recipes"], pytest.param(["recipes", "--schema"], marks=pytest.mark.nightly)])
@pytest.mark.parametrize("stdout", [">&-", "> /dev/full"])
def test_an_answer_that_nobody_gets_is_an_error(words: list[str], stdout: str) -> None:
    """`dumo recipes >&-`: the first prints as it goes, the second at the end."""
    typed = f"{shlex.join([sys.executable, '-m', 'dumo', *words])} {stdout}"
    done = subprocess.run(["sh", "-c", typed], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: reading or writing: ")


@pytest.mark.nightly
def test_completion(tmp_path: Path) -> None:
    def completed(text: str) -> list[str]:
        asked = {"_DUMO_COMPLETE": "complete_bash", "COMP_WORDS": text, "COMP_CWORD": len(text.split(" ")) - 1}
        done = finish(command(env=asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert done.code == 0, done
        return done.out.split()

    assert completed("dumo tr") == ["train"]
    assert completed("dumo train moons-m") == ["moons-meanflow"]
    assert completed("dumo train runs/") == []  # the shell completes files
    home = {"HOME": tmp_path, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # not what shell the tests run in
    done = finish(command("--install-completion", "bash", env=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert done.code == 0, done
    assert "_DUMO_COMPLETE" in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
