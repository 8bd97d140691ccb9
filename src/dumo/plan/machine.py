"""What a machine has that training can use: found by trying it, since a library that is there may still not run.

`examine_machine` is the entrance. It returns a `Finding` for each thing: versions, device, threads, ranks, kernels of
attention, dtypes, compilers, disk and extras. Reports name the machine by `hardware`. `Finding` and `ok_or_warning`
also serve `dumo.plan.findings`.
"""

import os
import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from packaging.requirements import Requirement
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from dumo import runtime
from dumo.runtime import dist, install_command, installed_version, package_problem
from dumo.runtime.device import software_versions, total_memory

KERNELS = {  # of attention, by the name that is shown
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DTYPES = {"fp16": torch.float16, "fp64": torch.float64}  # that are tried, besides fp32 and bf16 autocast
_MIN_FREE_GIB = 1.0  # of the disk, below which there is a warning: ours
_GIB = 2**30  # bytes


@dataclass(frozen=True)
class Finding:
    """A line of a report."""

    name: str  # what was examined
    state: Literal["ok", "warning", "failing"]
    text: str
    way: str = ""  # what to do where it is not well; "" where it is


def examine_machine(device: torch.device) -> list[Finding]:
    """Examine this machine and one device of it. Compiles a function, which takes seconds the first time."""
    versions = ", ".join(f"{name} {number}" for name, number in software_versions().items())
    findings = [
        Finding("versions", "ok", versions),
        hardware(device),
        Finding("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
    ]
    if dist.is_initialized():
        findings.append(Finding("ranks", "ok", f"rank {dist.rank()} of {dist.world()}"))
    findings += [
        attention_finding(device),
        dtype_finding(device),
        triton_finding(device),
        compiler_finding(device),
        disk_finding(),
        *extra_findings(),
    ]
    return findings


def ok_or_warning(name: str, text: str, way: str) -> Finding:
    """A finding that is a warning if there is something to do, `way`, and else ok."""
    return Finding(name, "warning" if way else "ok", text, way)


def hardware(device: torch.device) -> Finding:
    """The device's name and memory."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    sees_no_gpu = torch.version.cuda is not None and not torch.cuda.is_available()
    way = "torch is built for CUDA but sees no GPU: see nvidia-smi" if sees_no_gpu else ""
    return ok_or_warning("device", f"{device}: {name}, {total_memory(device) / _GIB:.1f} GiB", way)


def attention_finding(device: torch.device) -> Finding:
    """The kernels of attention that run, in bf16."""

    def attend(backend: SDPBackend) -> None:
        q = torch.ones(1, 1, 64, 64, device=device, dtype=torch.bfloat16)
        with sdpa_kernel(backend):
            scaled_dot_product_attention(q, q, q)

    names = [name for name, backend in KERNELS.items() if not fault_of(partial(attend, backend))]
    way = ""
    if len(names) <= 1:
        way = "attention takes memory by the square of the tokens: a newer torch or GPU has others"
    return ok_or_warning("attention", ", ".join(names) or "none", way)


def dtype_finding(device: torch.device) -> Finding:
    """The precisions that a product of matrices runs in."""

    def autocast() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            x = torch.ones(8, 8, device=device)
            if linear(x, x).dtype != torch.bfloat16:
                raise TypeError("autocast is ignored")

    def multiply(dtype: torch.dtype) -> None:
        x = torch.ones(8, 8, device=device, dtype=dtype)
        linear(x, x)

    names = ["fp32"]
    way = ""
    if fault_of(autocast):
        way = "keep train.precision=fp32"
    else:
        names.append("bf16 autocast")
    for name, dtype in DTYPES.items():
        if not fault_of(partial(multiply, dtype)):
            names.append(name)
    return ok_or_warning("dtypes", ", ".join(names), way)


def triton_finding(device: torch.device) -> Finding:
    """The version of Triton, which compiles kernels for GPUs."""
    version = installed_version("triton")
    is_missed = device.type == "cuda" and not version
    return ok_or_warning("triton", version or "none", install_command("triton") if is_missed else "")


def compiler_finding(device: torch.device) -> Finding:
    """Whether torch.compile works, found by compiling a line."""

    def compile_line() -> None:
        line = torch.compile(lambda x: x.sin() * 2, fullgraph=True)
        line(torch.ones(8, device=device))

    problem = fault_of(compile_line)
    if not problem:
        return Finding("torch.compile", "ok", "works")
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++"))
    way = "none is needed to train; mend what it says" if has_compiler else "install a C++ compiler, g++ or clang++"
    return Finding("torch.compile", "warning", problem, way)


def disk_finding() -> Finding:
    """The free space of the disk that runs/ is on."""
    free_gib = shutil.disk_usage(".").free / _GIB
    way = "free some: a run keeps two checkpoints" if free_gib < _MIN_FREE_GIB else ""
    return ok_or_warning("disk", f"{free_gib:.1f} GiB free here, where runs/ goes", way)


def extra_findings() -> list[Finding]:
    """What each extra of dumo lacks of its optional packages."""
    findings: list[Finding] = []
    for extra, requirements in runtime.packages_by_extra().items():
        problems = [package_problem(Requirement(requirement).name, extra) for requirement in requirements]
        lacking = ", ".join(filter(None, problems))
        text = f"lacks {lacking}: {install_command(extra)}" if lacking else "installed"
        findings.append(Finding(f"extra {extra}", "ok", text))
    return findings


def fault_of(work: Callable[[], object]) -> str:
    """Call `work`, and return the first line of its error; "" where it raises none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except Exception as error:  # whatever a compiler or driver may raise
        return f"{error}".partition("\n")[0] or type(error).__name__
    return ""
