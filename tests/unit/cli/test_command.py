"""The tables of commands: what is checked before torch is imported is what the work behind it knows, and help works."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import typer

from dumo import cli
from dumo.cli import command, preflight, terminal
from dumo.cli.foreign import FOREIGN_COMMANDS, FOREIGN_OPTIONS
from dumo.config import recipes
from dumo.config.load import load
from dumo.config.place import EVALUATION_FILE, LOG_FILE
from dumo.export import write
from dumo.io import trained
from dumo.lab import plan
from dumo.plan import catalogue
from dumo.report import benchmark, images, tracker
from dumo.report import sample as report_sample
from dumo.types import UserError
from e2e.shell import call

ENTRIES = {**cli.Program.entries, **{f"bench {name}": entry for name, entry in cli.Bench.entries.items()}}


def parameters_of(name: str) -> dict[str, Any]:
    """The parameters of a command, by each of their words."""
    group: Any = typer.main.get_command(cli.app)
    return {word: parameter for parameter in group.get_command(None, name).params for word in parameter.opts}


@pytest.mark.parametrize(
    ("name", "word", "known"),
    [
        ("sample", "--format", [*report_sample.FORMS, *benchmark.LAYOUTS]),
        ("export", "--to", write.FORMS),
        ("export", "--parts", write.PARTS),
        ("export", "--dtype", write.DTYPES),
        ("data", "name", [item.name for item in catalogue.CATALOGUE]),
        ("reproduce", "name", plan.plan_names()),
        ("reproduce", "--scale", plan.SCALES),
        ("train", "--track", tracker.TRACKERS),
    ],
)
def test_an_option_takes_what_the_work_knows(name: str, word: str, known: Iterable[str]) -> None:
    context: Any = None
    parameter = parameters_of(name)[word]
    for value in known:
        assert parameter.callback(context, parameter, value) == value
    with pytest.raises(UserError, match=r"there is no .*'xyzzy'; valid: " + ", ".join(known)):
        parameter.callback(context, parameter, "xyzzy")


def test_help_names_every_protocol_of_images() -> None:
    help_text = parameters_of("evaluate")["--protocol"].help
    assert {*images.KINDS} <= {*re.findall(r"[\w-]+", help_text)}


def test_the_words_of_others_lead_to_words_of_ours() -> None:
    for meant in FOREIGN_COMMANDS.values():
        program, name, *_ = meant.replace(",", "").split()
        assert program == "dumo"
        assert name in {*cli.Program.entries, "bench", "--help", "--version"}
    for name, options in FOREIGN_OPTIONS.items():
        own = parameters_of(name)
        for other, (meant, _) in options.items():
            assert f"--{other.replace('_', '-')}" not in own, "it would never be asked for"
            if meant.startswith("--"):
                assert meant.split()[0] in own


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the runs that examples name."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits-meanflow", "cifar10-overnight"):
        run = shutil.copytree(trained.folder("digits-trained"), tmp_path / "runs" / name)
        for file in (EVALUATION_FILE, LOG_FILE):
            (run / file).touch()


@pytest.mark.parametrize("name", ENTRIES)
def test_help_begins_with_an_example_that_is_taken(
    name: str, desk: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is parsed, and what it names is looked up; then the command would begin."""
    begun: list[str] = []

    def record(function: Callable[..., None], *, keeps_work: bool, resumes: bool) -> Callable[..., None]:
        @wraps(function)
        def begin(*words: object, **options: object) -> None:
            begun.append(function.__name__)

        return begin

    monkeypatch.setattr(command, "stoppable", record)
    program, *words = shlex.split(ENTRIES[name].example)
    assert (program, " ".join(words)[: len(name)]) == ("dumo", name)
    done = call(*words)
    assert done.code == 0, done
    assert begun == [name.split()[-1]]
    lines = [line.strip() for line in call(*name.split(), "--help").out.splitlines() if line.strip()]
    assert lines[1] == f"Example:  {ENTRIES[name].example}"


def test_the_run_in_the_example_of_average_keeps_snapshots() -> None:
    _, _, folder, *_ = shlex.split(ENTRIES["average"].example)
    assert load(Path(folder).name).train.snapshots


def test_windows_is_told_where_dumo_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    done = call("recipes")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: dumo needs Linux, macOS or WSL 2, ")


def test_help_is_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command has its heading, and one line of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("--help").out.splitlines()
    headings = [line.strip("╭╮─ ") for line in lines if line.startswith("╭")]
    assert headings == ["Options", *dict.fromkeys(entry.panel for entry in cli.Program.entries.values())]
    commands = lines[lines.index(next(line for line in lines if "Make images" in line)) :]
    rows = [line.strip("│ ").split(maxsplit=1) for line in commands if line.startswith("│")]
    assert [row[0] for row in rows] == [*cli.Program.entries, "bench"]
    assert all(row[1].endswith(".") for row in rows)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("train.steps=3", "train.steps=3 is no argument: to set a field write --set train.steps=3"),
        ("--set train.steps 3", "--set train.steps: write it as a.b=c, --set train.steps=3"),
        ("--out a=b train.steps=3", "train.steps=3 is no argument"),
        ("--out a=b extra", "unexpected extra argument"),  # the value of another option is no setting
        ("--set train.steps --accept extra", "unexpected extra argument"),  # nor is an option a value
    ],
)
def test_a_setting_that_was_typed_as_a_word_is_named(words: str, hint: str) -> None:
    done = call("train", "digits", *words.split())
    assert done.code == 2
    assert hint in " ".join(done.err.replace("│", "").split())


@pytest.mark.parametrize(
    ("words", "message"),
    [("dry nothing --share 2", "give as many by --ranks"), ("show nothing --yaml --json", "give one of them")],
)
def test_options_that_do_not_go_together_are_refused_before_the_run_is_read(words: str, message: str) -> None:
    done = call(*words.split())
    assert done.code == 2
    assert message in " ".join(done.err.replace("│", "").split())


def test_brackets_of_a_text_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They are no markup: [bold] neither vanishes nor styles the text behind it."""
    monkeypatch.setattr(recipes, "about", lambda name: "of [bold] x [0, 1] :cat:")
    preflight.recipes()
    terminal.show_table("[b]", [{"[red] a": "[blue] b"}])
    printed = capsys.readouterr().out
    for text in ("of [bold] x [0, 1] :cat:", "[b]", "[red] a", "[blue] b"):
        assert text in printed
