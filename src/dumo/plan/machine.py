"""What a machine has that training can use: found by trying it, since a library that is there may still not run."""

import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from dumo import runtime
from dumo.runtime import dist, install, installed

KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DTYPES = {"fp16": torch.float16, "fp64": torch.float64}
LITTLE = 1.0  # ours: GiB of free disk that are worth a warning
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """A line of a report, with the way out where all is not well."""

    name: str
    state: Literal["ok", "warning", "failing"]
    text: str
    way: str = ""


def look(here: torch.device) -> list[Finding]:
    """All there is to know of this machine and one device of it. Compiles a function: seconds, the first time."""
    versions = ", ".join(f"{name} {number}" for name, number in dist.versions().items())
    free = shutil.disk_usage(".").free / GIB
    full = "free some: a run keeps two checkpoints" if free < LITTLE else ""
    return [
        Finding("versions", "ok", versions),
        hardware(here),
        Finding("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        *([Finding("ranks", "ok", f"rank {dist.rank()} of {dist.world()}")] if dist.started() else []),
        kernels(here),
        dtypes(here),
        triton(here),
        compiler(here),
        judged("disk", f"{free:.1f} GiB free here, where runs/ goes", full),
        *extras(),
    ]


def judged(name: str, text: str, way: str) -> Finding:
    """A warning where there is a way out to show."""
    return Finding(name, "warning" if way else "ok", text, way)


def hardware(here: torch.device) -> Finding:
    """The device's name and memory."""
    name = torch.cuda.get_device_name(here) if here.type == "cuda" else platform.processor() or platform.machine()
    blind = torch.version.cuda is not None and not torch.cuda.is_available()
    way = "torch is built for CUDA but sees no GPU: see nvidia-smi" if blind else ""
    return judged("device", f"{here}: {name}, {dist.memory(here) / GIB:.1f} GiB", way)


def kernels(here: torch.device) -> Finding:
    """The kernels of attention that run, in bf16."""

    def attend(backend: SDPBackend) -> None:
        q = torch.ones(1, 1, 64, 64, device=here, dtype=torch.bfloat16)
        with sdpa_kernel(backend):
            scaled_dot_product_attention(q, q, q)

    have = [name for name, backend in KERNELS.items() if not fault(lambda backend=backend: attend(backend))]
    way = "" if len(have) > 1 else "attention takes memory by the square of the tokens: a newer torch or GPU has others"
    return judged("attention", ", ".join(have) or "none", way)


def dtypes(here: torch.device) -> Finding:
    """The precisions that a product of matrices runs in, other than fp32."""

    def autocast() -> None:
        with torch.autocast(here.type, torch.bfloat16):
            x = torch.ones(8, 8, device=here)
            if linear(x, x).dtype != torch.bfloat16:
                raise TypeError("autocast is ignored")

    def multiply(dtype: torch.dtype) -> None:
        x = torch.ones(8, 8, device=here, dtype=dtype)
        linear(x, x)

    lacks_bf16 = fault(autocast)
    have = [] if lacks_bf16 else ["bf16 autocast"]
    have += [name for name, dtype in DTYPES.items() if not fault(lambda dtype=dtype: multiply(dtype))]
    return judged("dtypes", ", ".join(["fp32", *have]), "keep train.precision=fp32" if lacks_bf16 else "")


def triton(here: torch.device) -> Finding:
    """Triton, which compiles kernels for GPUs."""
    version = installed("triton")
    way = install("triton") if here.type == "cuda" and not version else ""
    return judged("triton", version or "none", way)


def compiler(here: torch.device) -> Finding:
    """Whether torch.compile does: by compiling a line."""
    why = fault(lambda: torch.compile(lambda x: x.sin() * 2, fullgraph=True)(torch.ones(8, device=here)))
    if not why:
        return Finding("torch.compile", "ok", "works")
    has = any(shutil.which(name) for name in ("g++", "clang++"))
    way = "none is needed to train; mend what it says" if has else "install a C++ compiler, g++ or clang++"
    return Finding("torch.compile", "warning", why, way)


def extras() -> list[Finding]:
    """The optional packages, by the extra that brings them."""
    found: list[Finding] = []
    for extra, packages in runtime.extras().items():
        names = [re.split(r"[^\w.-]", package)[0] for package in packages]
        lacks = ", ".join(name for name in names if not installed(name))
        found.append(Finding(f"extra {extra}", "ok", f"lacks {lacks}: {install(extra)}" if lacks else "installed"))
    return found


def fault(work: Callable[[], object]) -> str:
    """The first line of what goes wrong, '' where nothing does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except Exception as error:  # whatever a compiler or driver may raise
        return f"{error}".partition("\n")[0] or type(error).__name__
    return ""
