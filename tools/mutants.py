"""Plant errors in the mathematics, one at a time, and see that a test fails for each: `make mutants`.

    python tools/mutants.py [--tested] [WORD ...]    # rows of mutants.toml with a WORD in their file or text, or all

The order of events (`main`):

1. `read_mutants` reads the rows of mutants.toml. Each has an error and the one test that must fail with it.
2. `warm_up` imports other libraries in this process, from which one is forked for each row.
3. Errors outside of functions are tried first: there, Python imports the file with the error.
4. `import_all` imports all of dumo. Errors inside functions are tried: there, the functions get its code.
5. The tests that failed run once more without any error, and must pass.

No file is changed (`mutated_module.py`). A row is printed as it ends, with the seconds of a processor that it took. If
its test passes, the error survives: nothing checks that property, and the exit code is 1. Rows above `MAX_CPU_SECONDS`
are named at the end, as a smaller test should do. They are no failure, as a busy machine may need more.

--tested is for continuous integration, where `make test SLOW=1` runs, too. It leaves out step 5, and errors that only
nightly tests catch: each night plants all.
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

import pytest
import torch

from mutated_module import START_METHOD_VARIABLE, FunctionsByCode, MutatedModule, imported_functions

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
TABLE = Path(__file__).with_suffix(".toml")
TESTED = "--tested"
MAX_PROCESSES = 2  # at a time: ours
MAX_CPU_SECONDS = 3.0  # of a row, else it is named: ours
TIMEOUT_SECONDS = 1800  # of a row, on a machine where all else comes first; alone, none takes 60
FORK = multiprocessing.get_context("fork")
STALE_ROW_ERRORS = (ValueError, SyntaxError, OSError)  # what a row raises that does not fit the files
OUTPUT_FILE = "output"  # in the folder of a child: what it prints
PYTEST_ADDOPTS = "--import-mode=importlib --strict-markers --strict-config -ra"
# What dumo and the tests import of others, and would each time take a second to eight. Not what starts threads, as
# scikit-learn's pyarrow does.
OTHER_MODULES = [
    *("_pytest.debugging", "_pytest.doctest", "_pytest.junitxml", "_pytest.pastebin", "_pytest.unittest"),
    *("torch._decomp.decompositions_for_jvp", "torch._dynamo", "torch._refs", "torch.distributed.fsdp"),
    *("scipy.linalg", "scipy.optimize", "scipy.stats", "matplotlib.pyplot", "PIL.Image"),
    *("bitsandbytes", "diffusers.models.transformers.transformer_flux", "peft", "safetensors.torch"),
    *("filelock", "jaxtyping", "jinja2", "pydantic.main", "rich.progress", "typer", "yaml"),
]
TEST_MODULES = ["contract.case", "e2e.shell", "stock.case", "theory.exact", "theory.formula", "tiny"]  # of many tests

_functions: FunctionsByCode = {}  # every function of dumo and of TEST_MODULES, once `import_all` has run


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Mutant:
    """A row of the table: `old`, which src/dumo/`file` has once, becomes `new`, which is wrong; `test` must fail."""

    file: str
    title: str  # what is wrong
    old: str
    new: str
    test: str  # a short name, such as pull::test_cost

    def mutated_text(self) -> str:
        """The file's text with the error. Raises ValueError unless the file has `old` exactly once."""
        text = (SOURCE / "dumo" / self.file).read_text()
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.file} has {self.old!r} {count} times: mend tools/mutants.toml")
        return text.replace(self.old, self.new)

    def module(self) -> MutatedModule:
        """The module with the error. Raises as `mutated_text`."""
        path = SOURCE / "dumo" / self.file
        return MutatedModule(_module_name(path), str(path), self.mutated_text())

    def is_inside_functions(self) -> bool:
        """Whether the error changes functions, and nothing else of the file.

        False, too, of an error that adds or removes a function, and of a stale row, which `try_mutant` reports.
        """
        try:
            return bool(self.module().changed_functions())
        except STALE_ROW_ERRORS:
            return False

    def test_id(self) -> str:
        """The test as pytest takes it. Raises ValueError unless it is a single test in a file of which there is one."""
        short_file, *node = self.test.split("::")
        if not node:
            raise ValueError(f"{self.test!r} names no single test: mend tools/mutants.toml")
        path = Path("/", short_file)
        ending = f"{path.with_name(f'test_{path.name}')}.py"
        files = [file for file in _test_files() if f"/{file}".endswith(ending)]
        if len(files) != 1:
            raise ValueError(f"{self.test!r} is a test of {files or 'no file'}: mend tools/mutants.toml")
        return "::".join([*files, *node])


