"""What passes compute in, by name.

    fp32   products of matrices and convolutions as they are: cuDNN's, which take TF32 by default, too
    tf32   of a GPU's products and convolutions the factors are rounded to TF32, 10 bits of 23; elsewhere as fp32
    bf16   autocast: layers compute in bf16, 7 bits, what is sensitive in fp32; weights and their gradients stay fp32

A rounding is a setting of the process, which holds for backward passes, too; autocast is of a piece of code, around
passes forward alone: it keeps the weights it has cast by default, so no optimizer may step inside.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16"]
HALVES = (torch.bfloat16, torch.float16)


def rounded_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """A tensor of float32 in bf16: to either neighbour, with the chances that keep its mean, by random whole numbers.

    Of `bits`, of x's shape, the last 16 count. What is not finite stays.
    """
    raised = x.contiguous().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return torch.where(x.isfinite(), (raised & -0x10000).view(torch.float32), x).bfloat16()


def single(x: Tensor) -> Tensor:
    """A tensor of 16 bits in float32; another as it is."""
    return x.float() if x.dtype in HALVES else x


@contextmanager
def using(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Inside, passes forward on this device compute so."""
    with products(precision, device), autocast(precision, device):
        yield


def autocast(precision: Precision, device: torch.device | str, *, keep: bool = True) -> torch.autocast:
    """Inside, layers compute in bf16 where that is the precision, else as their inputs have it.

    `keep`: a weight is cast once for all passes, and held in bf16 to the end; else for each use of it.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, precision == "bf16", cache_enabled=keep)


@contextmanager
def products(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Inside, what a GPU multiplies and convolves in fp32 is rounded to TF32, or not. A CPU has no such setting."""
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _round("high" if precision == "tf32" else "highest", precision == "tf32")
    try:
        yield
    finally:
        _round(*before)


def _round(matmul: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def rounded(device_type: str) -> bool:
    """Whether products on this type of device are rounded to TF32 now."""
    return device_type == "cuda" and torch.get_float32_matmul_precision() != "highest"
