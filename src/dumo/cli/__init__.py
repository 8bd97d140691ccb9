"""The command line: the commands of `dumo`, and `main`, which runs one and exits with its exit code.

Exit codes: 0 done, 1 failed, 2 what the user gave was wrong, 128 + n stopped by signal n (130: Ctrl-C). Progress goes
to stderr, answers to stdout.

A module here has the commands of its name. It checks options, calls the package that does the work, and prints what
comes back; only this package touches the terminal. torch is imported inside the commands, so that help is fast.
"""

import sys
from typing import Annotated, NoReturn

import typer

from dumo import runtime
from dumo.cli import compare, demo, encode, evaluate, export, lab, recipes, report, sample, show, train
from dumo.cli.command import Command
from dumo.cli.terminal import err, explain, plain_warnings, reopen_streams, silenced_other_ranks, stoppable

# The headings of help.
MAKE = "Make images"
TRAIN = "Train"
BEFORE = "Before you train"
JUDGE = "Judge"
LOOK = "Look"
SHARE = "Share"
RESEARCH = "Research"

app = typer.Typer(
    name="dumo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Example:  dumo train digits\n\n"
    "Train generative models that make an image in one or two network evaluations.\n\n"
    "Then  dumo sample runs/digits,  dumo evaluate runs/digits,  dumo report runs/digits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command, rich_help_panel=MAKE)(stoppable(sample.sample))
app.command(cls=Command, rich_help_panel=MAKE)(stoppable(demo.demo))
app.command(cls=Command, rich_help_panel=TRAIN)(stoppable(recipes.recipes, between_pieces=False))
app.command(cls=Command, rich_help_panel=TRAIN)(stoppable(train.train))
app.command(cls=Command, rich_help_panel=TRAIN)(stoppable(encode.encode))
app.command(cls=Command, rich_help_panel=BEFORE)(stoppable(show.show, between_pieces=False))
app.command(cls=Command, rich_help_panel=JUDGE)(stoppable(evaluate.evaluate))
app.command(cls=Command, rich_help_panel=JUDGE)(stoppable(compare.compare))
app.command(cls=Command, rich_help_panel=LOOK)(stoppable(report.report))
app.command(cls=Command, rich_help_panel=SHARE)(stoppable(export.export))
app.command(cls=Command, rich_help_panel=RESEARCH)(stoppable(lab.reproduce))
app.command(cls=Command, rich_help_panel=RESEARCH)(stoppable(lab.bench))


def show_version(version: bool) -> None:
    """Print the version and exit, if --version is given."""
    if version:
        print(f"dumo {runtime.version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options before a command."""


def main() -> NoReturn:
    """Run the command line, and turn every failure into one line and an exit code."""
    reopen_streams()
    with silenced_other_ranks() as leave:
        leave(run_command())


def run_command() -> int:
    """Run the command and return its exit code. Print the line of an error that is known, and raise any other."""
    code = 0
    try:
        try:
            with plain_warnings():
                app()
        except SystemExit as end:  # typer always ends by one
            code = end.code if isinstance(end.code, int) else 1
        # A full disk, or a reader that has closed the pipe, is an error here and not at exit, where it would be lost.
        sys.stdout.flush()
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        message, code = explained
        err.print(f"error: {message}", soft_wrap=True)
    return code
