"""A command of `dumo`: its help begins with its examples, and an unknown option is answered in one line."""

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
        # The terminal breaks the lines of a paragraph anew; \b keeps those of the examples.
        paragraphs = [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]
        super().__init__(*words, help="\n\n".join([f"\b\n{examples}", *paragraphs]), **options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401, a private class of typer
        """Parse the words after a command. Raises UserError for an unknown option, with what may be meant."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            # The class of this error is private to typer. It alone has possibilities: options of a similar name.
            unknown: Any = error
            if not hasattr(unknown, "possibilities"):
                raise
            hint = self._hint(unknown.option_name, unknown.possibilities or ())
            raise UserError(f"there is no option {unknown.option_name}; {hint}") from None

    def _hint(self, option: str, similar_options: Sequence[str]) -> str:
        """What a person may mean by an unknown option: a field, as other trainers have --batch-size, or an option."""
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
