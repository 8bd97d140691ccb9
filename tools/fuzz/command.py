"""Files of a run's folder, changed one at a time, and options that nobody means, given to the command line.

    python tools/fuzz/command.py [--count 600] [--seed 0]

What is refused must leave the folder and the place where we are as they were. Exit code 1 where anything was found.
"""

import argparse
import os
import random
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is started as a script

from e2e.shell import TINY, Done, call, sets, tree
from fuzz.judge import WORDS, Late, limited, place
from fuzz.mutation import mutated

MEANT = (*TINY, *sets("train.log_every=5", "train.save_every=10"))
HUGE = 10**12
LONG = "x" * 5000
COMMANDS = {  # by the file that was changed: what reads it
    "run.yaml": (["show", "run"], ["sample", "run", "--count", "2", "--nfe", "1", "--out", "out"], ["train", "run"]),
    "evaluation.json": (["compare", "run"], ["compare", "run", "run", "--json"]),
    "state.json": (["sample", "run", "--count", "2", "--nfe", "1", "--out", "out"], ["train", "run"]),
    "metrics.jsonl": (["train", "run", "--set", "train.steps=21"],),
    "data.json": (["train", "run", "--set", "train.steps=21"],),
    ".safetensors": (["sample", "run", "--count", "2", "--nfe", "1", "--out", "out"], ["train", "run"]),
}
OPTIONS: tuple[Sequence[object], ...] = (
    *(
        ["sample", "run", "--nfe", text]
        for text in ("", ",", "1,", "-1", "0", "x", "1e3", "9" * 5000, "١", "1000000", "1,1")
    ),
    *(["sample", "run", "--count", text] for text in ("", "-1", "0", HUGE, "9" * 5000, "1.5", "nan")),
    *(["sample", "run", "--labels", text] for text in ("", ",", "-1", "10", HUGE, "9" * 5000, "x", LONG, "\0", "²")),
    *(["sample", "run", "--seed", text] for text in ("", "-1", "x", "1.5")),
    *(
        ["sample", "run", "--out", text, "--count", "2", "--nfe", "1"]
        for text in ("", LONG, "a\0b", "run/run.yaml", "/dev/null/x")
    ),
    *(["sample", "run", "--weights", text] for text in ("", LONG, "a\0b", ".", "/dev/zero", "run/run.yaml")),
    *(["sample", "run", "--device", text] for text in ("", "x", "cuda:99", "meta", "cpu:-1", LONG, "\0")),
    *(["sample", "run", "--format", text] for text in ("", "x", LONG)),
    *(["sample", text] for text in ("", ".", LONG, "a\0b", "/dev/zero", "/dev/null", "~nobody/x")),
    *(["sample", "run", "--solver", text] for text in ("", "x", LONG, "\0")),
    *(["average", "run", "--std", text] for text in ("", "x", "nan", "0.1", HUGE)),
    *(["grid", "run", "--steps", text] for text in ("", "x", "-1", HUGE, "9" * 5000)),
    *(["grid", "run", "--nfe", text] for text in ("", "0", "1000001", "9" * 5000)),
    *(["grid", "run", "--count", text] for text in (0, HUGE)),
    *(["grid", "run", "--reading", text] for text in ("", "x", ",")),
    *(["grid", "run", "--classes", text] for text in ("", "x", "10", ",")),
    *(["evaluate", "run", "--nfe", text] for text in ("", "0", "1000001", "9" * 5000)),
    *(["show", text] for text in ("", ".", "/dev/zero", "/dev/null", "/etc/hostname", LONG, "a\0b", "a\nb", "\udcff")),
    *(
        ["train", "digits", "--out", text, *TINY]
        for text in ("", LONG, "a\0b", "/dev/null", "/dev/null/x", "run/run.yaml")
    ),
    *(
        ["show", "digits", "--set", text]
        for text in ("", "=", ".", "..=1", f"{LONG}=1", f"net.width={LONG}", "net.width=\0")
    ),
    *(
        ["show", "digits", "--set", f"net.depth={text}"]
        for text in (2**63, 10**300, "9" * 5000, "1e400", "[[[[", "&a [*a]")
    ),
    *(
        ["train", "digits", *TINY, "--set", text]
        for text in ("net.width=65536", "train.batch=true", "train.optimizer.lr=1e38")
    ),
    ["train", "digits", "--set", "net.width=65536", "--set", "net.depth=100"],
    *(["compare", text] for text in ("", ".", LONG, "a\0b", "/dev/zero", "/dev/null", "run/run.yaml")),
    *(
        ["encode", text, "out", "--codec", "taef2", "--side", "8"]
        for text in ("", "a\0b", LONG, "/dev/zero", "~nobody/x")
    ),
    *(["encode", ".", "out", "--codec", "taef2", "--side", text] for text in (HUGE, "0", "")),
    *(
        ["encode", ".", "out", "--codec", "taef2", "--side", "8", "--part", text]
        for text in ("", "1/0", "9" * 5000 + "/1", "²/3")
    ),
    *(["bench", "step", "moons", "--shape", text] for text in ("", "0", "-1", HUGE, "9" * 5000, ",")),
    *(["bench", "step", "moons", "--batch", text] for text in (HUGE, "0")),
    *(["bench", "sample", "moons", "--batch", text] for text in (HUGE, "0")),
    *(["bench", "step", "moons", "--threads", HUGE], ["bench", "step", "moons", "--precision", ""]),
    *(["dry", "moons", "--rows", text] for text in (HUGE, "0")),
    *(["data", text] for text in ("", LONG, "\0")),
    *(["reproduce", text] for text in ("", LONG, "../x")),
    ["reproduce", "fig3", "--jobs", HUGE, "--scale", "x"],
)


