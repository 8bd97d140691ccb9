"""An error that `mutants.py` plants in a test's process and, where they import this first, in those that it starts."""

import gc
import json
import os
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FunctionType

TOLD = "DUMO_PLANTED"  # the environment variable by which processes pass it on
METHOD = "DUMO_FORK"  # that by which a test's process says that its programs are forked from itself, error and all


class Plant(MetaPathFinder, SourceFileLoader):
    """Imports one module from a text with the error in it, whatever its file and what was compiled of it say."""

    def __init__(self, name: str, path: str, text: str) -> None:
        """Of the module of this name, in the file of this path."""
        super().__init__(name, path)
        self.text = text

    def plant(self) -> None:
        """From now on, here and in processes that are started."""
        sys.meta_path.insert(0, self)
        os.environ[TOLD] = json.dumps([self.name, self.path, self.text])

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """Of this module alone."""
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        """Of the text with the error."""
        return compile(self.text, self.path, "exec", dont_inherit=True)

    def wrong_functions(self) -> list[tuple[CodeType, CodeType]]:
        """The right code and the wrong of the functions that have the error; none where it stands outside of them."""
        right = compile(Path(self.path).read_text(), self.path, "exec", dont_inherit=True)
        wrong = self.get_code(self.name)
        if outside(right) != outside(wrong):
            return []
        return [pair for pair in zip(functions(right), functions(wrong), strict=True) if pair[0] != pair[1]]

    def patch(self, imported: dict[tuple[object, ...], list[FunctionType]]) -> None:
        """Give imported functions the error, and pass it on to processes that are started."""
        for right, wrong in self.wrong_functions():
            for function in imported.get(place(right), ()):
                function.__code__ = wrong
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


def functions_by_place() -> dict[tuple[object, ...], list[FunctionType]]:
    """Every function that there is."""
    found: dict[tuple[object, ...], list[FunctionType]] = {}
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType):
            found.setdefault(place(thing.__code__), []).append(thing)
    return found


def place(code: CodeType) -> tuple[object, ...]:
    """Where it stands in its file."""
    return code.co_filename, code.co_qualname, *next(code.co_positions(), ())


if TOLD in os.environ:
    Plant(*json.loads(os.environ[TOLD])).plant()
