"""What is said of a machine is what was tried on it."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from importlib import metadata
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from dumo import runtime
from dumo.plan import machine

CPU = torch.device("cpu")


def broken(*_: object, **__: object) -> NoReturn:
    """What a library does that is not all there."""
    raise RuntimeError("No working C++ compiler found: g++\nand a long story")


def test_faults() -> None:
    assert machine.fault_of(lambda: 1) == ""
    assert machine.fault_of(broken) == "No working C++ compiler found: g++"
    assert machine.fault_of(lambda: [][0]) == "list index out of range"

    def wordless() -> None:
        raise ValueError

    assert machine.fault_of(wordless) == "ValueError"


def test_kernels_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[SDPBackend] = []

    @contextmanager
    def only(backend: SDPBackend) -> Generator[None, None, None]:
        inside[:] = [backend]
        yield

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if inside[0] not in runs:
            raise RuntimeError("no available kernel")
        return q

    assert machine.attention_finding(CPU).text.startswith("math")
    monkeypatch.setattr(machine, "sdpa_kernel", only)
    monkeypatch.setattr(machine, "scaled_dot_product_attention", attend)
    runs = {SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION}
    assert machine.attention_finding(CPU) == machine.Finding("attention", "ok", "math, cudnn")
    runs = {SDPBackend.MATH}
    found = machine.attention_finding(CPU)
    assert (found.state, found.text) == ("warning", "math")
    assert found.way


def test_dtypes_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.dtype_finding(CPU) == machine.Finding("dtypes", "ok", "fp32, bf16 autocast, fp16, fp64")
    own = machine.linear

    def no_double(x: Tensor, y: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("no float64 here")
        return own(x, y)

    monkeypatch.setattr(machine, "linear", no_double)
    assert machine.dtype_finding(CPU).text == "fp32, bf16 autocast, fp16"
    monkeypatch.setattr(machine, "linear", lambda x, y: x)  # autocast changes nothing
    found = machine.dtype_finding(CPU)
    assert (found.state, found.text) == ("warning", "fp32, fp16, fp64")
    assert "fp32" in found.way


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = machine.compiler_finding(CPU)
    assert (found.state, found.text) == ("warning", "No working C++ compiler found: g++")
    assert "install" not in found.way
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install" in machine.compiler_finding(CPU).way


def test_extras_are_named_with_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2", "pytest[x]>=8; extra == 'dev'"]
    wanted += ['No.such-thing>=1 ; extra == "log"', "numpy<1; extra == 'log'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    dev, log = machine.extra_findings()
    assert dev == machine.Finding("extra dev", "ok", "installed")
    lacking = f"No.such-thing, numpy<1 ({np.__version__} is installed)"
    assert (log.name, log.text) == ("extra log", f"lacks {lacking}: {runtime.install_command('log')}")

    def absent(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert machine.extra_findings() == []


def test_a_full_disk_and_a_blind_torch_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiler_finding", lambda _: machine.Finding("torch.compile", "ok", "works"))
    monkeypatch.setattr(torch.version, "cuda", None)
    found = {line.name: line for line in machine.examine_machine(CPU)}
    assert {"versions", "device", "threads", "attention", "dtypes", "triton", "torch.compile", "disk"} <= found.keys()
    assert "ranks" not in found
    assert torch.__version__ in found["versions"].text
    assert found["device"].state == "ok"
    assert all(bool(line.way) == (line.state != "ok") for line in found.values())

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**28))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {line.name: line for line in machine.examine_machine(CPU)}
    assert (found["disk"].state, found["disk"].text[:7]) == ("warning", "0.2 GiB")
    assert found["device"].state == "warning"
    assert "nvidia-smi" in found["device"].way
