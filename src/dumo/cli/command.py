"""The class of dumo's commands. Their help begins with examples, and an unknown option is a one-line error."""

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from dumo.error import UserError

_EXAMPLES = "\n\nExamples:\n"


class Command(TyperCommand):
    """A command whose docstring ends with a list of examples."""

    def __init__(self, *words: Any, help: str, **options: Any) -> None:  # noqa: ANN401, as typer has them
        """Put the examples first. The first line of the docstring describes the command in the list of commands."""
        text, _, examples = help.partition(_EXAMPLES)
        options["short_help"] = text.partition("\n")[0]
        # The lines of a paragraph are wrapped to the terminal's width; \b keeps the lines of the examples.
        paragraphs = [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]
        super().__init__(*words, help="\n\n".join([f"\b\n{examples}", *paragraphs]), **options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401, a private class of typer
        """Parse the words after a command. Raises UserError with a suggestion for an unknown option."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            # typer's error class is private. Only this error has `possibilities`, options with a similar name.
            unknown: Any = error
            if not hasattr(unknown, "possibilities"):
                raise
            hint = self._hint(unknown.option_name, unknown.possibilities or ())
            raise UserError(f"there is no option {unknown.option_name}; {hint}") from None

    def _hint(self, option: str, similar_options: Sequence[str]) -> str:
        """Return a suggestion for an unknown option: a field, such as batch for --batch-size, or an option."""
        from dumo.config.messages import field_paths, nearest_field
        from dumo.config.overrides import SHORT_FORMS
        from dumo.config.spec import Run

        if any(parameter.name == "overrides" for parameter in self.params):
            name = option.lstrip("-").replace("-", "_")
            is_field = name in SHORT_FORMS or name in field_paths(Run)
            field = name if is_field else nearest_field(name)
            if is_field or (field and not similar_options):
                return f"did you mean {field}=VALUE, without dashes?"
        if similar_options:
            return f"did you mean {' or '.join(similar_options)}?"
        return f"dumo {self.name} --help lists all"