def read_mutants(*words: str) -> list[Mutant]:
    """All rows of the table, or those that have one of the words in their file or title."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    mutants: list[Mutant] = []
    for file, rows in table.items():
        for title, (old, new, test) in rows.items():
            if not words or any(word in f"{file} {title}" for word in words):
                mutants.append(Mutant(file, title, old, new, test))
    return mutants


@cache
def _test_files() -> list[str]:
    """Every file of tests, as a path in the repository."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


def _module_name(path: Path) -> str:
    """The name by which a file in src is imported."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


# --------------------------------------------------------------------------------- what children have from this process


def warm_up() -> None:
    """Import other libraries here, once for all children, and set the environment in which they run."""
    sys.path[:0] = [str(SOURCE), str(ROOT / "tests")]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ[START_METHOD_VARIABLE] = "fork"
    sys.dont_write_bytecode = False
    torch.set_num_threads(1)
    for name in OTHER_MODULES:
        importlib.import_module(name)
    gc.freeze()


def import_all() -> None:
    """Import all of dumo and what many tests share, and note every function of these."""
    dumo_modules = [_module_name(path) for path in sorted(SOURCE.rglob("[!_]*.py"))]
    for name in [*dumo_modules, *TEST_MODULES]:
        importlib.import_module(name)
    _functions.update(imported_functions())
    gc.freeze()


# ----------------------------------------------------------------------------------------------------- pytest in a fork


@dataclass(frozen=True)
class PytestResult:
    """How a process of pytest ended."""

    exit_code: int
    output: str  # what it printed
    cpu_seconds: float


def run_pytest(arguments: list[str], module: MutatedModule | None = None) -> PytestResult:
    """Run pytest with these arguments in a fork of this process, with the error of a module if one is given.

    Raises TimeoutError where it takes longer than TIMEOUT_SECONDS.
    """
    cpu_seconds = FORK.Value("d", 0.0)  # the child writes it at its end
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # programs of the test may still write there
        child = FORK.Process(target=_run_child, args=(arguments, module, Path(folder), cpu_seconds))
        child.start()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while child.exitcode is None:  # not join: it waits for the end of a pipe that the other child holds, too
            if time.monotonic() > deadline:
                child.kill()
                raise TimeoutError(f"no end after {TIMEOUT_SECONDS} s")
            time.sleep(0.05)
        output_file = Path(folder, OUTPUT_FILE)
        output = output_file.read_text() if output_file.exists() else "it printed nothing"
        return PytestResult(child.exitcode, output, cpu_seconds.value)


def _run_child(arguments: list[str], module: MutatedModule | None, folder: Path, cpu_seconds: Synchronized) -> None:
    """Plant the error, run pytest in this process, and end the process with pytest's exit code.

    Shapes are not checked, as that takes longer.
    """
    with (folder / OUTPUT_FILE).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if module is not None and _functions:
        module.patch_functions(_functions)
    elif module is not None:
        module.install()
    options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-o", f"addopts={PYTEST_ADDOPTS}"]
    options += ["-p", "no:unraisableexception"]  # garbage of the process that this was forked from is no test's fault
    options += [f"--basetemp={folder / 'tests'}"]  # pytest's own folder keeps three: each row would delete another's
    exit_code = pytest.main([*options, *arguments])
    cpu_seconds.value = _cpu_seconds(resource.RUSAGE_SELF) + _cpu_seconds(resource.RUSAGE_CHILDREN)
    os._exit(exit_code)


def _cpu_seconds(who: int) -> float:
    """Seconds of a processor: RUSAGE_SELF of this process, RUSAGE_CHILDREN of its children that have ended."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


