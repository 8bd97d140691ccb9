"""What glibc's heap keeps of freed memory: by default up to as much again where weights are made one by one."""

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager

TRIM, MAP = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
KiB, MiB = 2**10, 2**20
LARGEST = 32 * MiB  # of blocks that glibc keeps, once it has freed one


@contextmanager
def lean() -> Generator[None, None, None]:
    """Within, freed blocks of 128 KiB and more go back to the system at once; after it, as glibc does by itself.

    A step on a CPU would take more than twice the time. Does nothing where the environment chooses, or without glibc.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or not (option := getattr(ctypes.CDLL(None), "mallopt", None)):
        yield
        return
    option(MAP, 128 * KiB)
    try:
        yield
    finally:
        option(MAP, LARGEST)
        option(TRIM, 2 * LARGEST)
