"""Put the command line on bad machines: it recovers or says why not, and harms nothing that is good.

    python tools/reliability/machine.py [--only NAME,NAME]

A disk that is full or read-only (a small tmpfs, which takes the right to mount), no home, few file descriptors, no
memory, processes that die or hang, files that vanish or break under a training, two trainings in one folder, a clock
that jumps. What is refused must end with exit code 1 or 2, a line that names the thing, and no traceback; what stood
before must still stand, to the byte; and once the trouble is over, the same command must come to the undisturbed end.
Exit code 1 if anything is otherwise.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from reliability.place import furnished
from reliability.trouble import CASES, Found, Left


def examined(name: str, folder: Path) -> Found:
    """What became of one case, in a folder of its own beside what is given."""
    here, found, begun = folder / name.replace(" ", "-"), Found(name), time.monotonic()
    here.mkdir()
    (here / "given").symlink_to(folder / "given")
    try:
        CASES[name](here, found)
    except Left as why:
        found.left_out = str(why)
    except Exception as error:  # the next case may go well
        found.wrong.append(f"{type(error).__name__}: {error}")
    found.seconds = round(time.monotonic() - begun, 1)
    return found


def table(rows: Sequence[Found]) -> str:
    """The rows as Markdown."""
    head = ["case", "exit codes", "what it says", "good files changed", "afterwards", "as it should", "seconds"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        good = f"left out: {row.left_out}" if row.left_out else "; ".join(row.wrong) or "yes"
        codes = ", ".join(map(str, dict.fromkeys(row.codes))) or "-"
        changed = f"{row.changed} of {row.watched}" if row.watched else "-"
        said = (row.said[0] if row.said else "-").replace("|", "\\|")
        lines.append(
            [row.name, codes, said, changed, row.afterwards or "-", " ".join(good.split()), f"{row.seconds:.0f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(
    only: Annotated[str | None, typer.Option(help="Names of cases, by commas. Default: all.")] = None,
    to: Annotated[Path | None, typer.Option("--json", help="Write what came out here, too.")] = None,
) -> None:
    """Go through the cases; print a table."""
    rows: list[Found] = []
    with furnished() as folder:
        for name in only.split(",") if only else CASES:
            rows.append(examined(name, folder))
            print(table(rows).splitlines()[-1], flush=True)
    out = [row for row in rows if row.left_out]
    print(f"\n{table(rows)}\n\n{len(rows) - len(out)} cases, {len(out)} left out")
    if to:
        to.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    raise typer.Exit(any(row.wrong for row in rows))


if __name__ == "__main__":
    typer.run(main)
