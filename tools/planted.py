"""An error that `mutants.py` plants in a test's process and, where they import this first, in those that it starts."""

import json
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from types import CodeType

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


if TOLD in os.environ:
    Plant(*json.loads(os.environ[TOLD])).plant()
