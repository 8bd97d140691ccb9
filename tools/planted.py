"""An error that `mutants.py` plants: in functions that are imported, or as Python imports the file that has it.

What functions made while they were imported, tables for example, stays right. So does what reads a source, for the file
is right.
"""

import gc
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType

METHOD = "DUMO_FORK"  # the environment variable that says "fork": programs are forked from the test, with its error


class Plant(MetaPathFinder, SourceFileLoader):
    """A module whose text has an error, whatever its file says."""

    def __init__(self, name: str, path: str, text: str) -> None:
        """Of the module of this name, in the file of this path."""
        super().__init__(name, path)
        self.text = text

    def plant(self) -> None:
        """Whoever imports the module from now on gets the error."""
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """The spec of this module, None of any other."""
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        """Of the text with the error, not of the file or of what was compiled of it."""
        return compile(self.text, self.path, "exec", dont_inherit=True)

    def wrong_functions(self) -> list[tuple[CodeType, CodeType]]:
        """The right code and the wrong of the functions that have the error; none where it stands outside of them."""
        right = compile(Path(self.path).read_text(), self.path, "exec", dont_inherit=True)
        wrong = self.get_code(self.name)
        if outside(right) != outside(wrong):
            return []
        return [pair for pair in zip(functions(right), functions(wrong), strict=True) if pair[0] != pair[1]]

    def patch(self, imported: dict[tuple[str, CodeType], list[FunctionType]]) -> None:
        """Give the error to functions that are imported. Raises ValueError where none of them has it."""
        patched = 0
        for right, wrong in self.wrong_functions():
            for function in imported.get((right.co_filename, right), ()):
                function.__code__ = wrong
                patched += 1
        if not patched:
            raise ValueError(f"no imported function of {self.name} has the error")
        self.plant()


def functions(code: CodeType) -> Iterator[CodeType]:
    """All of a module, those within others included."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & CO_OPTIMIZED:  # no class
                yield constant
            yield from functions(constant)


def outside(code: CodeType) -> list[object]:
    """All of a module's code, or a class's, but its functions."""
    found: list[object] = [code.co_code, code.co_names]
    for constant in code.co_consts:
        if not isinstance(constant, CodeType):
            found.append(repr(constant))  # 1 is no True, and -0.0 no 0.0
        elif constant.co_flags & CO_OPTIMIZED:
            found.append(constant.co_qualname)
        else:
            found.append(outside(constant))
    return found


def functions_by_code() -> dict[tuple[str, CodeType], list[FunctionType]]:
    """Every function, by its file and code, but for those that `gc.freeze` has hidden."""
    found: dict[tuple[str, CodeType], list[FunctionType]] = {}
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType):
            found.setdefault((thing.__code__.co_filename, thing.__code__), []).append(thing)
    return found
