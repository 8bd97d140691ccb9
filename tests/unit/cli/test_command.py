"""The commands: help begins with two examples and fits on a screen; options take what the work behind them knows."""

import re
import shlex
from collections.abc import Iterable
from typing import Any, get_type_hints

import pytest
import typer

from docs.test_command import require_fields
from dumo import cli
from dumo.cli import export, lab, sample, terminal, train
from dumo.export import write
from dumo.lab import experiment
from dumo.report import benchmark, evaluate_images, tracker
from dumo.run import write_samples
from e2e.shell import call

PROGRAM: Any = typer.main.get_command(cli.app)
COMMANDS = PROGRAM.commands


def parameters_of(name: str) -> dict[str, Any]:
    """The parameters of a command, by each of their words."""
    return {word: parameter for parameter in COMMANDS[name].params for word in parameter.opts}


@pytest.mark.parametrize(
    ("command", "parameter", "known"),
    [
        (sample.sample, "form", [*write_samples.FORMS, *benchmark.LAYOUTS]),
        (export.export, "to", write.FORMS),
        (export.export, "parts", write.PARTS),
        (export.export, "dtype", write.DTYPES),
        (lab.reproduce, "scale", experiment.SCALES),
        (train.train, "track", tracker.TRACKERS),
    ],
)
def test_an_option_takes_what_the_work_knows(command: object, parameter: str, known: Iterable[str]) -> None:
    assert re.findall(r"'(\w+)'", str(get_type_hints(command)[parameter])) == [*known]


def test_help_names_every_protocol_of_images() -> None:
    help_text = parameters_of("evaluate")["--protocol"].help
    assert {*evaluate_images.KINDS} <= {*re.findall(r"[\w-]+", help_text)}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_two_examples_and_fits_on_a_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = call(name, "--help").out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    usage, *examples, summary = [line.strip() for line in lines if line.strip()][:4]
    assert usage.startswith("Usage: ")
    assert summary == COMMANDS[name].short_help
    for example in examples:
        program, command, *words = shlex.split(example.partition(" > ")[0])
        assert (program, command) == ("dumo", name)
        with COMMANDS[name].make_context(name, words) as context:
            require_fields(context.params.get("overrides") or [])


def test_help_is_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command has its heading, and one line of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("--help").out.splitlines()
    headings = [line.strip("╭╮─ ") for line in lines if line.startswith("╭")]
    assert headings == ["Options", *dict.fromkeys(command.rich_help_panel for command in PROGRAM.commands.values())]
    commands = lines[lines.index(next(line for line in lines if "Make images" in line)) :]
    rows = [line.strip("│ ").split(maxsplit=1) for line in commands if line.startswith("│")]
    assert [row[0] for row in rows] == [*PROGRAM.commands]
    assert all(row[1].endswith(".") for row in rows)


@pytest.mark.parametrize(("words", "meant"), [("traim digits", "train"), ("sample run --nfee 1", "--nfe")])
def test_a_wrong_word_is_answered_with_the_nearest(words: str, meant: str) -> None:
    done = call(*words.split())
    assert done.code == 2
    assert meant in "".join(done.err.splitlines()[-2:])


def test_brackets_of_a_text_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """They are no markup: [bold] neither vanishes nor styles the text behind it."""
    terminal.show_lines([("[bold] x", "[0, 1] :cat:")])
    terminal.show_table("[b]", [{"[red] a": "[blue] b"}])
    printed = capsys.readouterr().out
    for text in ("[bold] x", "[0, 1] :cat:", "[b]", "[red] a", "[blue] b"):
        assert text in printed
