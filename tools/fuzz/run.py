"""Change what dumo reads, thousands of times, and see that it takes it or says what is wrong.

    python tools/fuzz/run.py [--count 10000] [--only NAME] [--seed 0]

An input is known by the seed, its kind and its number: what is found can be made again. Exit code 1 where anything was.
"""

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from fuzz.judge import GOOD, wrong
from fuzz.target import Target, targets


def tried(target: Target, numbers: range, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """How often each end was seen, and a line for every one that should not be."""
    ends, found = Counter[str](), dict[tuple[str, str], str]()
    with TemporaryDirectory() as folder:
        file = Path(folder) / target.name
        for number in numbers:
            file.write_bytes(target.input(random.Random(f"{seed}/{target.name}/{number}")))
            end, words = wrong(lambda: target.read(file))
            ends[end] += 1
            if end not in GOOD:
                found.setdefault((end, words[-40:]), f"{target.name} {number}: {end}: {words[:400]}")
    return ends, list(found.values())


def main() -> int:
    """All targets, in turn."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--count", type=int, default=10_000)
    asked.add_argument("--only", default="")
    asked.add_argument("--seed", type=int, default=0)
    options = asked.parse_args()
    some = [target for target in targets() if options.only in target.name]
    started, all_found = time.perf_counter(), list[str]()
    for target in some:
        ends, found = tried(target, range(-(-options.count // len(some))), options.seed)
        print(f"{target.name:45} {', '.join(f'{end} {n}' for end, n in ends.most_common())}", flush=True)
        print(*found, sep="\n", end="\n" * bool(found))
        all_found += found
    print(f"{len(all_found)} found, {time.perf_counter() - started:.0f} s")
    return 1 if all_found else 0


if __name__ == "__main__":
    sys.exit(main())
