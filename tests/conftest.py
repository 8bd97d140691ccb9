"""Settings that all tests share."""

import os
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # the tests run side by side, and a number of threads is a number of roundings

DATA = "DUMO_DATA"  # a folder of real images and a real autoencoder; tests marked `data` read it
left_out: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a folder that is named and not there: its tests would silently not run."""
    if (folder := os.environ.get(DATA)) and not Path(folder).is_dir():
        raise pytest.UsageError(f"{DATA} is {folder}, which is no folder: set it right, or not at all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the folder leave out the tests that read it, and count them."""
    if os.environ.get(DATA):
        return
    without = [item for item in items if item.get_closest_marker("data")]
    left_out.extend(item.nodeid for item in without)
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many were left out, and why."""
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} tests need real data, and {DATA} is not set: left out")
