"""What the same work costs in two trees, by turns: one process for each, asked for the same work one after the other.

    python tools/duel/run.py OLD/src NEW/src [NAME ...] --rounds 15 --json tools/duel/duel.json

Ratios are within a round, old over new, so that what else the machine does disturbs both alike; shown are median and
quartiles. With one thread for arithmetic; threads that decode, draw or copy are as many as each tree takes.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from duel.work import WORKS

Seconds = tuple[float, float]  # of the clock, of the CPU


def child(tree: Path, name: str, folder: Path) -> "subprocess.Popen[str]":
    """A process that waits to be asked."""
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("work.py")), name, str(folder)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def asked(process: "subprocess.Popen[str]") -> Seconds:
    """What the work took this time."""
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    wall, cpu = map(float, process.stdout.readline().split())
    return wall, cpu


def quartiles(ratios: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [round(x, 3) for x in statistics.quantiles(ratios, n=4, method="inclusive")]


def duel(name: str, old: Path, new: Path, rounds: int, starts: int, folder: Path) -> dict[str, object]:
    """One work: its ratios, and milliseconds of either."""
    both: list[tuple[Seconds, Seconds]] = []
    for start in range(starts):
        them = [child(tree, name, folder / f"{side}-{start}") for side, tree in (("old", old), ("new", new))]
        for i in range(rounds // starts + 1):
            took = {k: asked(them[k]) for k in ((0, 1) if i % 2 else (1, 0))}
            both += [(took[0], took[1])] if i else []  # the first round warms up
        for process in them:
            process.kill()
            process.wait()
    row: dict[str, object] = {"work": name, "about": WORKS[name].__doc__, "rounds": len(both), "starts": starts}
    for k, what in enumerate(("wall", "cpu")):
        row[f"{what}_ratio"] = quartiles([a[k] / b[k] for a, b in both])
        row[f"{what}_ms"] = [round(1e3 * statistics.median(pair[side][k] for pair in both), 4) for side in (0, 1)]
    return row


def main(
    old: Annotated[Path, typer.Argument(help="The package's folder of one tree, such as ../before/src.")],
    new: Annotated[Path, typer.Argument(help="That of the other.")],
    names: Annotated[list[str] | None, typer.Argument(help="Works. Default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds that count, of all starts together.")] = 15,
    starts: Annotated[
        int, typer.Option(min=1, help="New processes: each lies otherwise in memory, up to a tenth.")
    ] = 3,
    to: Annotated[Path | None, typer.Option("--json", help="Write the rows here, too.")] = None,
) -> None:
    """Compare; print a line for each work."""
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as folder:
        for name in names or WORKS:
            rows.append(duel(name, old, new, rounds, starts, Path(folder) / name))
            print(json.dumps(rows[-1]), flush=True)
            if to:
                to.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
