"""The number of threads that torch uses on a CPU.

Threads busy-wait for each other. The operations of a small network are too short for this: on an idle machine several
threads gain little, and next to another busy process a step takes ten times as long (docs/adr/0020-threads.md). Small
networks therefore use one thread, and large ones torch's default of one per core. OMP_NUM_THREADS or MKL_NUM_THREADS
override this.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MAX_SMALL_PARAMETERS = 2_000_000  # of a network that gets one thread


def cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(net: nn.Module, device: torch.device, recorded: int | None = None) -> int | None:
    """Let torch use a number of threads that suits a network, and return it; None on a GPU, where nothing changes.

    `recorded` is the number that a checkpoint was trained with: it is used again, because it decides how sums round.
    """
    if device.type != "cpu":
        return None
    if not any(os.environ.get(name) for name in VARIABLES):
        is_small = sum(p.numel() for p in net.parameters()) <= MAX_SMALL_PARAMETERS
        torch.set_num_threads(recorded or (1 if is_small else torch.get_num_threads()))
    return torch.get_num_threads()


@contextmanager
def restored_threads() -> Generator[None, None, None]:
    """Restore torch's number of threads at the end."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
