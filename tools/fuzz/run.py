"""Change what dumo reads, thousands of times, and see that it takes each change or says in a line what is wrong.

    python tools/fuzz/run.py files [--count 10000] [--only NAME]     files that dumo reads (fuzz/file.py)
    python tools/fuzz/run.py folders [--count N] [--only NAME]       folders of models by others; N: of each, not all
    python tools/fuzz/run.py commands [--count 600]                  options of commands, and changed files of a run

`--seed 0`: with seed, name and number a trial can be made again. Each fault is printed; the exit code is then 1.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from fuzz.judge import Trial, try_all

Group = tuple[str, Iterator[Trial]]  # a name to print, and its trials


def file_groups(only: str, count: int | None, seed: int) -> Iterator[Group]:
    """A group for each file that dumo reads; `count`: of all together."""
    from fuzz.file import file_trials, targets

    chosen = [target for target in targets() if only in target.name]
    per_target = -(-(count or 10_000) // max(len(chosen), 1))  # rounded up
    for target in chosen:
        yield target.name, file_trials(target, range(per_target), seed)


def folder_groups(only: str, count: int | None, seed: int) -> Iterator[Group]:
    """A group for each kind of model folder; `count`: of each, drawn; None: all changes."""
    from fuzz.folder import folder_trials, model_folders, silence_libraries

    silence_libraries()
    for kind in model_folders():
        if only in kind.name:
            yield kind.name, folder_trials(kind, count, seed=seed)


def command_groups(only: str, count: int | None, seed: int) -> Iterator[Group]:
    """The options, and then `count` changed files of a run."""
    from fuzz.command import changed_file_trials, option_trials, trained_run

    with trained_run():
        for name, trials in (("options", option_trials()), ("run files", changed_file_trials(count or 600, seed))):
            if only in name:
                yield name, trials


GROUPS = {"files": file_groups, "folders": folder_groups, "commands": command_groups}


def main() -> int:
    """Run the trials of one kind, group by group; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=GROUPS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--only", default="", help="groups whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    num_trials = 0
    num_faults = 0
    for name, trials in GROUPS[options.kind](options.only, options.count, options.seed):
        tally = try_all(trials)
        print(f"{name:45} {tally}", *tally.faults, sep="\n", flush=True)
        num_trials += tally.ends.total()
        num_faults += len(tally.faults)
    print(f"{num_faults} faults in {num_trials:,} trials, {time.perf_counter() - start:.0f} s")
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
