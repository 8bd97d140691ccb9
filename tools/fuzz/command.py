"""Commands with options that nobody means, and commands on a run's folder in which a file was changed.

What is refused, with exit code 2, must leave the run's folder as it was. `trained_run` makes the run that all trials
use, in a temporary folder that becomes the working folder. `option_trials` go through OPTIONS, `changed_file_trials`
draw files of COMMANDS_BY_FILE and change their bytes. `outcome_of_command` runs one and names its end.
"""

import os
import random
import shutil
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from e2e.shell import TINY, call, sets, tree
from fuzz.judge import MAX_REFUSAL_CHARACTERS, Outcome, TooSlow, Trial, last_dumo_line, limits
from fuzz.mutation import change_bytes

RUN = Path("run")  # the run that commands work on
ORIGINAL = Path("original")  # a copy of it that nothing changes
MAX_SECONDS = 120  # of a command, on a busy machine
HUGE = str(10**12)
LONG = "x" * 5000
LONG_NUMBER = "9" * 5000

SAMPLE = "sample run --count 2 --nfe 1 --out out"
LONGER = "train run --set train.steps=21"
COMMANDS_BY_FILE = {  # the commands that read a file of a run's folder, by the end of its name
    "run.yaml": ("show run", SAMPLE, "train run"),
    "evaluation.json": ("compare run", "compare run run --json"),
    "state.json": (SAMPLE, "train run"),
    "metrics.jsonl": (LONGER,),
    "data.json": (LONGER,),
    ".safetensors": (SAMPLE, "train run"),
}

TINY_DIGITS = ("train", "digits", *TINY)
ENCODE = "encode . out --codec taef2 --side"
# A command in which VALUE stands for each of the texts behind it.
OPTION_VALUES: tuple[tuple[str | Sequence[str], Sequence[str]], ...] = (
    ("sample run --nfe VALUE", ("", ",", "1,", "-1", "0", "x", "1e3", LONG_NUMBER, "١", "1000000", "1,1")),
    ("sample run --count VALUE", ("", "-1", "0", HUGE, LONG_NUMBER, "1.5", "nan")),
    ("sample run --labels VALUE", ("", ",", "-1", "10", HUGE, LONG_NUMBER, "x", LONG, "\0", "²")),
    ("sample run --seed VALUE", ("", "-1", "x", "1.5")),
    ("sample run --out VALUE --count 2 --nfe 1", ("", LONG, "a\0b", "run/run.yaml", "/dev/null/x")),
    ("sample run --weights VALUE", ("", LONG, "a\0b", ".", "/dev/zero", "run/run.yaml")),
    ("sample run --device VALUE", ("", "x", "cuda:99", "meta", "cpu:-1", LONG, "\0")),
    ("sample run --format VALUE", ("", "x", LONG)),
    ("sample VALUE", ("", ".", LONG, "a\0b", "/dev/zero", "/dev/null", "~nobody/x")),
    ("sample run --solver VALUE", ("", "x", LONG, "\0")),
    ("average run --std VALUE", ("", "x", "nan", "0.1", HUGE)),
    ("sample run --checkpoints VALUE", ("", "x", "-1", HUGE, LONG_NUMBER)),
    ("sample run --checkpoints all --nfe VALUE", ("", "0", "1000001", LONG_NUMBER)),
    ("sample run --checkpoints all --count VALUE", ("0", HUGE)),
    ("evaluate run --nfe VALUE", ("", "0", "1000001", LONG_NUMBER)),
    ("show VALUE", ("", ".", "/dev/zero", "/dev/null", "/etc/hostname", LONG, "a\0b", "a\nb", "\udcff")),
    ((*TINY_DIGITS, "--out", "VALUE"), ("", LONG, "a\0b", "/dev/null", "/dev/null/x", "run/run.yaml")),
    ("show digits --set VALUE", ("", "=", ".", "..=1", f"{LONG}=1", f"net.width={LONG}", "net.width=\0")),
    ("show digits --set net.depth=VALUE", (str(2**63), str(10**300), LONG_NUMBER, "1e400", "[[[[", "&a [*a]")),
    ((*TINY_DIGITS, "--set", "VALUE"), ("net.width=65536", "train.batch=true", "train.optimizer.lr=1e38")),
    ("train digits --set net.width=65536 --set net.depth=VALUE", ("100",)),
    ("compare VALUE", ("", ".", LONG, "a\0b", "/dev/zero", "/dev/null", "run/run.yaml")),
    ("encode VALUE out --codec taef2 --side 8", ("", "a\0b", LONG, "/dev/zero", "~nobody/x")),
    (f"{ENCODE} VALUE", (HUGE, "0", "")),
    ("bench step moons --shape VALUE", ("", "0", "-1", HUGE, LONG_NUMBER, ",")),
    ("bench step moons --batch VALUE", (HUGE, "0")),
    ("bench sample moons --batch VALUE", (HUGE, "0")),
    ("bench step moons --threads VALUE", (HUGE,)),
    ("bench step moons --precision VALUE", ("",)),
    ("dry moons --rows VALUE", (HUGE, "0")),
    ("data VALUE", ("", LONG, "\0")),
    ("reproduce VALUE", ("", LONG, "../x")),
    (f"reproduce fig3 --jobs {HUGE} --scale VALUE", ("x",)),
)


