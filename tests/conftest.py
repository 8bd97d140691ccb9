"""Settings that all tests share."""

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pytest
import torch
from torch.torch_version import TorchVersion

import browser
import shapes  # noqa: F401, before dumo
import spent
from dumo.runtime import signals

if TYPE_CHECKING:
    from tiny import TinyRuns

if sys.__stdin__ is None:  # closed (`<&-`); pytest and pandas read its encoding
    sys.__stdin__ = Path(os.devnull).open()  # noqa: SIM115, for as long as the tests run
matplotlib.use("Agg")
torch.set_num_threads(1)  # the tests run side by side, and a number of threads is a number of roundings

# Nothing reaches the Hugging Face Hub: its client reads this when it is imported, also in the processes of tests.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"

DATA = "DUMO_DATA"  # a folder of real images and a real autoencoder; tests marked `data` read it
LEFT = {  # to a later tier, by the expression of marks that make gives
    "not nightly and not slow": ("slow", "nightly"),
    "not nightly": ("nightly",),
}
left_out: dict[str, int] = {}  # how many tests, by mark


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> "TinyRuns":
    """Shared by the processes of pytest-xdist, whose folders for files lie in one."""
    from tiny import TinyRuns  # with all of dumo, which few tests need

    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (folder := session / "tiny").mkdir(exist_ok=True)
    return TinyRuns(folder)


@pytest.fixture
def default_signals() -> Generator[None, None, None]:
    """No signal is ignored, as nohup and a shell's background jobs ignore some."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    for number in signals.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, old in before.items():
        signal.signal(number, old)


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a folder that is named and not there: its tests would silently not run."""
    if (folder := os.environ.get(DATA)) and not Path(folder).is_dir():
        raise pytest.UsageError(f"{DATA} is {folder}, which is no folder: set it right, or not at all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the folder, or a browser, leave out the tests that need it; count what is left out."""
    tiers = Counter(tier(item) for item in items)
    for mark in LEFT.get(config.option.markexpr, ()):
        left_out[mark] = tiers[mark]
    for mark, there in (("data", os.environ.get(DATA)), ("browser", browser.found())):
        if not there:
            without = [item for item in items if item.get_closest_marker(mark)]
            left_out[mark] = len(without)
            config.hook.pytest_deselected(items=without)
            items[:] = [item for item in items if item not in without]


def tier(item: pytest.Item) -> str:
    """The mark that says it, "" of what `make test` runs."""
    return next((mark for mark in ("nightly", "slow") if item.get_closest_marker(mark)), "")


def pytest_collection_finish() -> None:
    """What it took to import all tests. What was imported stays, and is not searched for garbage each time."""
    gc.freeze()
    spent.seconds_by_file[spent.COLLECTION] += spent.processor_seconds()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """In whatever order tests run, torch's own generator gives each the same numbers."""
    torch.manual_seed(260217682)  # no seed that a test has: equal draws hide errors


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What a test took, with the fixtures that it was the first to need."""
    before = spent.processor_seconds()
    result = yield
    spent.seconds_by_file[item.location[0]] += spent.processor_seconds() - before
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that has the terminal."""
    if (told := getattr(session.config, "workeroutput", None)) is not None:
        told["left_out"] = left_out
        told["seconds_by_file"] = dict(spent.seconds_by_file)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401, of pytest-xdist, which is not typed
    """Hear it."""
    told = getattr(node, "workeroutput", {})
    left_out.update(told.get("left_out", {}))
    spent.seconds_by_file.update(told.get("seconds_by_file", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was dear, and how many were left out, and why."""
    spent.say(terminalreporter)
    if left_out.get("data"):
        terminalreporter.write_line(f"{left_out['data']} tests need real data, and {DATA} is not set: left out")
    if left_out.get("browser"):
        terminalreporter.write_line(f"{left_out['browser']} tests need Chromium, and there is none: left out")
    if left_out.get("slow"):
        terminalreporter.write_line(f"{left_out['slow']} tests left to continuous integration: make test SLOW=1")
    if left_out.get("nightly"):
        terminalreporter.write_line(f"{left_out['nightly']} tests left to the night: make slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip, with this reason, what dumo refuses with the lowest torch that it allows."""
    from dumo.runtime.dist import MIN_TORCH  # jaxtyping must see it first, to check shapes in it

    report = yield
    refusal = f"needs torch {MIN_TORCH} or newer"  # for several ranks, and for shards that they wrote
    if report.failed and TorchVersion(torch.__version__) < MIN_TORCH and refusal in report.longreprtext:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {refusal}")
    return report
