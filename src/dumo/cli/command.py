"""Commands and groups as the command line has them: imported when they are called, and clear about wrong words.

- `LazyGroup` is a group of commands. Its `entries` say where each is; the module is imported once a command is called,
  so help and mistakes cost no import.
- `Command` is one command. A word that is none of its options or arguments is answered with dumo's name for it: of a
  word of other programs by `dumo.cli.foreign`, of a wrong spelling by `dumo.config.suggestion`.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import cleandoc
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from dumo.cli.option import with_trust_code
from dumo.cli.terminal import stoppable
from dumo.error import UserError

_SET = "--set"


class Entry(NamedTuple):
    """Where a command is, and what help says of it besides its function's docstring, whose first line is its own."""

    module: str  # where the command's function has its name
    panel: str | None = None  # the heading in help under which it stands
    example: str = ""  # a command line that works, with which its help begins
    keeps_work: bool = True  # whether a signal waits for a piece of work; else it ends the command at once
    resumes: bool = False  # whether the command, typed again after a signal, goes on from what is kept


class Command(TyperCommand):
    """A command that answers options and settings of other programs with ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401, typer's own
        """Parse as typer does. Raises UserError for an option, or a word too many, for which dumo has a name."""
        words = list(args)  # typer empties the list
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            message = self._message(error, words, ctx.command_path)
            if not message:
                raise
            raise UserError(message) from error

    def _message(self, error: Exception, words: Sequence[str], command_path: str) -> str:
        """What to say instead of typer's error; "": it says enough. `command_path` is such as dumo train."""
        has_set = any(_SET in parameter.opts for parameter in self.params)
        if hasattr(error, "possibilities"):  # typer's NoSuchOption, which it does not show to others
            option = str(getattr(error, "option_name", ""))
            hint = self._option_hint(option) or f"{command_path} --help lists all"
            return f"there is no option {option}: {hint}"
        if has_set and "unexpected extra argument" in str(getattr(error, "message", "")):
            return self._setting_hint(words)
        return ""

    def _option_hint(self, option: str) -> str | None:
        """What was meant by an option that the command does not have; None or "": not known."""
        from dumo.cli.foreign import near_option, our_option
        from dumo.config.suggestion import nearest_option

        command = self.name or ""
        options = [name for parameter in self.params for name in parameter.opts if name.startswith("-")]
        return (
            our_option(command, option, options)
            or nearest_option(option, options)
            or near_option(command, option, options)
        )

    def _setting_hint(self, words: Sequence[str]) -> str:
        """The --set that was meant, where a setting was typed as words: train.steps=100, or --set train.steps 100.

        "": there is no such setting among the words.
        """
        options_with_value = {name for parameter in self.params if _takes_value(parameter) for name in parameter.opts}
        for i, word in enumerate(words):
            if word.startswith("-"):
                continue
            word_before = words[i - 1] if i > 0 else ""
            word_after = words[i + 1] if i + 1 < len(words) else ""
            is_after_set = word_before == _SET
            is_value_after = word_after != "" and not word_after.startswith("-")
            if is_after_set and "=" not in word and is_value_after:  # --set train.steps 100
                return f"{_SET} {word}: write it as a.b=c, {_SET} {word}={word_after}"
            if not is_after_set and "=" in word and word_before not in options_with_value:  # train.steps=100
                return f"{word} is no argument: to set a field write {_SET} {word}"
        return ""


def _takes_value(parameter: Any) -> bool:  # noqa: ANN401, typer's own
    """Whether a parameter is an option whose value is the next word."""
    is_option = parameter.param_type_name == "option"
    return is_option and not parameter.is_flag and not parameter.count


class LazyGroup(TyperGroup):
    """A group of commands whose modules are imported when a command is called, or help lists all."""

    entries: ClassVar[Mapping[str, Entry]]  # by command, in the order of help

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, typer's own
        """The names of all commands, in the order of help."""
        return [*dict.fromkeys([*self.entries, *self.commands])]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401, typer's own
        """The command of this name; None: there is none."""
        if cmd_name in self.entries and cmd_name not in self.commands:
            self.add_command(self._import_command(cmd_name))
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401, typer's own
        """The command that is called. Raises UserError for what is none, with the nearest."""
        name = args[0]
        if name not in self.entries and name not in self.commands:
            _refuse_command(name, self.list_commands(ctx), ctx.command_path, is_first=ctx.parent is None)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401, typer's own
        """Parse the words before a command. Raises UserError for an option of another program."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            from dumo.cli.foreign import our_command

            option = getattr(error, "option_name", "")
            hint = our_command(option)
            if not hint:
                raise
            raise UserError(f"there is no option {option}: {hint}") from error

    def _import_command(self, name: str) -> Any:  # noqa: ANN401, a command of typer
        """Make the command of a function, which is imported."""
        entry = self.entries[name]
        command = getattr(import_module(entry.module), name)
        function = stoppable(command, keeps_work=entry.keeps_work, resumes=entry.resumes)
        text = cleandoc(function.__doc__ or "")
        program = typer.Typer(add_completion=False, rich_markup_mode="rich")  # typer makes commands of a program only
        add_command = program.command(
            name,
            cls=Command,
            help=f"Example:  {entry.example}\n\n{text}",
            short_help=text.partition("\n")[0],
            rich_help_panel=entry.panel,
        )
        add_command(with_trust_code(function))
        return typer.main.get_command(program)


def _refuse_command(name: str, commands: list[str], group_path: str, *, is_first: bool) -> None:
    """Raise UserError for a word that is no command of a group, and say which was meant.

    `group_path` is such as dumo bench; `is_first`: the word may be a command of another program, or the word after
    train.
    """
    from dumo.cli.foreign import our_command
    from dumo.config import recipes
    from dumo.config.suggestion import nearest_few

    hint = our_command(name) if is_first else None
    if hint is None and is_first and name in recipes.names():
        hint = f"it is a recipe, dumo train {name}"
    if hint is None:
        hint = f"{nearest_few(name, commands)}{group_path} --help lists all"
    raise UserError(f"there is no command '{name}': {hint}")