def _commands_of(template: str | Sequence[str], values: Sequence[str]) -> Iterator[list[str]]:
    """The words of a command, once for each value."""
    words = template.split() if isinstance(template, str) else template
    for value in values:
        yield [word.replace("VALUE", value) for word in words]


OPTIONS = [words for template, values in OPTION_VALUES for words in _commands_of(template, values)]


@contextmanager
def trained_run() -> Generator[None, None, None]:
    """Inside, the working folder is a temporary one, and holds a trained and judged RUN and its copy ORIGINAL."""
    folder_before = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            train = ["train", "moons", "--out", RUN, *TINY, *sets("train.log_every=5", "train.save_every=10")]
            for words in (train, ["evaluate", RUN]):
                done = call(*words)
                assert done.code == 0, done
            shutil.copytree(RUN, ORIGINAL)
            yield
        finally:
            os.chdir(folder_before)


def option_trials() -> Iterator[Trial]:
    """A trial for each of OPTIONS."""
    for number, words in enumerate(OPTIONS):
        yield _name("options", number, words), partial(outcome_of_command, words, RUN)


def changed_file_trials(count: int, seed: int) -> Iterator[Trial]:
    """`count` trials, each on a RUN in which one file was changed."""
    for number in range(count):
        words = _change_file(random.Random(f"{seed}/{number}"))
        yield _name("run files", number, words), partial(outcome_of_command, words, RUN)


def _name(kind: str, number: int, words: Sequence[str]) -> str:
    """A trial's name, with its command as far as it is short."""
    return f"{kind} {number}, {' '.join(words)[:200]!r}"


def _change_file(g: random.Random) -> list[str]:
    """Change one file of a new copy of the run, and return the words of a command that reads it."""
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree(ORIGINAL, RUN)
    suffix = g.choice(list(COMMANDS_BY_FILE))
    files = sorted(path for path in RUN.rglob(f"*{suffix}") if path.is_file())
    file = g.choice(files)
    file.write_bytes(change_bytes(file.read_bytes(), g))
    words = g.choice(COMMANDS_BY_FILE[suffix]).split()
    if words[0] == "sample" and suffix == ".safetensors" and g.random() < 0.5:
        words += ["--weights", str(file)]
    return words


def outcome_of_command(words: Sequence[str], watched: Path) -> Outcome:
    """Run `dumo WORDS` within limits, and say how it ended; a command that is refused must not change `watched`."""
    files_before = tree(watched)
    try:
        with limits(MAX_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = call(*words)
    except KeyboardInterrupt:
        raise
    except TooSlow as error:
        return Outcome("late", last_dumo_line(error))
    except BaseException as error:
        return Outcome(type(error).__name__, f"{error} {last_dumo_line(error)}")
    if "Traceback" in done.err or len(done.err) > MAX_REFUSAL_CHARACTERS + 2 * len(LONG):
        return Outcome("not plain", done.err)
    if done.code not in (0, 1, 2) or (done.code and not done.err.strip()):
        return Outcome(f"exit code {done.code}", done.err)
    if done.code == 2:
        changed = _changed_files(files_before, tree(watched))
        if changed:
            return Outcome("refused, but wrote", f"{changed} {done.err}")
    return Outcome(("done", "failed in a line", "refused")[done.code], done.err)


def _changed_files(before: dict[str, bytes | int], after: dict[str, bytes | int]) -> list[str]:
    """The names of files whose bytes changed, came or went; folders, whose value is a number, do not count."""
    names = {name for name, data in [*before.items(), *after.items()] if isinstance(data, bytes)}
    return sorted(name for name in names if before.get(name) != after.get(name))
