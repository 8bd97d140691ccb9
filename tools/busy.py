"""Steps that a training makes on an idle and on a busy machine, by the command line and from Python.

    python tools/busy.py --src ../before/src --src src --seconds 75

Each case is a process of its own, which is killed after so many seconds, its start included; its log has a row a step.
A busy machine is one where another process takes a core. The number of threads is left to torch and dumo. Run it where
nothing else runs.
"""

import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
SPIN = "while True: pass"
PYTHON = "import sys, dumo; dumo.train(sys.argv[1], {'train.log_every': 1}, out=sys.argv[2])"
DOORS = ("dumo train", "dumo.train")  # the command line, and Python


@contextmanager
def spinning(count: int) -> Generator[None, None, None]:
    """So many other processes take a core each."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def command_of(door: str, recipe: str, folder: Path) -> list[str]:
    """What trains a recipe in a folder, with a row of the log for every step."""
    if door == "dumo train":
        words = ["-m", "dumo", "train", recipe, "--out", str(folder), "--set", "train.log_every=1"]
    else:
        words = ["-c", PYTHON, recipe, str(folder)]
    return [sys.executable, *words]


def steps_made(src: Path, door: str, recipe: str, seconds: float) -> tuple[int, str]:
    """How many steps a training makes, and what it says of threads."""
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_USER}
    environment["PYTHONPATH"] = str(src.resolve())
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = command_of(door, recipe, folder)
        output = Path(scratch) / "output"
        with output.open("w") as stream:
            process = subprocess.Popen(command, env=environment, cwd=scratch, stdout=stream, stderr=stream)
        time.sleep(seconds)
        log = folder / "metrics.jsonl"
        steps = len(log.read_bytes().splitlines()) if log.is_file() else 0
        code = process.poll()
        process.kill()
        process.wait()
        lines = output.read_text().splitlines()
    if code:
        sys.exit("\n".join([f"{' '.join(command)} ended with {code}:", *lines]))
    said = [line for line in lines if "thread" in line]
    return steps, "; ".join(said)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, in columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(
    src: Annotated[list[Path] | None, typer.Option(help="A folder in which a dumo lies. Default: this one's.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For each case.")] = 75,
    recipe: Annotated[str, typer.Option(help="What is trained.")] = "dumo-best",
    busy: Annotated[int, typer.Option(min=1, help="Cores that other processes take on a busy machine.")] = 1,
) -> None:
    """Count; print a row for each tree and door."""
    trees = src or [Path(__file__).parents[1] / "src"]
    for tree in trees:
        if not (tree / "dumo").is_dir():
            raise typer.BadParameter(f"{tree} has no folder dumo", param_hint="--src")
    rows = [["tree", "door", "idle", "busy", "said when idle", "said when busy"]]
    for tree in trees:
        for door in DOORS:
            idle, said_idle = steps_made(tree, door, recipe, seconds)
            with spinning(busy):
                crowded, said_busy = steps_made(tree, door, recipe, seconds)
            rows.append([str(tree), door, f"{idle:,}", f"{crowded:,}", said_idle, said_busy])
            print(table([rows[0], rows[-1]]), file=sys.stderr, flush=True)
    print(f"steps of {recipe} in {seconds:g} s, {os.cpu_count()} cores, {busy} of them taken when busy")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
