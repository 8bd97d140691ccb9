"""Kill the command line by SIGKILL at random moments, start it again, and see that the end is the undisturbed one.

    python tools/reliability/kill.py --times 10 --places training,saving,encoding,pairs,evaluating --ranks 1,2 --seed 0

`kill_repeatedly` does this for one workload (`workload.py`) on a number of ranks:

1. The command runs once without a kill. What it leaves is the end that must come out.
2. In a new folder the command is started and killed, up to MAX_KILLS_PER_RUN times. Of two ranks, either one is killed,
   or torchrun with both.
3. It is started once more, ends by itself, and its end is compared; from 2 on again, until there are kills enough.

What must be the same to the bit: weights, averages, moments and the log of a training; the files of a cache and of a
teacher's pairs; the report of an evaluation. A kill that comes too late, or falls outside of the work that it is meant
for, does not count and is drawn again. The exit code is 1 if anything differs, or if files or processes stay.

In the options, the table and kill.json, a workload is called a place.

A run by the clock (`train.minutes`) depends on time, so `--clock N` tests it differently (`kill_last_checkpoints`). It
is killed N times while it writes its last checkpoint, by a clock that goes on by a second with each step. What it left
is copied, and taken back to the last whole checkpoint: to the run.yaml and the log of its step. Both folders are
resumed to their ends, which must be equal to the bit, schedules included.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from dumo.config.place import RUN_FILE
from dumo.io import file as files
from e2e.shell import TINY, finish, start
from reliability import process
from reliability.workload import (
    INPUTS,
    TRAINING_FIELDS,
    Fingerprint,
    Workload,
    new_work_folder,
    prepared_folder,
    temporary_files,
    training_fingerprint,
    workloads,
)

RunCommand = Callable[[Sequence[str], Path], int]  # of words and a folder; returns the exit code
StartCommand = Callable[[Sequence[str], Path, int], process.RunningCommand]  # of words, a folder and the ranks

MAX_KILLS_PER_RUN = 5  # then the run may come to its end: ours
MAX_MISSES_PER_KILL = 5  # kills that do not count, for each that must: ours

# A run by the clock of some 60 steps, by a clock of a second a step, whose checkpoints take a while to write.
CLOCK_WORDS = (
    *("train", "digits", "--out", "run", *TINY, *TRAINING_FIELDS),
    "train.minutes=1",
    "train.save_every=1000",
    "net.width=128",
    "net.depth=2",
    "train.batch=4",
)
CLOCKED = "import reliability.clocked"
CLOCK_SAVE_SECONDS = 0.15


@dataclass(frozen=True)
class Kill:
    """A kill of a running command."""

    is_hit: bool  # whether it interrupted the work that it is meant for: only then it counts
    num_orphans: int  # workers that did not end with their launcher
    has_left_files: bool  # whether a temporary file lay about then


@dataclass
class KillResult:
    """What became of the kills of a workload on a number of ranks."""

    workload: str
    ranks: int
    num_hits: int = 0  # kills that count
    num_missed: int = 0  # that came too late, or fell outside of the work
    num_starts: int = 0
    num_compared: int = 0  # runs that came to their end, and were compared
    differences: list[str] = field(default_factory=list[str])  # names of a fingerprint that were not the same
    num_kills_with_files: int = 0  # kills after which a temporary file lay about
    files_at_end: list[str] = field(default_factory=list[str])  # temporary files that stayed
    num_orphans: int = 0  # processes that a kill left working
    seconds: float = 0.0

    @property
    def has_passed(self) -> bool:
        """Whether every end was the same, and no file or process stayed."""
        return self.num_compared > 0 and not (self.differences or self.files_at_end or self.num_orphans)

    def add(self, kill: Kill) -> None:
        """Count a kill."""
        if kill.is_hit:
            self.num_hits += 1
        else:
            self.num_missed += 1
        self.num_kills_with_files += kill.has_left_files
        self.num_orphans += kill.num_orphans

    def compare(self, undisturbed: Fingerprint, killed: Fingerprint) -> None:
        """Note where the end of a run that was killed differs from the undisturbed one."""
        self.num_compared += 1
        for name in sorted(undisturbed.keys() | killed.keys()):
            if undisturbed.get(name) != killed.get(name):
                self.differences.append(name)

    def to_json(self) -> dict[str, Any]:
        """As a row of kill.json."""
        return {
            "place": self.workload,
            "ranks": self.ranks,
            "hits": self.num_hits,
            "missed": self.num_missed,
            "starts": self.num_starts,
            "works": self.num_compared,
            "differs": self.differences,
            "left_by_kills": self.num_kills_with_files,
            "left_at_end": self.files_at_end,
            "orphans": self.num_orphans,
            "seconds": self.seconds,
        }


def kill_repeatedly(
    workload: Workload,
    ranks: int,
    num_kills: int,
    seed: int,
    scratch: Path,
    *,
    run: RunCommand | None = None,
    start_command: StartCommand = process.start,
) -> KillResult:
    """Kill a workload until `num_kills` kills count, or too many do not. `scratch` has INPUTS.

    run: what runs a command that is not killed, to its end; by default, a process on `ranks` ranks.
    start_command: what starts a command that is killed.
    Raises SystemExit where the workload fails without a kill.
    """

    def run_process(words: Sequence[str], folder: Path) -> int:
        return process.run(words, folder, ranks)

    run = run or run_process
    random = Random(f"{seed} {workload.name} {ranks}")
    folders = scratch / f"{workload.name}-{ranks}"
    result = KillResult(workload.name, ranks)
    began = time.monotonic()

    # the end that must come out
    undisturbed_folder = new_work_folder(folders / "whole", scratch / INPUTS)
    undisturbed = _run_to_end(workload, undisturbed_folder, run, result)
    if result.differences:
        raise SystemExit(f"{workload.name} on {ranks} ranks, undisturbed, {result.differences[0]}")

    max_missed = MAX_MISSES_PER_KILL * num_kills
    while result.num_hits < num_kills and result.num_missed < max_missed:
        folder = new_work_folder(folders / str(result.num_compared), scratch / INPUTS)

        # kill the command again and again
        max_hits = min(result.num_hits + MAX_KILLS_PER_RUN, num_kills)
        while (
            result.num_hits < max_hits
            and result.num_missed < max_missed
            and workload.count_units(folder) < workload.num_units
        ):
            result.num_starts += 1
            kill = _start_and_kill(workload, ranks, random, folder, start_command)
            if kill is None:
                result.num_missed += 1
                break
            result.add(kill)

        # let it end
        result.num_starts += 1
        killed = _run_to_end(workload, folder, run, result)
        result.compare(undisturbed, killed)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _run_to_end(workload: Workload, folder: Path, run: RunCommand, result: KillResult) -> Fingerprint:
    """Run the command without a kill and return its end. Where it fails, the end is empty, and `result` says why."""
    exit_code = run(workload.words, folder)
    if exit_code:
        result.differences.append(f"ended with {exit_code}: {process.read_log(folder)[-300:]}")
        return {}
    result.files_at_end += [str(path.relative_to(folder)) for path in temporary_files(folder)]
    return workload.fingerprint(folder)


def _start_and_kill(
    workload: Workload, ranks: int, random: Random, folder: Path, start_command: StartCommand
) -> Kill | None:
    """Start the command and kill it at a random moment of its work; None if it ended before that."""
    num_units = random.randint(workload.count_units(folder) + 1, workload.num_units)
    pause_seconds = random.uniform(0, workload.unit_seconds)
    victim = random.choice([*range(ranks), "all"])

    # wait for the moment
    command = start_command(workload.words, folder, ranks)
    while workload.count_units(folder) < num_units and command.poll() is None:
        time.sleep(0.001)
    time.sleep(pause_seconds)

    # whom to kill
    workers = process.worker_pids(command.pid, ranks)
    victims = [command.pid, *workers]
    if ranks > 1 and isinstance(victim, int):
        victims = workers[victim : victim + 1]  # empty where that rank has not started yet
    if command.poll() is not None or not victims:
        process.wait_for_exit(command)
        return None

    process.kill(victims)
    process.wait_for_exit(command)
    num_orphans = len(process.kill_orphans(workers))
    (folder / process.LOG).unlink()
    return Kill(
        is_hit=workload.was_interrupted(folder),
        num_orphans=num_orphans,
        has_left_files=bool(temporary_files(folder)),
    )


def kill_last_checkpoints(num_kills: int, seed: int, scratch: Path) -> KillResult:
    """Kill a run by the clock `num_kills` times in its last checkpoint, and compare two ways to resume it."""
    random = Random(seed)
    result = KillResult("clock", 1)
    began = time.monotonic()
    max_missed = MAX_MISSES_PER_KILL * num_kills
    while result.num_hits < num_kills and result.num_missed < max_missed:
        folder = scratch / f"clock-{result.num_hits + result.num_missed}"
        folder.mkdir()
        result.num_starts += 1
        command = start(*CLOCK_WORDS, cwd=folder, first=CLOCKED)

        # Kill it at a random moment after its last checkpoint has begun.
        while not _is_saving_last(folder) and command.poll() is None:
            time.sleep(0.0005)
        time.sleep(random.uniform(0, CLOCK_SAVE_SECONDS))
        command.kill()
        command.wait(process.MAX_SECONDS)
        checkpoints = sorted((folder / "run/checkpoints").glob("step-*"))
        log_file = folder / "run/metrics.jsonl"
        rows = log_file.read_text().splitlines(keepends=True) if log_file.exists() else []
        if not checkpoints or len(rows) == int(checkpoints[-1].name.removeprefix("step-")):
            result.num_missed += 1
            shutil.rmtree(folder)
            continue
        result.num_hits += 1

        # Take a copy back to the last whole checkpoint.
        clean = folder.with_name(f"{folder.name}-clean")
        shutil.copytree(folder, clean)
        last = clean / "run/checkpoints" / checkpoints[-1].name
        shutil.copy(last / RUN_FILE, clean / "run/run.yaml")
        (clean / "run/metrics.jsonl").write_text("".join(rows[: int(last.name.removeprefix("step-"))]))
        result.num_kills_with_files += bool(temporary_files(folder))
        for path in temporary_files(clean):
            files.remove(path)

        # Resume both.
        fingerprints: list[Fingerprint] = []
        for resumed in (clean, folder):
            result.num_starts += 1
            done = finish(start(*CLOCK_WORDS, cwd=resumed, first=CLOCKED))
            if done.code:
                result.differences.append(f"ended with {done.code}: {done.err[-300:]}")
                continue
            result.files_at_end += [str(path.relative_to(resumed)) for path in temporary_files(resumed)]
            fingerprints.append(training_fingerprint(resumed))
        if len(fingerprints) == 2:
            result.compare(*fingerprints)
        shutil.rmtree(clean)
        shutil.rmtree(folder)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _is_saving_last(folder: Path) -> bool:
    """Whether a run by the clock has begun to write its last checkpoint."""
    first_and_last = [path for path in (folder / "run/checkpoints").glob("*step-*") if path.is_dir()]
    return len(first_and_last) > 1


def markdown_table(results: Sequence[KillResult]) -> str:
    """A table with a row for each workload and number of ranks."""
    header = ["place", "ranks", "kills", "missed", "starts", "the same", "left by kills", "left at the end", "seconds"]
    lines = [header, ["---"] * len(header)]
    lines += [_cells(result) for result in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(result: KillResult) -> list[str]:
    """A result's row in the table: a text for each column."""
    same = "yes"
    if result.differences:
        first = " ".join(result.differences[0].split())  # in one line
        same = f"no: {len(result.differences)} differ, {first}"
    left_at_end = set(result.files_at_end)
    if result.num_orphans:
        left_at_end.add(f"{result.num_orphans} processes")
    return [
        result.workload,
        str(result.ranks),
        str(result.num_hits),
        str(result.num_missed),
        str(result.num_starts),
        f"{same} ({result.num_compared} works)",
        str(result.num_kills_with_files),
        ", ".join(sorted(left_at_end)) or "nothing",
        f"{result.seconds:.0f}",
    ]


