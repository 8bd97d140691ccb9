"""What a device can do and has taken: its speed, known or measured, and the most bytes of memory so far.

Which device is chosen, and how much memory it has: `dumo.runtime.dist`.
"""

import resource
import sys
from functools import cache, partial

import torch

from dumo.runtime.stopwatch import Stopwatch

TFLOPS_BY_GPU = {"H100": 989.0, "H200": 989.0}  # dense bf16 TFLOP/s by the GPU's name (NVIDIA's data sheets, SXM)
SIDE = 1024  # rows of the square matrix that is timed on a CPU, enough for its own speed to show: ours
SIDE_ON_GPU = 8192  # and on a GPU: ours


def known_peak_tflops(device: torch.device) -> float | None:
    """The dense bf16 peak of a GPU that is known, in 10^12 operations a second; None of any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in TFLOPS_BY_GPU.items() if part in name), None)


@cache
def operations_per_second(device: torch.device) -> float:
    """Floating-point operations a second of a product of square matrices, in bf16 on a GPU, else in float32.

    Measured once in a process: the best of four.
    """
    on_gpu = device.type == "cuda"
    side = SIDE_ON_GPU if on_gpu else SIDE
    dtype = torch.bfloat16 if on_gpu else torch.float32
    x = torch.ones(side, side, device=device, dtype=dtype)
    times = Stopwatch(device).rounds([partial(torch.mm, x, x)], 4, warm_up=0)
    return 2 * side**3 / max(times.min().item(), 1e-9)


def peak_bytes(device: torch.device) -> int:
    """The most bytes that this process has held so far: of a GPU's allocator, else of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident  # kilobytes on Linux
