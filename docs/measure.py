"""Repeat the measurements in the pages, which takes half a day on two cores and needs $DUMO_DATA/cifar10.

    python docs/measure.py [NAME ...]    # plans of `dumo reproduce`; by default all with stored results

For each plan, one after another, it

1. runs `dumo reproduce NAME --scale laptop --jobs 2`, which goes on where an earlier run of it was stopped;
2. keeps its results.json where that of the plan is kept, and those of its pictures that the pages show (`keep`).

Then it writes the tables (`docs/tables.py`). Sentences that have numbers of a table are to be read again by a person.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
RUNS = Path("runs/reproduce")


def kept_results() -> dict[str, Path]:
    """Return the files of all stored results by the name of their plan."""
    return {path.stem: path for path in sorted(RESULTS.glob("*.json"))}


def measure(name: str) -> None:
    """Train and measure all cells of a plan, showing its output."""
    command = [sys.executable, "-P", "-m", "dumo", "reproduce", name, "--scale", "laptop", "--jobs", "2"]
    subprocess.run(command, check=True)


def keep(made: Path, file: Path, pages: Path) -> list[Path]:
    """Copy the results in the folder `made` to `file`, and pictures that the folder `pages` has by the same names.

    Returns the copies.
    """
    results = made / "results.json"
    copies = [file]
    shutil.copyfile(results, file)
    for name in json.loads(results.read_text(encoding="utf-8"))["files"]:
        picture = made / Path(name).name
        shown = pages / picture.name
        if picture.suffix == ".png" and shown.is_file():
            shutil.copyfile(picture, shown)
            copies.append(shown)
    return copies


def main(names: list[str]) -> None:
    """Measure these plans again, by default all with stored results."""
    files = kept_results()
    for name in names or files:
        measure(name)
        for copy in keep(RUNS / f"{name}-laptop", files.get(name, RESULTS / f"{name}.json"), DOCS):
            print(copy)
    subprocess.run([sys.executable, DOCS / "tables.py"], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
