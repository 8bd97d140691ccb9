"""The command line: `main` runs a command, and leaves with its exit code. COMMANDS lists them.

Exit codes: 0 done, 1 failed, 2 what the user gave was wrong, 128 + n stopped by signal n (130: Ctrl-C). Progress goes
to stderr, answers to stdout. torch is imported inside the commands, so that help answers at once.

This subpackage alone touches the terminal; the work of a command is done by the subpackages below it.
"""

import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from dumo import runtime
from dumo.cli import evaluate, lab, preflight, run, share
from dumo.cli.option import with_trust_code
from dumo.cli.terminal import err, explain, plain_warnings, rank_0_speaks, reopen_streams, stoppable
from dumo.config.foreign import ours

app = typer.Typer(
    name="dumo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train generative models that make an image in one or two network passes.\n\n"
    "Start with  dumo train digits,  then  dumo sample,  dumo evaluate  and  dumo report  with  runs/digits.",
    context_settings={"help_option_names": ["-h", "--help"]},
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


PLANS = (
    preflight.recipes,
    preflight.show,
    preflight.dry,
    preflight.doctor,
    preflight.data,
)  # a signal ends these at once: they keep nothing
COMMANDS = (
    *PLANS,
    run.encode,
    run.train,
    evaluate.log,
    run.sample,
    run.grid,
    run.average,
    evaluate.evaluate,
    evaluate.compare,
    run.report,
    lab.reproduce,
    share.export,
    share.demo,
)


class Command(TyperCommand):
    """A command that answers an option of another trainer with ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401, typer's own
        """Parse as typer does. Raises UserError for an option of another trainer, with dumo's name for it."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            name = getattr(error, "option_name", "")
            hint = ours(name)
            if not hint:
                raise
            from dumo.types import UserError

            raise UserError(f"there is no option {name}: {hint}") from error


for command in COMMANDS:
    app.command(cls=Command)(with_trust_code(stoppable(command, keeps=command not in PLANS)))

benches = typer.Typer(no_args_is_help=True, help="Measure training steps, sampling and reading data on this machine.")
for command in (lab.step, lab.sample, lab.data):
    benches.command()(with_trust_code(stoppable(command)))
app.add_typer(benches, name="bench")


def main() -> NoReturn:
    """Run the command line, and turn every failure into a plain line and an exit code."""
    reopen_streams()
    with rank_0_speaks() as leave:
        leave(exit_code())


def exit_code() -> int:
    """Run the command, print the line of an error that is known, and return the exit code. Raises other errors."""
    code = 0
    try:
        try:
            with plain_warnings():
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
