"""A hash of the statements that declare a run: its fields, and the classes, types, kinds and bounds that these name.

`declarations_hash` reads source files, and imports none. It begins at the class `Run` and follows names from statement
to statement, so a file counts only as far as something that declares a run names what it defines.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path

_RUN_CLASS = "Run"  # from which all that declares a run is reached
# Where a file may define a class or a constant; four spaces: under an `if`.
_DEFINITION = re.compile(r"^(?: {4})?(?:class (\w+)|(_?[A-Z]\w*)(?:: [^=\n]+)? = )", re.MULTILINE)


@cache
def declarations_hash(package: Path) -> str:
    """A hash of the statements in a package that declare the fields of a run, and all classes and constants they name.

    These are, from the class `Run` on: of a class its name, its bases, and the fields in its body; of a constant, such
    as a bound, a type or a table of kinds, the whole assignment. Where several files define a name, all are taken.
    """
    files = [_SourceFile(file.read_text(encoding="utf-8")) for file in sorted(package.rglob("*.py"))]
    files_by_name: dict[str, list[_SourceFile]] = {}
    for file in files:
        for name in file.defined_names:
            files_by_name.setdefault(name, []).append(file)
    declarations: list[str] = []
    reached_names = {_RUN_CLASS}
    waiting_names = [_RUN_CLASS]
    while waiting_names:
        name = waiting_names.pop()
        for file in files_by_name.get(name, ()):
            for statement in file.statements_by_name.get(name, ()):
                text, names = file.declaration(statement)
                declarations.append(text)
                waiting_names += names - reached_names
                reached_names |= names
    return sha256("\n".join(sorted(declarations)).encode()).hexdigest()


class _SourceFile:
    """A file of Python, which is parsed once a name is looked up in it."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        """Its lines, without their ends."""
        return self.text.splitlines()

    @cached_property
    def defined_names(self) -> set[str]:
        """The names of classes and constants that the file may define, found without parsing it."""
        return {match[1] or match[2] for match in _DEFINITION.finditer(self.text)}

    @cached_property
    def statements_by_name(self) -> Mapping[str, Sequence[ast.stmt]]:
        """The classes and assignments of the module, also those under an `if`, by the name that they define."""
        statements: dict[str, list[ast.stmt]] = {}
        waiting = [*ast.parse(self.text).body]
        while waiting:
            statement = waiting.pop()
            match statement:
                case ast.If():
                    waiting += [*statement.body, *statement.orelse]
                case ast.ClassDef(name=name):
                    statements.setdefault(name, []).append(statement)
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    statements.setdefault(name, []).append(statement)
                case _:
                    pass  # it defines neither
        return statements

    def declaration(self, statement: ast.stmt) -> tuple[str, set[str]]:
        """The lines of a class or an assignment on which the schema of a run depends, and the names in them."""
        parts: list[ast.AST] = [statement]
        spans: list[tuple[int, int | None]] = [(statement.lineno, statement.end_lineno)]  # first and last lines
        if isinstance(statement, ast.ClassDef):
            parts = [*statement.bases, *statement.keywords]
            spans = [(statement.lineno, statement.body[0].lineno - 1)]
            for part in statement.body:
                match part:
                    case ast.AnnAssign() | ast.Assign(targets=[ast.Name(id="model_config")]):
                        parts.append(part)
                        spans.append((part.lineno, part.end_lineno))
                    case _:
                        pass  # a method, a docstring
        lines: list[str] = []
        for first, last in spans:
            lines += self.lines[first - 1 : last]
        names: set[str] = set()
        for part in parts:
            names |= _names_in(part)
        return "\n".join(lines), names


def _names_in(part: ast.AST) -> set[str]:
    """The names in a part of the code, also after a dot and in strings: of `limits.STEPS` and "module:Class"."""
    names: set[str] = set()
    for node in ast.walk(part):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                names.add(name)
            case ast.Constant(value=str(text)):
                names.update(re.findall(r"\w+", text))
            case _:
                pass
    return names
