"""Processes of a test meet, work, and part."""

import faulthandler
import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed

from forked import Program


@contextmanager
def met(file: str, rank: int, ranks: int) -> Generator[None, None, None]:
    """Work as rank `rank` of so many that meet in `file`, which is not there yet; others may meet afterwards.

    Nobody leaves while another still gathers: gloo's threads may crash in a group that is taken apart meanwhile.
    """
    faulthandler.enable()
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@contextmanager
def meeting(file: str, rank: int, ranks: int = 2) -> Generator[None, None, None]:
    """Work as rank `rank` of so many that meet in `file`; who comes through leaves at once, with exit code 0.

    torch keeps a sharded net's process group in caches of its own after it is destroyed (2.13), and the threads of
    such a group may abort the interpreter while it shuts down. An error inside leaves by the usual way.
    """
    with met(file, rank, ranks):
        yield
    leave()


def leave() -> NoReturn:
    """End this process, well."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def outputs(processes: Sequence[Program], patience: float) -> list[tuple[str, str]]:
    """What each of these said, on stdout and stderr, once all have ended well.

    The first that has not ends the others, which wait for it.
    """
    late = time.monotonic() + patience
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > late:
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
    said = [process.communicate() for process in processes]
    assert codes == [0] * len(codes), (codes, *(text[-3000:] for texts in said for text in texts))
    return said
