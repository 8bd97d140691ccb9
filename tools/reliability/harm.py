"""Change files so that they still look whole, and print what dumo says of each: the table in docs/reliability.md.

    python tools/reliability/harm.py

The cases, and what must come of them, are those of tests/e2e/harm.py. Exit code 1 if anything is otherwise.
"""

import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from e2e import harm
from e2e.harm import Harm
from e2e.shell import Done

LONG = 150  # letters of what is said


def row(case: Harm, ended: Done) -> str:
    """A line of the table."""
    command = " ".join(word for word in case.words if not word.startswith("taef2"))
    kind = "the undisturbed end, to the bit" if case.harmless else f"exit code {ended.code}"
    return f"| {case.artifact} | {case.damage} | `dumo {command}` | {kind} | {said(ended)} |"


def said(ended: Done) -> str:
    """The line that names it, without the folder that we are in."""
    found = [line for line in ended.err.splitlines() if line.startswith(("error: ", "warning: "))]
    text = re.sub(r"\|", r"\\|", found[0].replace(f"{Path.cwd()}/", "")) if found else ""
    return f"`{text[:LONG]}{'...' * (len(text) > LONG)}`" if text else ""


def main() -> None:
    """Each case in turn."""
    warnings.simplefilter("default")
    wrong = 0
    with TemporaryDirectory() as folder:
        here, spare = Path(folder) / "here", Path(folder) / "spare"
        here.mkdir()
        os.chdir(here)
        harm.furnish()
        shutil.copytree(here, spare)
        print("| what | what happens to it | the next command | ends with | and says |\n|---|---|---|---|---|")
        for case in harm.cases():
            try:
                print(row(case, harm.meet(case)), flush=True)
            except AssertionError as error:
                wrong += 1
                print(f"| {case.artifact} | {case.damage} | {' '.join(case.words)} | WRONG | {error} |", flush=True)
            harm.restore(here, spare)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
