"""The command line: `main` runs a command, and leaves with its exit code. `Program` and `Bench` list the commands.

Exit codes: 0 done, 1 failed, 2 what the user gave was wrong, 128 + n stopped by signal n (130: Ctrl-C). Progress goes
to stderr, answers to stdout.

The order of events: typer reads the first word, `LazyGroup` imports that command's module, its function runs under
`stoppable`, and `exit_code` explains an error. torch is imported inside the commands, so that help answers at once.

This subpackage alone touches the terminal; the work of a command is done by the subpackages below it.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from dumo import runtime
from dumo.cli.option import with_trust_code
from dumo.cli.terminal import err, explain, plain_warnings, rank_0_speaks, reopen_streams, stoppable
from dumo.runtime import door

PLANS = "dumo.cli.preflight"  # a signal ends its commands at once: they keep nothing


class Command(TyperCommand):
    """A command that answers an option of another trainer with ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401, typer's own
        """Parse as typer does. Raises UserError for an option of another trainer, with dumo's name for it."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            from dumo.config.foreign import ours

            name = getattr(error, "option_name", "")
            hint = ours(name)
            if not hint:
                raise
            from dumo.types import UserError

            raise UserError(f"there is no option {name}: {hint}") from error


class LazyGroup(TyperGroup):
    """A group of commands whose modules are imported when a command is called, or help lists all."""

    homes: ClassVar[Mapping[str, str]]  # the module of each command, where the command's function has its name

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, typer's own
        """The names of all commands, in the order of help."""
        return [*dict.fromkeys([*self.homes, *self.commands])]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401, typer's own
        """The command of this name; None: there is none, and all are imported, so that typer can suggest one."""
        if cmd_name not in self.commands:
            names = [cmd_name] if cmd_name in self.homes else [*self.homes]
            for name in names:
                self.add_command(self._import_command(name))
        return super().get_command(ctx, cmd_name)

    def _import_command(self, name: str) -> Any:  # noqa: ANN401, a command of typer
        """Make the command of a function, which is imported."""
        module = self.homes[name]
        function = stoppable(getattr(import_module(module), name), keeps=module != PLANS)
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(name, cls=Command)(with_trust_code(function))
        return typer.main.get_command(single)


class Program(LazyGroup):
    """The commands of `dumo`."""

    homes: ClassVar[Mapping[str, str]] = {
        "recipes": PLANS,
        "show": PLANS,
        "dry": PLANS,
        "doctor": PLANS,
        "data": PLANS,
        "encode": "dumo.cli.run",
        "train": "dumo.cli.run",
        "log": "dumo.cli.evaluate",
        "sample": "dumo.cli.run",
        "grid": "dumo.cli.run",
        "average": "dumo.cli.run",
        "evaluate": "dumo.cli.evaluate",
        "compare": "dumo.cli.evaluate",
        "report": "dumo.cli.run",
        "reproduce": "dumo.cli.lab",
        "export": "dumo.cli.export",
        "demo": "dumo.cli.demo",
    }


class Bench(LazyGroup):
    """The commands of `dumo bench`."""

    homes: ClassVar[Mapping[str, str]] = {"step": "dumo.cli.lab", "sample": "dumo.cli.lab", "data": "dumo.cli.lab"}


app = typer.Typer(
    name="dumo",
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train generative models that make an image in one or two network passes.\n\n"
    "Start with  dumo train digits,  then  dumo sample,  dumo evaluate  and  dumo report  with  runs/digits.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
benches = typer.Typer(
    cls=Bench, no_args_is_help=True, help="Measure training steps, sampling and reading data on this machine."
)
app.add_typer(benches, name="bench")


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
    with rank_0_speaks() as leave:
        leave(exit_code())


def exit_code() -> int:
    """Run the command, print the line of an error that is known, and return the exit code. Raises other errors."""
    code = 0
    try:
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
