"""Ranks, means over ranks, devices, versions: the one place that knows how many processes train, and where.

Without torch.distributed there is one rank, number 0, and a mean over ranks is the identity.
"""

import platform

import torch.distributed
from torch import Tensor

from dumo import __version__
from dumo.types import UserError


def rank() -> int:
    """The number of this process, in [0, world)."""
    return torch.distributed.get_rank() if started() else 0


def world() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if started() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


def mean(x: Tensor) -> Tensor:
    """The mean of x over ranks, on every rank; x itself is left alone. Every rank must call it, with the same shape."""
    if world() == 1:
        return x
    total = x.clone()
    torch.distributed.all_reduce(total)  # a sum: gloo knows no mean
    return total / world()


def started() -> bool:
    """Whether a process group is there to ask."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def device(name: str) -> torch.device:
    """'auto' is the GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' is not to be had here: use auto or cpu") from error
    if found.type == "meta":
        raise UserError(f"device '{name}' holds no numbers: use auto or cpu")
    return found


def versions() -> dict[str, str]:
    """What makes a result: dumo, torch and Python."""
    return {"dumo": __version__, "torch": torch.__version__, "python": platform.python_version()}
