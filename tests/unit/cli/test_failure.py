"""A limit of the machine, and what the user can mend, are lines; a defect is a traceback."""

import errno
import os

import numpy as np
import pytest
import torch

from dumo.cli.failure import MORE, sparing, told
from dumo.runtime.heartbeat import Lost
from dumo.training.step import Diverged
from dumo.types import UserError

CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB, 1.00 GiB of it free."


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("a\nb"), "a\nb", 2),
        (Diverged("step 3"), "step 3", 1),
        (Lost("rank 1 is gone"), "rank 1 is gone", 1),
        (PermissionError(errno.EACCES, "Permission denied", "a\nb"), r"a\nb: Permission denied", 2),
        (OSError(errno.ENOSPC, "No space left on device"), "writing: No space left on device", 2),
        (OSError(errno.EMFILE, "Too many open files", "x"), "x: Too many open files: raise the limit (ulimit -n)", 2),
        (torch.OutOfMemoryError(CUDA), f"out of memory at 2.50 GiB more: {MORE}", 1),
        (RuntimeError(f"rank 1: OutOfMemoryError: {CUDA}"), f"out of memory at 2.50 GiB more: {MORE}", 1),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), f"out of memory: {MORE}", 1),
    ],
)
def test_lines(error: Exception, line: str, code: int) -> None:
    assert told(error) == (line, code)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), KeyError("x")])
def test_a_defect_is_none(error: Exception) -> None:
    assert told(error) is None


def test_too_little_memory_is_known_on_this_machine_and_told_with_a_way_out() -> None:
    with pytest.raises(RuntimeError) as torch_s, sparing("lower train.micro_batch"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(MemoryError) as numpy_s, sparing("lower train.micro_batch"):
        np.empty(2**60, np.uint8)
    for raised in (torch_s, numpy_s):
        line, code = told(raised.value) or ("", 0)
        assert line.startswith("out of memory at 1")
        assert line.endswith(" more: lower train.micro_batch")
        assert code == 1
    with pytest.raises(RuntimeError) as other, sparing("lower train.micro_batch"):
        raise RuntimeError(os.strerror(errno.EIO))
    assert not hasattr(other.value, "__notes__")
