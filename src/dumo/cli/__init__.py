"""The command line: `main` runs a command, and leaves with its exit code. `Program` and `Bench` list the commands.

Exit codes: 0 done, 1 failed, 2 what the user gave was wrong, 128 + n stopped by signal n (130: Ctrl-C; 142: its time
was over before its photos were encoded). Progress goes to stderr, answers to stdout.

The order of events: typer reads the first word, `LazyGroup` imports that command's module, its function runs under
`stoppable`, and `run_command` explains an error. torch is imported inside the
commands, so that help and mistakes are answered at once.

This subpackage alone touches the terminal; the work of a command is done by the subpackages below it.
"""

import sys
from collections.abc import Mapping
from typing import Annotated, ClassVar, NoReturn

import typer

from dumo import runtime
from dumo.cli.command import Entry, LazyGroup
from dumo.cli.terminal import err, explain, plain_warnings, reopen_streams, silenced_other_ranks
from dumo.error import UserError
from dumo.runtime import door

_PREFLIGHT = "dumo.cli.preflight"
# The headings of help
MAKE = "Make images"
TRAIN = "Train"
BEFORE = "Before you train"
JUDGE = "Judge"
LOOK = "Look"
SHARE = "Share"
RESEARCH = "Research"


class Program(LazyGroup):
    """The commands of `dumo`, by what a person wants."""

    entries: ClassVar[Mapping[str, Entry]] = {
        "sample": Entry("dumo.cli.run", MAKE, "dumo sample digits-trained --nfe 1"),
        "demo": Entry("dumo.cli.demo", MAKE, "dumo demo cifar10-trained"),
        "recipes": Entry(_PREFLIGHT, TRAIN, "dumo recipes", keeps_work=False),
        "train": Entry("dumo.cli.run", TRAIN, "dumo train digits --set train.steps=500", resumes=True),
        "encode": Entry("dumo.cli.run", TRAIN, "dumo encode cifar10-latents", resumes=True),
        "data": Entry(_PREFLIGHT, TRAIN, "dumo data cifar10", keeps_work=False),
        "show": Entry(_PREFLIGHT, BEFORE, "dumo show digits", keeps_work=False),
        "dry": Entry(_PREFLIGHT, BEFORE, "dumo dry imagenet256-xl2 --ranks 8 --fit 80GiB", keeps_work=False),
        "doctor": Entry(_PREFLIGHT, BEFORE, "dumo doctor digits", keeps_work=False),
        "evaluate": Entry("dumo.cli.evaluate", JUDGE, "dumo evaluate runs/digits"),
        "compare": Entry("dumo.cli.evaluate", JUDGE, "dumo compare runs/digits runs/digits-meanflow"),
        "report": Entry("dumo.cli.run", LOOK, "dumo report runs/digits"),
        "grid": Entry("dumo.cli.run", LOOK, "dumo grid digits-trained --nfe 1,2,4"),
        "export": Entry("dumo.cli.export", SHARE, "dumo export runs/digits digits-diffusers"),
        "reproduce": Entry("dumo.cli.lab", RESEARCH, "dumo reproduce fig3 --scale smoke", resumes=True),
        "average": Entry("dumo.cli.run", RESEARCH, "dumo average runs/cifar10-overnight --std 0.08"),
    }


class Bench(LazyGroup):
    """The commands of `dumo bench`."""

    entries: ClassVar[Mapping[str, Entry]] = {
        "step": Entry("dumo.cli.lab", example="dumo bench step digits --slope dual"),
        "sample": Entry("dumo.cli.lab", example="dumo bench sample digits --nfe 1,2"),
        "data": Entry("dumo.cli.lab", example="dumo bench data digits"),
    }


app = typer.Typer(
    name="dumo",
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Example:  dumo train digits\n\n"
    "Train generative models that make an image in one or two network evaluations.\n\n"
    "Then  dumo sample runs/digits,  dumo evaluate runs/digits,  dumo report runs/digits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
benches = typer.Typer(
    cls=Bench,
    no_args_is_help=True,
    help="Example:  dumo bench step digits\n\nTime steps, sampling and reading data on this machine.",
)
app.add_typer(
    benches, name="bench", rich_help_panel=RESEARCH, short_help="Time steps, sampling and reading data on this machine."
)


def show_version(version: bool) -> None:
    """Print the version and leave, where --version is given."""
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
    """Run the command line, and turn every failure into a plain line and an exit code."""
    reopen_streams()
    with silenced_other_ranks() as leave:
        leave(run_command())


def run_command() -> int:
    """Run the command, print the line of an error that is known, and return the exit code. Raises other errors."""
    code = 0
    try:
        if sys.platform == "win32":
            raise UserError("dumo needs Linux, macOS or WSL 2, not Windows itself: type wsl --install, and go on there")
        try:
            with door.command_line(), plain_warnings():
                app()
        except SystemExit as end:  # typer's, always
            code = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        message, code = explained
        err.print(f"error: {message}", soft_wrap=True)
    return code
