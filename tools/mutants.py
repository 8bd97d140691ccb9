"""Plant errors in the mathematics, one at a time, and see that a test fails for each: `make mutants`.

    python tools/mutants.py [--tested] [WORD ...]    # rows of mutants.toml with a WORD in their file or text, or all

Each row has a process of its own. All of dumo is imported once, and the processes are forked from there, in which the
functions with the error get its code. Errors outside of functions come before: Python imports the file with the error.
Files stay as they are.

An error that its test lets live is a law that nobody checks, and the exit code is 1. At last the tests that failed run
once without any error, and must pass.

--tested is for continuous integration, where `make test SLOW=1` runs, too: the tests are not run again, and errors that
only a test of the night sees are left to the night, when all are planted.

Each row says how many seconds of a processor it took. Those above `MAX_SECONDS` are named at the end: a smaller test
should do. They are no failure, as a busy machine may need more.
"""

import gc
import importlib
import multiprocessing
import os
import re
import resource
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FunctionType

import pytest
import torch

from planted import METHOD, Plant, functions_by_code

ROOT = Path(__file__).parent.parent
TABLE = Path(__file__).with_suffix(".toml")
AT_ONCE = 2
# What dumo and the tests import of others, and would each time take a second to eight. Not what starts threads, as
# scikit-learn's pyarrow does.
OTHERS = [
    *("_pytest.debugging", "_pytest.doctest", "_pytest.junitxml", "_pytest.pastebin", "_pytest.unittest"),
    *("torch._decomp.decompositions_for_jvp", "torch._dynamo", "torch._refs", "torch.distributed.fsdp"),
    *("scipy.linalg", "scipy.optimize", "scipy.stats", "matplotlib.pyplot", "PIL.Image"),
    *("bitsandbytes", "diffusers.models.transformers.transformer_flux", "peft", "safetensors.torch"),
    *("filelock", "jaxtyping", "jinja2", "pydantic.main", "rich.progress", "typer", "yaml"),
]
FORK = multiprocessing.get_context("fork")
ADDED = "--import-mode=importlib --strict-markers --strict-config -ra"
SHARED = ["contract.case", "e2e.shell", "stock.case", "theory.exact", "theory.formula", "tiny"]  # by many tests
imported = dict[tuple[str, CodeType], list[FunctionType]]()  # every function, by its file and code, after `import_all`
MAX_SECONDS = 3.0  # of a processor
TESTED = "--tested"
UNPLANTABLE = (ValueError, SyntaxError, OSError)  # a row that does not fit the files
SAID = "output"  # in the folder of a process: the file of what it prints
PATIENCE = 1800  # seconds, on a machine where all else comes first; alone, no run takes 60


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in src/dumo/`file`, becomes `new`, which is wrong: `test` must fail."""

    file: str
    wrong: str
    old: str
    new: str
    test: str

    def text(self) -> str:
        """The file with the error. Raises ValueError unless there is exactly one place for it."""
        text = (ROOT / "src/dumo" / self.file).read_text()
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {times} times: mend tools/mutants.toml")
        return text.replace(self.old, self.new)

    def is_inside_functions(self) -> bool:
        """Whether functions have the error, and nothing else of the file."""
        try:
            return bool(planted(self).wrong_functions())
        except UNPLANTABLE:
            return False  # stale, as the trial will say; or it adds or removes a function, and is planted at import

    def path(self) -> str:
        """The test, as pytest takes it. Raises ValueError unless it is a single one, and there is one such file."""
        name, *node = self.test.split("::")
        if not node:
            raise ValueError(f"{self.test!r} names no single test: mend tools/mutants.toml")
        ends = f"{Path('/', name).with_name(f'test_{Path(name).name}')}.py"
        found = [file for file in test_files() if f"/{file}".endswith(ends)]
        if len(found) != 1:
            raise ValueError(f"{self.test!r} is a test of {found or 'no file'}: mend tools/mutants.toml")
        return "::".join([*found, *node])


def mutants(*words: str) -> list[Mutant]:
    """All rows of the table, or those that have one of the words in their file or text."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    rows = [Mutant(file, wrong, *row) for file, own in table.items() for wrong, row in own.items()]
    return [row for row in rows if not words or any(word in f"{row.file} {row.wrong}" for word in words)]


@cache
def test_files() -> list[str]:
    """Every file of tests."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


def warm() -> None:
    """Do here once what each child would do again: import what is not ours, and keep what Python compiles."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", METHOD: "fork"}
    sys.dont_write_bytecode = False
    torch.set_num_threads(1)
    for name in OTHERS:
        importlib.import_module(name)
    gc.freeze()


def import_all() -> None:
    """All of dumo, and what the tests share."""
    for name in [*map(module_name, sorted((ROOT / "src").rglob("[!_]*.py"))), *SHARED]:
        importlib.import_module(name)
    imported.update(functions_by_code())
    gc.freeze()


def module_name(path: Path) -> str:
    """By which a file in src is imported."""
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def planted(mutant: Mutant) -> Plant:
    """The module with the error. Raises ValueError as `Mutant.text` does."""
    path = ROOT / "src/dumo" / mutant.file
    return Plant(module_name(path), str(path), mutant.text())


@dataclass(frozen=True)
class Outcome:
    """Of a process of tests: pytest's exit code, what it printed, and the seconds of a processor that it took."""

    code: int
    output: str
    seconds: float


