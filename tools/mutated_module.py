"""A module of dumo with a planted error, while its file stays as it is. Only `mutants.py` plants errors.

A `MutatedModule` holds the module's text with the error. The error gets into a process in one of two ways:

- `install` puts an import hook in place: who imports the module afterwards gets the text with the error.
- `patch_functions` gives the changed code to functions that are imported already, which `imported_functions` lists, and
  installs the hook. It works where the error changes functions and nothing else (`changed_functions`).

What functions have made while they were imported, tables for example, stays right. So does what reads a source file.
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

FunctionsByCode = dict[tuple[str, CodeType], list[FunctionType]]  # by file and code

# An environment variable. With the value "fork", tests/forked.py forks programs from the test, which has the error.
START_METHOD_VARIABLE = "DUMO_FORK"


class MutatedModule(MetaPathFinder, SourceFileLoader):
    """A module's name, file and text with an error; a finder and a loader for Python's import."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def install(self) -> None:
        """Let every later import of the module in this process find the text with the error."""
        sys.meta_path.insert(0, self)

    def patch_functions(self, imported: FunctionsByCode) -> None:
        """Put the error into functions that are imported, and into later imports.

        Raises ValueError where none of the imported functions has the error.
        """
        num_patched = 0
        for right_code, wrong_code in self.changed_functions():
            for function in imported.get((right_code.co_filename, right_code), ()):
                function.__code__ = wrong_code
                num_patched += 1
        if num_patched == 0:
            raise ValueError(f"no imported function of {self.name} has the error")
        self.install()

    def changed_functions(self) -> list[tuple[CodeType, CodeType]]:
        """The right and the wrong code of each function that the error changes.

        Empty where the error also changes code outside of functions. Raises ValueError where it adds or removes a
        function, SyntaxError where the text with the error is no Python.
        """
        right_module = compile(Path(self.path).read_text(), self.path, "exec", dont_inherit=True)
        wrong_module = self.get_code(self.name)
        if _parts_outside_functions(right_module) != _parts_outside_functions(wrong_module):
            return []
        changed: list[tuple[CodeType, CodeType]] = []
        pairs = zip(_function_codes(right_module), _function_codes(wrong_module), strict=True)
        for right_code, wrong_code in pairs:
            if right_code != wrong_code:
                changed.append((right_code, wrong_code))
        return changed

    # -------------------------------------------------------------------------- what Python calls, by importlib's names

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """The spec of this module; None for any other."""
        if fullname != self.name:
            return None
        return spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str) -> CodeType:
        """The code of the text with the error, whatever the file or its compiled copy says."""
        return compile(self.text, self.path, "exec", dont_inherit=True)


def imported_functions() -> FunctionsByCode:
    """Every function of this process by its file and code, but for those that `gc.freeze` has hidden."""
    functions: FunctionsByCode = {}
    for tracked_object in gc.get_objects():
        if isinstance(tracked_object, FunctionType):
            code = tracked_object.__code__
            functions.setdefault((code.co_filename, code), []).append(tracked_object)
    return functions


def _function_codes(code: CodeType) -> Iterator[CodeType]:
    """The code of every function in a module or class, including methods and functions inside functions."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if _is_function(constant):
                yield constant
            yield from _function_codes(constant)


def _parts_outside_functions(code: CodeType) -> list[object]:
    """All that the code of a module or class consists of, with functions by name only; to be compared."""
    parts: list[object] = [code.co_code, code.co_names]
    for constant in code.co_consts:
        if not isinstance(constant, CodeType):
            parts.append(repr(constant))  # as text, because 1 == True and -0.0 == 0.0
        elif _is_function(constant):
            parts.append(constant.co_qualname)
        else:
            parts.append(_parts_outside_functions(constant))
    return parts


def _is_function(code: CodeType) -> bool:
    """Whether this is the code of a function, and not of a class or module."""
    return bool(code.co_flags & CO_OPTIMIZED)