def made() -> None:
    """A trained and judged run, `run`, in the folder we are in."""
    for words in (["train", "moons", "--out", "run", *MEANT], ["evaluate", "run"]):
        done = call(*words)
        assert done.code == 0, done


def wrong(words: Sequence[object], watched: Path) -> tuple[str, str]:
    """How a command ended: 'done', 'refused' or 'failed in a line', or what should not be; and its words."""
    before, done = tree(watched), Done(0, "", "")
    try:
        with limited(120), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = call(*words)
    except Late as error:
        return "late", place(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return type(error).__name__, f"{error} {place(error)}"
    if "Traceback" in done.err or len(done.err) > WORDS + 2 * len(LONG):
        return "not plain", done.err
    if done.code not in (0, 1, 2) or (done.code and not done.err.strip()):
        return f"exit code {done.code}", done.err
    if done.code == 2 and (changed := changes(before, tree(watched))):
        return "refused, but wrote", f"{changed} {done.err}"
    return ("done", "failed in a line", "refused")[done.code], done.err


def changes(before: dict[str, bytes | int], after: dict[str, bytes | int]) -> list[str]:
    """The files that are not as they were."""
    files = {name for one in (before, after) for name, data in one.items() if isinstance(data, bytes)}
    return sorted(name for name in files if before.get(name) != after.get(name))


def changed_file(number: int, seed: int) -> Sequence[object]:
    """Change one file of `run`, a copy of `whole`; what to call."""
    g = random.Random(f"{seed}/{number}")
    shutil.rmtree("run", ignore_errors=True)
    shutil.copytree("whole", "run")
    files = sorted(path for path in Path("run").rglob("*") if path.is_file() and commands(path))
    kind = g.choice(list(COMMANDS))
    file = g.choice([path for path in files if path.name.endswith(kind)])
    file.write_bytes(mutated(file.read_bytes(), g))
    words = g.choice(commands(file))
    weights = ["--weights", str(file)] if words[0] == "sample" and kind == ".safetensors" and g.random() < 0.5 else []
    return [*words, *weights]


def commands(file: Path) -> Sequence[list[str]]:
    """What reads such a file."""
    return next((words for name, words in COMMANDS.items() if file.name.endswith(name)), ())


def main() -> int:
    """Options, then files."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--count", type=int, default=600)
    asked.add_argument("--seed", type=int, default=0)
    options = asked.parse_args()
    started, ends, found = time.perf_counter(), {"options": Counter[str](), "files": Counter[str]()}, 0
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        made()
        shutil.copytree("run", "whole")
        jobs = [("options", n, words) for n, words in enumerate(OPTIONS)]
        jobs += [("files", n, None) for n in range(options.count)]
        for kind, number, fixed in jobs:
            words = fixed or changed_file(number, options.seed)
            end, said = wrong(words, Path("run"))
            ends[kind][end] += 1
            if end not in ("done", "refused", "failed in a line"):
                found += 1
                print(f"{kind} {number}: {' '.join(map(str, words))[:200]!r}: {end}: {said[:300]}", flush=True)
        os.chdir("/")
    for kind, counts in ends.items():
        print(kind, ", ".join(f"{end} {n}" for end, n in counts.most_common()))
    print(f"{found} found, {time.perf_counter() - started:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
