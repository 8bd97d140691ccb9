"""Tiny trained runs that a session of tests makes once, whichever of its processes is the first to need one.

A run is known by its recipe or family and by what is set of it. Everybody gets a copy, to read, to change or to spoil.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from e2e.shell import call
from stock.case import FULL, Case, must


@dataclass(frozen=True)
class TinyRuns:
    """Those of a session, in a folder that its processes share."""

    folder: Path

    def copy(self, to: Path, recipe: str, *fields: str) -> Path:
        """A recipe's run, trained with these fields, as the folder `to`."""

        def train(run: Path) -> None:
            must(call("train", recipe, "--out", run, *fields))

        return shutil.copytree(self._once(recipe, fields, train), to)

    def case(self, to: Path, family: str, *fields: str, stored: str = "float32") -> Case:
        """A family's run in the folder `to`. Its pipeline, photographs and tables are shared: to be read.

        The pipeline is stored as STORED (`stock.case`) says.
        """

        def encode(folder: Path) -> None:
            Case.of(family, folder, *FULL, verbs=("encode",), stored=stored)

        def train(folder: Path) -> None:
            Case(family, folder, home).train(*fields)

        home = self._once(family, (stored,), encode)
        made = self._once(family, ("run", stored, *fields), train)
        shutil.copytree(made / "run", to / "run")
        (to / family).symlink_to(home / family)  # where the card of a LoRA opens it
        return Case(family, to, home, stored)

    def _once(self, name: str, fields: tuple[str, ...], make: Callable[[Path], object]) -> Path:
        """The folder that `make` fills. One process makes it, others that need it meanwhile wait."""
        digest = hashlib.sha256("\n".join(fields).encode()).hexdigest()
        place = self.folder / f"{name}-{digest[:8]}"
        done = place.with_suffix(".done")
        with FileLock(place.with_suffix(".lock")):
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)  # of a process that failed
                make(place)
                done.touch()
        return place
