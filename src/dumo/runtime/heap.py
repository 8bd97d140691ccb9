"""Keep glibc's heap from holding on to freed memory while weights are made: `low_memory_heap`.

By default it may keep as much again as the weights take, where they are made one by one: on two ranks with an int8 base
of 0.44 GB a rank then takes 3.1 GB at most, and 2.1 GB with it.
"""

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager

_TRIM_THRESHOLD = -1  # malloc.h: M_TRIM_THRESHOLD
_MMAP_THRESHOLD = -3  # malloc.h: M_MMAP_THRESHOLD
KiB = 2**10
MiB = 2**20
_LARGEST_KEPT = 32 * MiB  # the largest block that glibc keeps, once it has freed one


@contextmanager
def low_memory_heap() -> Generator[None, None, None]:
    """While inside, freed blocks of 128 KiB and more go back to the system at once; afterwards glibc's default holds.

    What is free goes back first, and again at the end: new blocks fill gaps between older ones before the heap grows,
    and such a gap does not go back by itself. It is for making and examining weights, not for training: a step on a CPU
    would take more than twice the time. Does nothing where the environment chooses, or without glibc.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or mallopt is None:
        yield
        return
    libc.malloc_trim(0)  # glibc has it where it has mallopt
    mallopt(_MMAP_THRESHOLD, 128 * KiB)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_KEPT)
        libc.malloc_trim(0)
