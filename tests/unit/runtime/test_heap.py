"""Freed memory goes back to the system where weights are made, and the heap is glibc's own afterwards."""

import platform
import subprocess
import sys

import pytest

CODE = """
import contextlib, sys, torch
from pathlib import Path
from dumo.runtime.heap import low_memory_heap

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))

torch.ones(2**22)  # from here on glibc keeps blocks of up to 16 MiB
if sys.argv[1] == "after":
    with low_memory_heap():
        torch.ones(2**22)
with low_memory_heap() if sys.argv[1] == "within" else contextlib.nullcontext():
    begun, kept, freed = own(), [], []
    for _ in range(40):
        freed.append(torch.ones(2**20))
        kept.append(torch.ones(2**14))
    del freed
    if sys.argv[1] != "refilled":
        print(own() - begun)
if sys.argv[1] == "refilled":
    with low_memory_heap():
        freed = [torch.ones(2**20) for _ in range(40)]  # into the gaps
        del freed
    print(own() - begun)
"""


KEPT = [("never", True), ("within", False), ("after", True), ("refilled", False)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another heap")
@pytest.mark.nightly
@pytest.mark.parametrize(("when", "kept"), KEPT)
def test_freed_blocks_go_back_within(when: str, kept: bool) -> None:
    """MiB left of 160 that were freed between 2.5 that stay."""
    words = [sys.executable, "-c", CODE, when]
    left = int(subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert left > 100 if kept else left < 20
