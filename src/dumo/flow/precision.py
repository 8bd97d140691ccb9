"""The precision of passes, by name.

    fp32   matrix products and convolutions in float32, also in cuDNN, which uses TF32 by default
    tf32   on a GPU, their inputs are rounded to TF32 (10 of 23 mantissa bits); on other devices as fp32
    bf16   autocast: layers compute in bf16 (7 mantissa bits); weights and gradients stay in float32

- In evaluation, wrap a pass in `using`.
- In training, wrap the whole loop in `product_precision`, a setting of the process that backward passes need as well,
  and each forward pass in `autocast`, which caches its casts of the weights until the optimizer changes them.
- `uses_tf32` and `precision_of` return the current precision.
- `to_float32` and `round_stochastically` convert tensors that are stored in 16 bits.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from dumo.autodiff.cast import autocast_dtype
from dumo.types import Sample

Precision = Literal["fp32", "tf32", "bf16"]
# The 16-bit floating-point dtypes.
HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def using(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Set the precision of forward passes on this device."""
    with product_precision(precision, device), autocast(precision, device):
        yield


def autocast(precision: Precision, device: torch.device | str, *, keep: bool = True) -> torch.autocast:
    """Return a context with autocast to bf16 if that is the precision, and without autocast otherwise.

    keep: whether to cache the casts of weights until the context ends.
    """
    device_type = torch.device(device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=keep)


@contextmanager
def product_precision(precision: Precision, device: torch.device | str) -> Generator[None, None, None]:
    """Set whether float32 products and convolutions on GPUs use TF32, for the whole process, and restore it afterwards.

    It has no effect on other devices.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    matmul_before = torch.get_float32_matmul_precision()
    convolutions_before = torch.backends.cudnn.allow_tf32
    if precision == "tf32":
        _set_rounding("high", True)
    else:
        _set_rounding("highest", False)
    try:
        yield
    finally:
        _set_rounding(matmul_before, convolutions_before)


def _set_rounding(matmul: str, convolutions: bool) -> None:
    """Set whether matrix products ("high" for TF32, else "highest") and cuDNN convolutions use TF32."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


def uses_tf32(device_type: str) -> bool:
    """Whether products on this device type currently use TF32."""
    return device_type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def precision_of(x: Sample) -> str:
    """Return the name of the current precision of a pass on x.

    Under autocast, it is the dtype and "autocast"; for float32 and float64, "fp32", or "tf32" if float32 uses TF32;
    otherwise the dtype of x.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        return f"{dtype} autocast"
    if x.dtype == torch.float32 and uses_tf32(x.device.type):
        return "tf32"
    if x.dtype in (torch.float32, torch.float64):
        return "fp32"
    return str(x.dtype)


def to_float32(x: Tensor) -> Tensor:
    """Convert a 16-bit tensor to float32; return other tensors unchanged."""
    return x.float() if x.dtype in HALVES else x


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round a float32 tensor to bf16 stochastically and without bias.

    bf16 consists of the upper 16 bits of a float32. A random 16-bit number is added to the lower bits, which are then
    truncated. Non-finite values are not changed.

    bits: random integers of the shape of x, of which the lower 16 bits are used.
    """
    raised = x.contiguous().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    truncated = (raised & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), truncated, x).bfloat16()
