"""The compute device of a process, its memory and speed, and software versions.

- `choose_device` converts a name to a device.
- `total_memory` returns the memory of a device, and `require_memory` raises an error if more is needed.
- `free_memory` releases unused memory.
- `peak_bytes` returns the peak memory of this process.
- `known_peak_tflops` looks up the speed of a GPU.
- `software_versions` returns the versions that reports and checkpoints record.
"""

import gc
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from dumo.runtime import dist, version
from dumo.types import UserError

# dense bf16 TFLOP/s, added in fp32, by a part of the GPU's name (NVIDIA's data sheets, SXM)
_TFLOPS_BY_GPU = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "RTX 3090": 71.0, "RTX 4090": 165.0, "RTX 5090": 209.0}
CONTAINER_LIMITS = (  # the files with the memory limit of a container
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # of older systems
)


def choose_device(name: str) -> torch.device:
    """Return the device of this name. 'auto' means the GPU (each rank's own, even before `dist.join`), else the CPU.

    Raises UserError for a missing device, and for a GPU number if there are several ranks.
    """
    _, world_size = dist.torchrun_rank_and_world()
    if world_size > 1:
        if ":" in name:
            raise UserError(
                f"device '{name}' would be shared by all {world_size} ranks: use auto for one device per rank, or cpu"
            )
        dist.take_own_gpu()  # `dist.join` would do so, but the memory of the device is asked for before
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        x = torch.zeros(0, device=name).sum()  # the smallest computation: the sum of nothing is one number
        x.item()  # fetches it, which raises on `meta`
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device '{name}' is not available: use auto or cpu") from error
    return x.device


def free_memory(device: torch.device) -> None:
    """Release unreferenced memory of the device, such as that of a deleted encoder."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def total_memory(device: torch.device) -> int:
    """Return the total memory of a GPU, or else of the machine or container, in bytes."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return total
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in CONTAINER_LIMITS:
        try:
            limit = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdecimal():  # else "max"
            total = min(total, int(limit))
    return total


def require_memory(size: int, what: str, fix: str, device: torch.device | str = "cpu") -> None:
    """Raise UserError if `size` bytes exceed the memory of the device, unless it is 'meta'.

    The message begins with `what`, such as "the net takes", and ends with `fix`.
    """
    device = torch.device(device)
    if device.type == "meta":
        return
    total = total_memory(device)
    if size > total:
        raise UserError(f"{what} {size / 1e9:,.1f} GB of memory, but {device} has {total / 1e9:,.1f} GB: {fix}")


def known_peak_tflops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a GPU in TFLOP/s, or None for an unlisted GPU and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peak in _TFLOPS_BY_GPU.items():
        if part in name:
            return peak
    return None


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: of the GPU allocator, or else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes
    return resident * bytes_per_unit


def software_versions() -> dict[str, str]:
    """Return the versions that a result depends on: of dumo, torch and Python."""
    return {"dumo": version(), "torch": torch.__version__, "python": platform.python_version()}