def run(words: list[str], plant: Plant | None = None) -> Outcome:
    """Run pytest with these words in a process forked from this one, where what its tests import is.

    Raises TimeoutError where they take too long.
    """
    seconds = FORK.Value("d", 0.0)  # which the child writes at its end
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its programs may still write
        child = FORK.Process(target=test, args=(words, plant, Path(folder), seconds))
        child.start()
        end = time.monotonic() + PATIENCE
        while child.exitcode is None:  # not join: it waits for the end of a pipe that the other child holds, too
            if time.monotonic() > end:
                child.kill()
                raise TimeoutError(f"no end after {PATIENCE} s")
            time.sleep(0.05)
        said = Path(folder, SAID)
        return Outcome(child.exitcode, said.read_text() if said.exists() else "it printed nothing", seconds.value)


def test(words: list[str], plant: Plant | None, folder: Path, seconds: Synchronized) -> None:
    """Run pytest with these words in this process, and end it; shapes are not checked, as that takes longer."""
    with (folder / SAID).open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if plant:
        plant.patch(imported) if imported else plant.plant()
    options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-o", f"addopts={ADDED}"]
    options += ["-p", "no:unraisableexception"]  # garbage of the process that this was forked from is no test's fault
    options += [f"--basetemp={folder / 'tests'}"]  # pytest's own place keeps three: each row would delete another's
    code = pytest.main([*options, *words])
    seconds.value = cpu_seconds(resource.RUSAGE_SELF) + cpu_seconds(resource.RUSAGE_CHILDREN)
    os._exit(code)


def cpu_seconds(of: int) -> float:
    """Of this process, RUSAGE_SELF, or of all that it started and that have ended, RUSAGE_CHILDREN."""
    usage = resource.getrusage(of)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Verdict:
    """The test that failed with a mutant, None if the mutant lives; what to say of it; its seconds of a processor."""

    failed: str | None
    message: str
    seconds: float = 0.0
    left: bool = False  # its test is one of the night


def trial(mutant: Mutant, words: list[str]) -> Verdict:
    """Plant one error, and run its test, if these words choose it."""
    try:
        outcome = run([*words, mutant.path()], planted(mutant))
    except (*UNPLANTABLE, TimeoutError) as error:
        return Verdict(None, str(error))
    failed = re.search(r"^FAILED (.*?)( - .*)?$", outcome.output, re.MULTILINE)
    if outcome.code == 1 and failed:
        return Verdict(failed[1], failed[1].partition("::")[2], outcome.seconds)
    if outcome.code == 0:
        return Verdict(None, "SURVIVED", outcome.seconds)
    if words and outcome.code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return Verdict(None, "left to the night", outcome.seconds, left=True)
    message = f"no test failed, yet pytest exits with {outcome.code}: {outcome.output[-300:]}"
    return Verdict(None, message, outcome.seconds)


def verdicts(rows: list[Mutant], words: list[str], pool: ThreadPoolExecutor) -> Iterator[tuple[Mutant, Verdict]]:
    """Of each row, those first that Python must not have imported yet; `words` choose tests for pytest."""
    tried = partial(trial, words=words)
    inside, outside = list[Mutant](), list[Mutant]()
    for row in rows:
        (inside if row.is_inside_functions() else outside).append(row)
    yield from zip(outside, pool.map(tried, outside), strict=True)
    import_all()
    yield from zip(inside, pool.map(tried, inside), strict=True)


def sane(tests: set[str]) -> str:
    """What the tests that saw an error say without one; empty if they pass."""
    outcome = run(sorted(tests))
    return outcome.output[-2000:] if outcome.code else ""


def main(*given: str) -> int:
    """Print a row per mutant. 0 if every one was killed, by a test that passes without it."""
    words, tested = [word for word in given if word != TESTED], TESTED in given
    begun, rows = time.monotonic(), mutants(*words)
    if not rows:
        print(f"no row of {TABLE.name} has {' or '.join(map(repr, words))} in its file or text")
        return 2
    os.chdir(ROOT)
    seen, alive, dear, left = list[str](), list[str](), list[str](), 0
    warm()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutant, verdict in verdicts(rows, ["-m", "not nightly"] if tested else [], pool):
            if verdict.left:
                left += 1
                continue
            word = "killed" if verdict.failed else "ALIVE "
            line = f"{word} {verdict.seconds:5.1f} s  {mutant.file:28} {mutant.wrong:46} {verdict.message}"
            print(line, flush=True)
            if verdict.failed:
                seen.append(verdict.failed)
            else:
                alive.append(line)
            if verdict.seconds > MAX_SECONDS:
                dear.append(line)
        broken = sane(set(seen)) if seen and not tested else ""
    if broken:
        print(f"BROKEN  without a mutant: {broken}")
    elif not tested:
        print("fine    without a mutant: the tests pass")
    if dear:
        print(f"above {MAX_SECONDS:g} s of a processor, as no row should be:")
    for line in [*dear, *alive]:  # again, where one looks
        print(line)
    cpu = f"{cpu_seconds(resource.RUSAGE_CHILDREN):.0f} s of processors"
    later = f", {left} are left to the night" if tested else ""
    print(f"{len(seen)} of {len(rows)} mutants killed in {time.monotonic() - begun:.0f} s, {cpu}{later}")
    return 1 if broken or alive else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