def main(
    num_kills: Annotated[
        int, typer.Option("--times", min=1, help="Kills that count, in each place and number of ranks.")
    ] = 10,
    names: Annotated[str, typer.Option("--places")] = "training,saving,encoding,pairs,evaluating",
    rank_counts: Annotated[str, typer.Option("--ranks", help="Numbers of ranks.")] = "1,2",
    clock_kills: Annotated[
        int, typer.Option("--clock", min=0, help="Kills of runs by the clock in their last checkpoint.")
    ] = 0,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what came out here, too.")] = None,
) -> None:
    """Kill, start again, compare; print a table."""
    results: list[KillResult] = []
    with prepared_folder() as scratch:
        for ranks in map(int, rank_counts.split(",")):
            for name in names.split(","):
                results.append(kill_repeatedly(workloads()[name], ranks, num_kills, seed, scratch))
                print(markdown_table(results).splitlines()[-1], flush=True)

        if clock_kills:
            results.append(kill_last_checkpoints(clock_kills, seed, scratch))
            print(markdown_table(results).splitlines()[-1], flush=True)

    total_kills = sum(result.num_hits for result in results)
    total_compared = sum(result.num_compared for result in results)
    print(f"\n{markdown_table(results)}\n\n{total_kills} kills, {total_compared} works compared")
    if json_file:
        rows = [result.to_json() for result in results]
        json_file.write_text(json.dumps({"seed": seed, "rows": rows}, indent=2) + "\n")
    raise typer.Exit(not all(result.has_passed for result in results))


if __name__ == "__main__":
    typer.run(main)
