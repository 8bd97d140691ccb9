"""The Triton kernel without a GPU: its numbers in Triton's interpreter, its code from Triton's compiler.

Triton decides on import which of the two it is, so each runs in a process of its own: this file, run as a program.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")

ALL = ("dq", "dk", "dv")
# type, queries, keys, size of a head of k and of v, the tangents that are not zero, whether the log-sum-exp is given
CASES = {
    "one part": ("float32", 128, 128, 64, 64, ALL, True),
    "two parts": ("float32", 140, 100, 72, 72, ALL, True),
    "wide": ("float32", 130, 77, 128, 128, ALL, True),
    "own maximum": ("float32", 140, 100, 72, 72, ALL, False),
    "other keys, other values": ("float32", 40, 100, 72, 24, ALL, False),
    "fewer keys than a block": ("float32", 70, 3, 16, 48, ALL, False),
    "dq": ("float32", 40, 70, 16, 16, ("dq",), True),
    "dk": ("float32", 40, 70, 16, 16, ("dk",), False),
    "dv": ("float32", 40, 70, 16, 16, ("dv",), False),
    "dq, dv": ("float32", 40, 70, 16, 16, ("dq", "dv"), True),
    "half": ("float16", 128, 128, 64, 64, ALL, True),
    "half in two parts": ("float16", 140, 100, 72, 72, ALL, True),
    "half, wide, own maximum": ("float16", 130, 77, 128, 128, ALL, False),
}
MACHINES = {"A100": (80, 163), "RTX 4090": (89, 99), "H100": (90, 227)}  # compute capability, KiB of shared memory


def rows(dtype: torch.dtype, n: int, d: int) -> Callable[[int], Tensor]:
    """Tensors (1, 2, n, d) that are views of q, k and v in one, as nets make them."""

    def draw(seed: int) -> Tensor:
        x = torch.randn(1, n, 3, 2, d, generator=torch.Generator().manual_seed(seed))
        return x.to(dtype).permute(2, 0, 3, 1, 4)[seed % 3]

    return draw


def error(kind: str, n: int, m: int, d: int, e: int, given: tuple[str, ...], has_lse: bool) -> float:
    """Of the kernel, relative to forward differentiation in float64."""
    from dumo.autodiff.kernel import attention_tangent

    dtype = getattr(torch, kind)
    queries, keys, values = rows(dtype, n, d), rows(dtype, m, d), rows(dtype, m, e)
    primal = (2 * queries(0), keys(1), values(2))
    moved = {"dq": queries(3), "dk": keys(4), "dv": values(5)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (0.2 * q @ k.mT).softmax(-1) @ v

    along = tuple(moved[name].double() * (name in given) for name in ALL)
    o, exact = torch.func.jvp(attend, tuple(x.double() for x in primal), along)
    o = o.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # laid out as fused kernels do
    lse = (0.2 * primal[0].float() @ primal[1].float().mT).logsumexp(-1) if has_lse else None
    out = attention_tangent(*primal, *(moved[name] if name in given else None for name in ALL), o, lse, 0.2)
    assert out.dtype == dtype
    assert out.stride() == o.stride()
    return float((out - exact).norm() / exact.norm())


def odd() -> float:
    """The kernel on strides that no net has: a transposed last axis, a tangent that is one number for all rows."""
    from dumo.autodiff.kernel import attention_tangent

    k, v, dq, o = torch.randn(4, 2, 2, 33, 20, generator=torch.Generator().manual_seed(0))
    q, dv = torch.randn(2, 2, 20, 33, generator=torch.Generator().manual_seed(1)).mT, torch.ones(1).expand_as(v)
    plain = attention_tangent(q.contiguous(), k, v, dq, None, dv.contiguous(), o, None, 0.2)
    return float((attention_tangent(q, k, v, dq, None, dv, o, None, 0.2) - plain).abs().max())


def compiled() -> float:
    """The kernel as one operator of a graph, against itself, chosen by `dumo.autodiff.attention`."""
    from dumo.autodiff import attention, kernel

    attention._has_kernel = lambda q, v: True
    x = torch.randn(6, 1, 2, 40, 24, generator=torch.Generator().manual_seed(0))

    def both(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        o, lse = attention.attend(q, k, v)
        return attention.tangent(q, k, v, dq, dk, dv, o, lse)

    one = torch.compile(both, fullgraph=True, backend="aot_eager")(*x)
    o, _ = attention.attend(*x[:3])
    return float((one - kernel.attention_tangent(*x, o, None, 24**-0.5)).abs().max())


def assembly(capability: int, memory: int, size: int) -> tuple[int, str]:
    """Shared memory and PTX of the kernel that the operator launches for bf16 views of qkv of 16 heads."""
    import triton
    from triton.backends.compiler import GPUTarget

    from dumo.autodiff import kernel

    class Machine:
        """What Triton asks of a driver before it compiles; it keeps what it has compiled by device."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: capability)
        get_current_stream = staticmethod(lambda device: 0)

    class Compile:
        """Stands for the kernel, and compiles where that would launch."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: made.append(launched.warmup(*args, grid=grid, **options))

    triton.runtime.driver.set_active(Machine())
    made, launched, kernel._kernel, kernel.H100_SHARED_BYTES = [], kernel._kernel, Compile(), memory
    x = torch.empty(1, 256, 3, 16, size, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
    kernel.attention_tangent(*x, *x, torch.empty_like(x[0]), None, 0.1)
    kernel._kernel = launched
    return made[0].metadata.shared, made[0].asm["ptx"]


def run(what: str, folder: Path) -> dict[str, float]:
    """This file as a program."""
    env = os.environ | {"TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": str(int(what == "interpret"))}
    done = subprocess.run([sys.executable, __file__, what], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return run("interpret", tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return run("compile", tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
def test_the_kernel_is_exact(errors: dict[str, float]) -> None:
    """On any strides, too; and as the one operator that a compiler sees it is itself."""
    assert errors.pop("compiled") == 0
    for case, found in errors.items():
        assert found <= (2e-3 if case.startswith("half") else 1e-5), case


@pytest.mark.nightly
@pytest.mark.parametrize("machine", MACHINES)
def test_the_code_fits_the_machine(code: dict[str, float], machine: str) -> None:
    """Into its shared memory; loads are wide and ahead; Hopper multiplies by groups of warps."""
    assert 0 < code[f"{machine} shared"] <= MACHINES[machine][1] << 10
    assert code[f"{machine} ahead"] > 0
    assert code[f"{machine} narrow"] == 0
    assert (code[f"{machine} groups"] > 0) == (machine == "H100")


@pytest.mark.parametrize("size", [1, 16, 20, 40, 64, 72, 80, 96, 112, 128, 256])
def test_parts_cover_a_head_with_little_waste(size: int) -> None:
    from dumo.autodiff.kernel import covering_widths

    same, *parts = covering_widths(size)
    assert same == size
    assert size <= sum(parts) <= max(16, 2 * size)
    assert all(part == 0 or (part >= 16 and part.bit_count() == 1) for part in parts)
    assert {64: [64, 0], 72: [64, 16], 128: [128, 0]}.get(size, parts) == parts


def test_operations_are_counted_and_shapes_known_without_numbers() -> None:
    from dumo.autodiff.kernel import attention_tangent

    n, m, d, e = 50, 30, 8, 12
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v, o = (torch.empty(2, 3, *shape) for shape in ((n, d), (m, d), (m, e), (n, e)))
        o = o.transpose(1, 2).contiguous().transpose(1, 2)
        assert attention_tangent(q, k, v, q, k, v, o, None, 0.1).stride() == o.stride()
        assert counter.get_total_flops() == 2 * 6 * n * m * (3 * d + 2 * e)
        attention_tangent(q, k, v, None, None, v, o, None, 0.1)
        assert counter.get_total_flops() == 2 * 6 * n * m * (4 * d + 3 * e)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "interpret":
        found = {name: error(*case) for name, case in CASES.items()} | {"odd": odd(), "compiled": compiled()}
    else:
        found: dict[str, float] = {}
        for machine, (capability, kibibytes) in MACHINES.items():
            shared, ptx = assembly(capability, kibibytes << 10, 72)
            found |= {f"{machine} shared": shared, f"{machine} groups": ptx.count("wgmma.mma_async")}
            found |= {f"{machine} ahead": ptx.count("cp.async.cg"), f"{machine} narrow": ptx.count("ld.global.b16")}
        found["H100 one part"] = assembly(*MACHINES["H100"], 64)[0]
    print(json.dumps(found))