# ----------------------------------------------------------------------------------------------------------- the trials


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant."""

    failed_test: str | None  # None if the mutant survives
    message: str
    cpu_seconds: float = 0.0
    is_left_to_night: bool = False  # its test is a nightly one, and was not run


def try_mutants(
    mutants: list[Mutant], pytest_options: list[str], pool: ThreadPoolExecutor
) -> Iterator[tuple[Mutant, Verdict]]:
    """Try each mutant, first those that change more than functions: then dumo must not be imported here yet."""
    inside_functions: list[Mutant] = []
    others: list[Mutant] = []
    for mutant in mutants:
        group = inside_functions if mutant.is_inside_functions() else others
        group.append(mutant)
    try_one = partial(try_mutant, pytest_options=pytest_options)
    yield from zip(others, pool.map(try_one, others), strict=True)
    import_all()
    yield from zip(inside_functions, pool.map(try_one, inside_functions), strict=True)


def try_mutant(mutant: Mutant, pytest_options: list[str]) -> Verdict:
    """Plant one error and run its test, unless the options of pytest leave that out."""
    try:
        result = run_pytest([*pytest_options, mutant.test_id()], mutant.module())
    except (*STALE_ROW_ERRORS, TimeoutError) as error:
        return Verdict(None, str(error))
    failure = re.search(r"^FAILED (.*?)( - .*)?$", result.output, re.MULTILINE)
    if result.exit_code == pytest.ExitCode.TESTS_FAILED and failure:
        failed_test = failure[1]
        _, _, node = failed_test.partition("::")
        return Verdict(failed_test, node, result.cpu_seconds)
    if result.exit_code == pytest.ExitCode.OK:
        return Verdict(None, "SURVIVED", result.cpu_seconds)
    if pytest_options and result.exit_code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return Verdict(None, "left to the night", result.cpu_seconds, is_left_to_night=True)
    message = f"no test failed, yet pytest exits with {result.exit_code}: {result.output[-300:]}"
    return Verdict(None, message, result.cpu_seconds)


def main(*arguments: str) -> int:
    """Print a row for each mutant. Return 0 if every one was killed by a test that passes without it, 1 if not.

    2 where the table has no such row.
    """
    is_tested = TESTED in arguments
    words = [argument for argument in arguments if argument != TESTED]
    began = time.monotonic()
    mutants = read_mutants(*words)
    if not mutants:
        print(f"no row of {TABLE.name} has {' or '.join(map(repr, words))} in its file or text")
        return 2

    # try each mutant
    os.chdir(ROOT)
    warm_up()
    pytest_options = ["-m", "not nightly"] if is_tested else []
    num_killed = 0
    num_left = 0
    failed_tests: set[str] = set()
    surviving_lines: list[str] = []
    slow_lines: list[str] = []
    with ThreadPoolExecutor(MAX_PROCESSES) as pool:
        for mutant, verdict in try_mutants(mutants, pytest_options, pool):
            if verdict.is_left_to_night:
                num_left += 1
                continue
            word = "killed" if verdict.failed_test else "ALIVE "
            line = f"{word} {verdict.cpu_seconds:5.1f} s  {mutant.file:28} {mutant.title:46} {verdict.message}"
            print(line, flush=True)
            if verdict.failed_test:
                num_killed += 1
                failed_tests.add(verdict.failed_test)
            else:
                surviving_lines.append(line)
            if verdict.cpu_seconds > MAX_CPU_SECONDS:
                slow_lines.append(line)

    # the tests that failed must pass without a mutant
    is_broken = False
    if failed_tests and not is_tested:
        result = run_pytest(sorted(failed_tests))
        is_broken = result.exit_code != 0
        if is_broken:
            print(f"BROKEN  without a mutant: {result.output[-2000:]}")
    if not is_tested and not is_broken:
        print("fine    without a mutant: the tests pass")

    # summary
    if slow_lines:
        print(f"above {MAX_CPU_SECONDS:g} s of a processor, as no row should be:")
    for line in [*slow_lines, *surviving_lines]:  # again, where one looks
        print(line)
    summary = f"{num_killed} of {len(mutants)} mutants killed in {time.monotonic() - began:.0f} s"
    summary += f", {_cpu_seconds(resource.RUSAGE_CHILDREN):.0f} s of processors"
    if is_tested:
        summary += f", {num_left} are left to the night"
    print(summary)
    return 1 if is_broken or surviving_lines else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
