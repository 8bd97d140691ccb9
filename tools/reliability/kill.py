"""Kill the command line without a word at random moments, start it again, and see that the end is the undisturbed one.

    python tools/reliability/kill.py --times 10 --places training,saving,encoding,pairs,evaluating --ranks 1,2 --seed 0

Work is killed by SIGKILL in one of five places, started again by the same command, killed again ..., until it ends by
itself. Of two ranks, either one is killed, or torchrun with both. What must be the same to the bit: weights, averages,
moments and the log of a training; the files of a cache and of a teacher's pairs; the report of an evaluation. A kill
that comes too late, or falls outside of its place, does not count and is drawn again. Exit code 1 if anything differs.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from reliability import process
from reliability.place import End, Place, fresh, furnished, left, places

AT_ONCE = 5  # kills of one work, at most: then it may end
Finish = Callable[[Sequence[str], Path], int]
Start = Callable[[Sequence[str], Path, int], process.Running]


@dataclass
class Row:
    """What became of the kills in one place, on so many ranks."""

    place: str
    ranks: int
    hits: int = 0  # kills that fell into the work
    missed: int = 0  # that came too late, or fell beside it
    starts: int = 0
    works: int = 0  # that came to their end, and were compared
    differs: list[str] = field(default_factory=list[str])  # what was not the same, by name
    left_by_kills: int = 0  # kills after which a temporary file lay about
    left_at_end: list[str] = field(default_factory=list[str])  # temporary files that stayed
    orphans: int = 0  # processes that a kill left working
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether everything came out the same, and nothing stayed."""
        return self.works > 0 and not (self.differs or self.left_at_end or self.orphans)

    def compare(self, wanted: End, found: End) -> None:
        """Note what is not the same."""
        self.works += 1
        self.differs += [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]


def trial(
    place: Place,
    ranks: int,
    times: int,
    seed: int,
    folder: Path,
    *,
    finish: Finish | None = None,
    start: Start = process.start,
) -> Row:
    """Kill work in a place so many times; `folder` has what is `given`.

    `finish` does what is not killed: the undisturbed work, and the start that comes to the end. None: a process.
    `start` begins what is killed.
    """
    end = finish or (lambda words, cwd: process.finish(words, cwd, ranks))
    chance, row, begun = Random(f"{seed} {place.name} {ranks}"), Row(place.name, ranks), time.monotonic()
    wanted = finished(place, row, fresh(folder / f"{place.name}-{ranks}/whole", folder / "given"), end)
    if row.differs:
        raise SystemExit(f"{place.name} on {ranks} ranks, undisturbed, {row.differs[0]}")
    while row.hits < times and row.missed < 5 * times:
        here = fresh(folder / f"{place.name}-{ranks}/{row.works}", folder / "given")
        most = min(row.hits + AT_ONCE, times)
        while row.hits < most and place.done(here) < place.units and row.missed < 5 * times:
            row.starts += 1
            if not killed(place, ranks, chance, here, row, start):
                break
        row.starts += 1
        row.compare(wanted, finished(place, row, here, end))
    row.seconds = round(time.monotonic() - begun, 1)
    return row


def finished(place: Place, row: Row, here: Path, finish: Finish) -> End:
    """Let the work come to its end, and say what came out; nothing where it fails."""
    if code := finish(place.words, here):
        row.differs.append(f"ended with {code}: {process.said(here)[-300:]}")
        return {}
    row.left_at_end += [str(path.relative_to(here)) for path in left(here)]
    return place.end(here)


def killed(place: Place, ranks: int, chance: Random, here: Path, row: Row, start: Start) -> bool:
    """Start the work and kill it at a random moment; False if it came to its end before that."""
    at = chance.randint(place.done(here) + 1, place.units)
    wait, victim = chance.uniform(0, place.pause), chance.choice([*range(ranks), "all"])
    started = start(place.words, here, ranks)
    while place.done(here) < at and started.poll() is None:
        time.sleep(0.001)
    time.sleep(wait)
    agent, them = started.pid, process.workers(started.pid, ranks)
    victims = [agent, *them] if victim == "all" or ranks == 1 else them[victim : victim + 1]
    if started.poll() is not None or not victims:
        process.ended(started)
        row.missed += 1
        return False
    process.kill(victims)
    process.ended(started)
    row.orphans += len(process.orphans(them))
    (here / process.LOG).unlink()
    inside = place.inside(here)
    row.hits, row.missed = row.hits + inside, row.missed + (not inside)
    row.left_by_kills += bool(left(here))
    return True


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    head = ["place", "ranks", "kills", "missed", "starts", "the same", "left by kills", "left at the end", "seconds"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        same = "yes" if not row.differs else f"no: {len(row.differs)} differ, {' '.join(row.differs[0].split())}"
        stays = [*row.left_at_end, *([f"{row.orphans} processes"] if row.orphans else [])]
        counts = [row.place, row.ranks, row.hits, row.missed, row.starts, f"{same} ({row.works} works)"]
        counts += [row.left_by_kills, ", ".join(sorted(set(stays))) or "nothing", f"{row.seconds:.0f}"]
        lines.append([str(count) for count in counts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(
    times: Annotated[int, typer.Option(min=1, help="Kills that count, in each place and number of ranks.")] = 10,
    where: Annotated[str, typer.Option("--places")] = "training,saving,encoding,pairs,evaluating",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "1,2",
    seed: int = 0,
    to: Annotated[Path | None, typer.Option("--json", help="Write what came out here, too.")] = None,
) -> None:
    """Kill, start again, compare; print a table."""
    rows: list[Row] = []
    with furnished() as folder:
        for count in map(int, ranks.split(",")):
            for name in where.split(","):
                rows.append(trial(places()[name], count, times, seed, folder))
                print(table(rows).splitlines()[-1], flush=True)
    print(f"\n{table(rows)}\n\n{sum(row.hits for row in rows)} kills, {sum(row.works for row in rows)} works compared")
    if to:
        to.write_text(json.dumps({"seed": seed, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    raise typer.Exit(not all(row.good for row in rows))


if __name__ == "__main__":
    typer.run(main)
