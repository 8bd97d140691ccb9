"""Every command on the runs that come with dumo, without a network, DUMO_DATA or any other file."""

import re
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import typer

from dumo import cli
from dumo.io import run_places
from e2e.shell import call, finish, start, wait
from forked import ENVIRONMENT
from tiers import tiered

DIGITS, CIFAR10 = "digits-trained", "cifar10-trained"
FEW_SAMPLES = {DIGITS: ["evaluate.protocol.samples=500"], CIFAR10: ["evaluate.protocol.samples=1000"]}
LABEL = {DIGITS: "3", CIFAR10: "cat"}  # as docs/trained.md types it
NO_RUN = {"recipes", "reproduce"}  # commands that take no run


class Case(NamedTuple):
    """A command line on a run, and what it leaves in the current folder, as patterns of paths of files."""

    command: str
    files: tuple[str, ...] = ()
    out: str = ""  # what stdout says, as a pattern
    refused: str = ""  # the error, as a pattern, where the run has nothing for the command


CASES = {
    "show": Case("show {name}", out="parameters"),
    "show --cost": Case("show {name} --cost", out="Memory"),
    "show --check": Case("show {name} --check", out="slope"),
    "sample": Case("sample {name} --labels {label} --count 2 --nfe 1", files=(r"{name}/samples/.*\.png",)),
    "sample checkpoints": Case(
        "sample {name} --checkpoints all --nfe 1 --count 1", files=(r"{name}/samples/[\w-]+\.png",)
    ),
    "compare": Case("compare {name} dumo:{name}", out="perfect sampler"),
    "evaluate": Case("evaluate {name} --nfe 1 {few}", files=(r"{name}/evaluation-.*\.json",)),
    "report": Case("report {name}", files=(r"{name}/report\.html",)),
    "bench": Case("bench {name} train.batch=32 --rounds 1 --slope dual", out="F"),
    "train": Case("train {name} train.steps=1 train.batch=32", files=(r"runs/{name}/.*",), refused="{train}"),
    "encode": Case("encode {name}", refused="{encode}"),
}
WORDS = {  # what a run lacks, by run and command
    DIGITS: {"encode": "not on latents", "train": ""},
    CIFAR10: {"encode": "on the Hub", "train": "on the Hub"},
}


@pytest.fixture(autouse=True)
def alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, without data or a network."""

    def refuse(*_: object) -> NoReturn:
        raise OSError("no network")

    monkeypatch.delenv("DUMO_DATA", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return here


def files(folder: Path) -> list[str]:
    """The files in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_command_that_takes_a_run_has_a_case() -> None:
    program: Any = typer.main.get_command(cli.app)
    own_tests = {"export", "demo"}  # below
    assert {key.split()[0] for key in CASES} | own_tests == {*program.commands} - NO_RUN


@pytest.mark.parametrize(
    ("name", "command"),
    tiered(
        [(name, command) for name in (DIGITS, CIFAR10) for command in CASES],
        now=[(CIFAR10, command) for command in ("sample", "compare", "encode")],
        ci=[(CIFAR10, "show"), (CIFAR10, "sample checkpoints"), (CIFAR10, "train")],
        id=lambda case: "-".join(case),
    ),
)
def test_a_command_takes_the_name_and_leaves_what_it_is_asked_for(alone: Path, name: str, command: str) -> None:
    before = files(run_places.FOLDER)
    case = CASES[command]
    words = {"name": name, **WORDS[name]}
    refused = case.refused.format(**words)
    line = case.command.format(name=name, few=" ".join(FEW_SAMPLES[name]), label=LABEL[name])
    done = call(*line.split())
    if refused:
        assert done.code == 2
        assert re.search(refused, done.err), done.err
    else:
        assert done.code == 0, done.err
        assert re.search(case.out.format(name=name), done.out), done.out
        patterns = [pattern.format(name=name) for pattern in case.files]
        made = files(alone)
        assert [file for file in made if not any(re.fullmatch(pattern, file) for pattern in patterns)] == []
        assert all(any(re.fullmatch(pattern, file) for file in made) for pattern in patterns), made
    assert files(run_places.FOLDER) == before  # it is only read


@pytest.mark.slow
@pytest.mark.parametrize("name", [DIGITS, CIFAR10])
def test_an_export_needs_no_place(alone: Path, name: str) -> None:
    """Nor diffusers, nor a network; and the export is sampled as the model is."""
    done = call("export", name)
    assert done.code == 0, done.err
    assert {path.split("/")[0] for path in files(alone)} == {f"{name}-diffusers"}
    done = call("sample", f"{name}-diffusers", "--labels", LABEL[name], "--nfe", "1")
    assert done.code == 0, done.err


@pytest.mark.nightly
@pytest.mark.usefixtures("default_signals")
def test_the_page_of_a_demo_leaves_nothing(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    monkeypatch.undo()  # the page is looked at by a socket
    env = {key: value for key, value in ENVIRONMENT.items() if key != "DUMO_DATA"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start("demo", CIFAR10, "--port", port, cwd=alone, env=env)

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}").status == 200
        except OSError:
            return False

    try:
        wait(process, answers)
    finally:
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert "Traceback" not in done.err
    assert files(alone) == []
